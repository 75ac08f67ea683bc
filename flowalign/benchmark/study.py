"""Run what is missing of a benchmark, each cell in a process of its own, and report what there is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flowalign.benchmark.report import write_benchmark
from flowalign.benchmark.spec import BenchmarkConfig, Cell, load_benchmark
from flowalign.benchmark.store import folder_of, read_result
from flowalign.files import write_atomically
from flowalign.run import alone_in
from flowalign.run_config import find_config


def benchmark(name: str, overrides: Sequence[str] = (), *, jobs: int = 1, threads: int | None = None) -> Path:
    """Compare methods at equal compute; the command ``flowalign benchmark``, which goes on where it was stopped.

    Every finished cell is kept. A cell that crashes leaves its output and does not stop the others; the next call tries it again.

    Args:
        name: YAML file, or the name of a shipped one.
        overrides: Any of its fields, as ``--field value``.
        jobs: Cells at a time; 1 for budgets in seconds.
        threads: CPU threads of each; None for equal shares of all cores.

    Returns:
        The report's path.

    Raises:
        ConfigError: If a configuration cannot be meant.
        ValueError: If jobs disturb a budget in seconds.
    """
    config = load_benchmark(find_config(name), list(overrides))
    if config.budget.unit == "seconds" and jobs > 1:
        raise ValueError("budget.seconds: cells that run beside one another disturb each other's time; use --jobs 1 or another budget")
    with alone_in(config.output), _ended_by_sigterm():
        return _study(config, jobs=jobs, threads=threads or max(1, (os.cpu_count() or 1) // jobs))


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end a study as Ctrl-C does, cells included; left to itself it would orphan them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _study(config: BenchmarkConfig, *, jobs: int, threads: int) -> Path:
    """Run what has not finished, and report."""
    bases = config.bases()
    _run(bases, config, jobs=jobs, threads=threads, title="bases")
    # A base that fails costs the methods that begin at it, and no others.
    lost = {cell.reference: _last_words(config, cell) for cell in bases if not _is_done(config, cell)}
    if len(lost) == len(bases):
        raise ValueError(f"the base could not be scored: {next(iter(lost.values()))}")
    baseless = {method: lost[reference] for method in config.methods if (reference := _reference(config, method)) in lost}
    trials = [cell for method in config.methods if method not in baseless for cell in config.trials(method)]
    _run(trials, config, jobs=jobs, threads=threads, title="search")
    best = {method: _best(config, method) for method in config.methods if method not in baseless}
    chosen = {method: point for method, point in best.items() if point is not None}
    # Seeds outermost: a study that is stopped early has all methods on some seeds.
    finals = [config.final(method, point, seed) for seed in config.seeds for method, point in chosen.items()]
    try:
        _run(finals, config, jobs=jobs, threads=threads, title="runs")
    finally:
        path = write_benchmark(config, trials, finals, chosen, baseless)
    return path


def missing(report: Path) -> list[str]:
    """Name the runs that a report lacks."""
    found: list[str] = json.loads((report.parent / "results.json").read_text(encoding="utf-8"))["missing"]
    return found


def _reference(config: BenchmarkConfig, method: str) -> str:
    return config.final(method, config.search.points()[0], config.seeds[0]).reference


def _last_words(config: BenchmarkConfig, cell: Cell) -> str:
    output = folder_of(config, cell) / "output.txt"
    said = output.read_text(encoding="utf-8", errors="replace").strip().splitlines() if output.is_file() else []
    return f"{said[-1] if said else 'it said nothing'}; see {output}"


def _best(config: BenchmarkConfig, method: str) -> dict[str, Any] | None:
    """Return the search's best point by the reward on training prompts, in which the suite has no part; None where no trial finished well."""
    points = config.search.points()
    if len(points) == 1:
        return points[0]
    results = [read_result(config, cell) for cell in config.trials(method)]
    whole = [(number, result) for number, result in enumerate(results) if result is not None and not result.get("failed")]
    rewards = [(result["reward"], -number) for number, result in whole]
    return points[-max(rewards)[1]] if rewards else None


def _is_done(config: BenchmarkConfig, cell: Cell) -> bool:
    """Tell whether a cell has finished: its folder's name carries all that its result depends on."""
    return read_result(config, cell) is not None


def _run(cells: Sequence[Cell], config: BenchmarkConfig, *, jobs: int, threads: int, title: str) -> None:
    todo = [cell for cell in cells if not _is_done(config, cell)]
    running: list[subprocess.Popen[bytes]] = []

    def work(cell: Cell) -> int:
        folder = folder_of(config, cell)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "cell.json", json.dumps(cell.written(), indent=2) + "\n")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with (folder / "output.txt").open("wb") as output:  # the cells' own progress would be a tangle
            command = [sys.executable, "-m", "flowalign.benchmark.cell", str(folder), str(threads)]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            running.append(process)
            return process.wait()

    bar = tqdm(total=len(cells), initial=len(cells) - len(todo), desc=title, disable=not cells)
    with ThreadPoolExecutor(jobs) as pool, bar:
        try:
            waiting = {pool.submit(work, cell): cell for cell in todo}
            for done in as_completed(waiting):
                cell, code = waiting[done], done.result()
                if code != 0:
                    place = folder_of(config, cell) / "output.txt"
                    tqdm.write(f"{cell.method}, {cell.phase}, seed {cell.seed}: exit code {code}, see {place}; the others go on")
                bar.update(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise
