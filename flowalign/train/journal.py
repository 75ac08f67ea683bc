"""A run's folder, its log, its progress on the terminal and its sample grids."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flowalign.files import write_atomically


def flat(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return a line's numbers under one level of names, ``a/b`` for what is nested."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found[f"{prefix}{key}"] = value
    return found


HIDDEN = "reward_hidden"  # seconds for which rewards were computed while something else was done; no part of the total


class Clock:
    """Wall time of the phases of a step, in seconds.

    Attributes:
        spent: By phase, since the last ``take``.
        phases: The phases that one is in, the innermost last; after an error those in which it happened.
    """

    def __init__(self, wait: Callable[[], None] | None = None) -> None:
        self.spent: dict[str, float] = {}
        self.phases: list[str] = []
        self._began, self._wait = time.perf_counter(), wait

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block to a phase; the device's work counts for the phase that gave it."""
        began = time.perf_counter()
        self.phases.append(name)
        try:
            yield
            if self._wait is not None:
                self._wait()
            self.phases.remove(name)
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - began

    def add(self, name: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere."""
        self.spent[name] = self.spent.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Return the phases and the whole since the last call, and begin anew."""
        now = time.perf_counter()
        taken = {**self.spent, "total": now - self._began}
        self.spent, self.phases, self._began = {}, [], now
        return taken


class Journal:
    """Appends one JSON line for each step to ``log.jsonl`` and shows the same on the terminal.

    Lines of steps at or beyond ``start`` (left by a run that was killed before its checkpoint) and a torn last line are dropped.
    """

    def __init__(self, path: Path, *, start: int, steps: int, show: bool) -> None:
        kept = [line for line in _whole_lines(path) if line["step"] < start]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._path = path
        self._bar = tqdm(total=steps, initial=start, desc="train", disable=not show)

    def write(self, line: Mapping[str, Any]) -> None:
        """Log a finished step."""
        with self._path.open("a") as log:
            log.write(json.dumps(line, allow_nan=True) + "\n")
        self._bar.update(1)
        if not self._bar.disable:
            tqdm.write(status(line))

    def close(self) -> None:
        """Leave the terminal tidy."""
        self._bar.close()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break  # the line that a kill tore; nothing follows it
    return lines


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a run's log, without a torn last line."""
    return _whole_lines(path)


def status(line: Mapping[str, Any]) -> str:
    """Say a step in one line: raw rewards, drift, ratio, speed and where the time went."""
    rewards = "  ".join(f"{name} {mean:.3f}" for name, mean in line["reward"].items())
    metrics = line["metrics"]
    shown = [
        f"{name.split('/')[0]} {metrics[name]:.4f}"
        for name in ("distance/reference", "kl/reference", "ratio", "clip_fraction")
        if name in metrics
    ]
    if "distance" in line.get("monitor", {}):
        shown.append(f"distance {line['monitor']['distance']:.4f}")
    if "ratio_gap_first" in metrics:
        shown.append(f"gap {metrics['ratio_gap_first']:.1e}")
    spent = line["time_s"]
    shares = " ".join(f"{name} {100 * spent[name] / spent['total']:.0f}%" for name in ("rollout", "reward", "train") if name in spent)
    if spent.get(HIDDEN, 0.0) > 0:
        # Of all scoring, how much cost no time.
        shares += f", {100 * spent[HIDDEN] / (spent[HIDDEN] + spent['reward']):.0f}% of scoring hidden"
    if "alarm" in line:
        shown.append(f"ALARM x{len(line['alarm'])}")
    speed = f"{line['images'] / spent['total']:.1f} images/s"
    if "utilisation" in line:
        speed += f", {100 * line['utilisation'].get('total', 0.0):.0f}% of peak"
    return f"step {line['step'] + 1:>4}  {rewards}  {'  '.join(shown)}  |grad| {line['grad_norm']:.3f}  {speed}  ({shares})"
