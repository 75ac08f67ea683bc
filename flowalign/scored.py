"""What a run's own images scored: records of its first steps and of those up to the newest grid of samples, with the best and worst pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flowalign.evaluate.records import Evaluation, Record, extremes, read_evaluation
from flowalign.evaluate.suites import prompt_id
from flowalign.images import PNG, picture_bytes
from flowalign.train.collect import Collected
from flowalign.train.settings import TrainConfig

FOLDER, WINDOW = "scored", 5  # steps at the beginning, and up to a grid
SUITE = "training prompts"
MOST = 6  # pictures of the best, and of the worst
When = Literal["first", "last"]


def is_due(done: int, steps: int, config: TrainConfig) -> bool:
    """Tell whether the images of a step are recorded.

    Args:
        done: Number of the step, from 1.
        steps: Steps of the run.
        config: Of the run; without grids of samples there are no records either.
    """
    every = config.sample_every
    return bool(every) and (done <= WINDOW or min(-(-done // every) * every, steps) - done < WINDOW)


def keep(run: Path, done: int, found: Collected, *, seed: int) -> None:
    """Record what this process made in a step, and drop what neither begins the run nor ends it by now."""
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    records = _records(found)
    for worst in (True, False):
        for _, row in extremes(records, found.own.names[0], worst=worst, most=MOST) if found.own.names else ():
            data = picture_bytes(found.images[row])
            (folder / f"step_{done:06d}_{row}.{'png' if data.startswith(PNG) else 'jpg'}").write_bytes(data)
    Evaluation(suite=SUITE, seed=seed, records=records).write(folder / f"step_{done:06d}.jsonl")
    known = sorted(_steps(folder))
    past = [step for step in known if step <= done]  # what a run had recorded that was resumed from before is no longer so
    wanted = {step for step in past if step <= WINDOW} | set(past[-WINDOW:])
    for step in set(known) - wanted:
        for path in folder.glob(f"step_{step:06d}[._]*"):
            path.unlink()


def _steps(folder: Path) -> dict[int, Path]:
    return {int(path.stem[5:]): path for path in folder.glob("step_*.jsonl")}


def _records(found: Collected) -> tuple[Record, ...]:
    """Write down this rank's images; a prompt's are numbered in their order."""
    table, counts, records = found.own, dict[int, int](), []
    for row, (text, metadata) in enumerate(zip(found.prompts, found.metadata, strict=True)):
        name = prompt_id({"prompt": text, **metadata})
        counts[name] = counts.get(name, -1) + 1
        values = {
            column: None if math.isnan(value) else value for column, value in zip(table.names, table.values[row].tolist(), strict=True)
        }
        records.append(
            Record(id=name, prompt=text, tag=str(metadata.get("tag", "all")), k=counts[name], scores=values, clauses=table.verdicts(row))
        )
    return tuple(records)


@dataclass(frozen=True, kw_only=True)
class Window:
    """The images of some successive steps.

    Attributes:
        steps: Numbers of the steps, from 1.
        found: Their records, one step after the other.
        pictures: The pictures that were kept, by row.
    """

    steps: Sequence[int]
    found: Evaluation
    pictures: Mapping[int, bytes] = field(repr=False)


def read(run: Path) -> dict[When, Window]:
    """Read the first and the last steps that a run recorded; only the last where it has too few for both, and nothing where it has none."""
    steps = sorted(_steps(run / FOLDER).items())
    windows: dict[When, list[tuple[int, Path]]] = {"last": steps[-WINDOW:]} if steps else {}
    if len(steps) >= 2 * WINDOW:
        windows = {"first": steps[:WINDOW], **windows}
    return {when: _read(chosen) for when, chosen in windows.items()}


def _read(steps: Sequence[tuple[int, Path]]) -> Window:
    records: list[Record] = []
    pictures: dict[int, bytes] = {}
    seed: Any = 0
    for _, path in steps:
        found = read_evaluation(path)
        seed = found.seed
        for picture in path.parent.glob(f"{path.stem}_*.*"):
            pictures[len(records) + int(picture.stem.rpartition("_")[2])] = picture.read_bytes()
        records += found.records
    return Window(steps=[step for step, _ in steps], found=Evaluation(suite=SUITE, seed=seed, records=tuple(records)), pictures=pictures)
