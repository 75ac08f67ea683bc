"""``flowalign report RUN [RUN ...]``: what runs left in their folders, as one HTML file that asks no network for anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from flowalign import config as configuration
from flowalign import snapshots
from flowalign.compute import cost_rows, flops_by_purpose
from flowalign.config import ConfigError
from flowalign.env import how_made, read_made
from flowalign.evaluate.charts import Chart, curve_from_log
from flowalign.evaluate.report import Gallery, Picture, Report, Share, Table, Work, write_report
from flowalign.images import jpeg_bytes
from flowalign.run_config import resolved
from flowalign.scored_report import Scored
from flowalign.train.journal import read_log

Log = list[dict[str, Any]]
_BAND = " (band)"
_PHASES = ("rollout", "reward", "advantage", "train", "checkpoint")


def report_runs(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of one run, or of several side by side.

    Args:
        runs: Run folders.
        output: The file; None for ``report.html`` in the first run's folder.

    Returns:
        The file.

    Raises:
        ConfigError: If a folder holds no run, or a run has finished no step.
    """
    names = [run.resolve().name for run in runs]
    if len(set(names)) != len(names):
        names = [str(run) for run in runs]
    logs = {name: _log_of(run) for name, run in zip(names, runs, strict=True)}
    settings = {name: resolved(run / "config.yaml") for name, run in zip(names, runs, strict=True)}
    made = {name: read_made(run) for name, run in zip(names, runs, strict=True)}
    unknown = [name for name in names if not made[name]] if len(runs) == 1 else []
    flat = {name: [_flat(line) for line in log] for name, log in logs.items()}
    parts = list(dict.fromkeys(key for rows in flat.values() for row in rows for key in row if key != "step" and not key.endswith(_BAND)))
    images = Scored(dict(zip(names, runs, strict=True)))
    report = Report(
        title="flowalign run" if len(runs) == 1 else f"{len(runs)} flowalign runs",
        subtitle=", ".join(f"{name} ({len(log)} steps)" for name, log in logs.items()),
        galleries=[gallery for name, run in zip(names, runs, strict=True) for gallery in _over_time(run, name if len(runs) > 1 else "")]
        + images.galleries(),
        charts=[_chart(part, flat) for part in parts] + images.charts(),
        shares=_shares(next(iter(logs.values()))) if len(runs) == 1 else (),
        work=_work(next(iter(logs.values()))) if len(runs) == 1 else (),
        tables=images.tables() + _tables(logs, settings) + _made_of_runs(made),
        configuration=yaml.safe_dump(next(iter(settings.values())), sort_keys=False),
        **(made[names[0]][-1] if len(runs) == 1 and made[names[0]] else how_made()),
        notes=_notes(logs)
        + [f"{name}: no record of command, software and machine; what stands above is this report's own." for name in unknown],
    )
    return write_report(output or runs[0] / "report.html", report)


def _made_of_runs(made: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Table]:
    """Say how several runs were made, or one that was begun more than once."""
    rows = [
        [name, str(number + 1), entry["command"], entry["versions"].get("torch", ""), entry["hardware"].get("devices", "")]
        for name, entries in made.items()
        for number, entry in enumerate(entries)
    ]
    if len(rows) < 2:
        return []
    return [Table(title="How runs were made", columns=("Run", "Start", "Command", "torch", "Devices"), rows=rows)]


def _log_of(run: Path) -> Log:
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: is no run (there is no config.yaml); give the --output folder of a training run")
    log = read_log(run / "log.jsonl")
    if not log:
        raise ConfigError(f"{run}: the run has finished no step, so there is nothing to report")
    return log


def _over_time(run: Path, name: str) -> list[Gallery]:
    """Return the run's grids of samples, the base's first, as many as a page bears and evenly spread; the last step's is always there."""
    found = sorted((run / snapshots.FOLDER).glob("step_*[0-9].png"))
    base = run / snapshots.FOLDER / snapshots.BASE
    num = min(_GRIDS, len(found))
    chosen = [found[round((place + 1) * len(found) / num) - 1] for place in range(num)]
    files = [*([("the base", base)] if base.is_file() else []), *((f"after {int(path.stem[5:])} steps", path) for path in chosen)]
    if not files:
        return []
    pictures = [Picture(data=_small(path), text=text) for text, path in files]
    title = "Over time" + (f": {name}" if name else "")
    return [Gallery(title=title, lead="The same prompts from the same noise; click to enlarge.", pictures=pictures, wide=True)]


_GRIDS, _WIDTH, _BYTES = 5, 1024, 2**18


def _small(path: Path) -> bytes:
    """Return a picture as it is, or smaller where a page would grow heavy with it."""
    data = path.read_bytes()
    if len(data) <= _BYTES:
        return data
    with Image.open(path) as picture:
        return jpeg_bytes(picture, _WIDTH)


def _flat(line: Mapping[str, Any]) -> dict[str, float]:
    """Lay a line out as ``part/name`` columns, the step counted from 1."""
    groups = {"reward": "reward", "metric": "held out", "monitor": "monitor", "metrics": "training"}
    columns = {f"{title}: {name}": value for part, title in groups.items() for name, value in line.get(part, {}).items()}
    # Images of a prompt are alike, so that the true interval is wider than one of so many single images.
    for name, spread in line.get("reward_std", {}).items():
        columns[f"reward: {name}{_BAND}"] = 1.96 * spread / math.sqrt(max(1, line.get("images", 1)))
    return {"step": line["step"] + 1, **columns, "training: gradient norm": line["grad_norm"]}


def _chart(part: str, flat: Mapping[str, Sequence[Mapping[str, float]]]) -> Chart:
    found = [curve_from_log(rows, part, name=name, half=part + _BAND) for name, rows in flat.items()]
    curves = [curve for curve in found if curve.x]
    caption = (
        "Band: 1.96 standard errors of a step's images, as if each were of a prompt of its own."
        if any(curve.low for curve in curves)
        else ""
    )
    return Chart(title=part[0].upper() + part[1:].replace("_", " "), curves=curves, caption=caption)


def _shares(log: Log) -> list[Share]:
    spent = {name: sum(line["time_s"].get(name, 0.0) for line in log) for name in _PHASES}
    return [Share(name=name, seconds=seconds) for name, seconds in spent.items() if seconds > 0]


def _work(log: Log) -> list[Work]:
    return [Work(name=name, flops=flops) for name, flops in flops_by_purpose(log).items()]


def _tables(logs: Mapping[str, Log], settings: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    columns = ("Reward", *(f"{name}, {when}" for name in logs for when in ("first 5 steps", "last 5 steps")))
    names = list(dict.fromkeys(name for log in logs.values() for name in log[-1]["reward"]))
    rows = [[name, *(_mean(part, name) for log in logs.values() for part in (log[:5], log[-5:]))] for name in names]
    tables = [
        Table(
            title="Rewards on training prompts",
            columns=columns,
            rows=rows,
            caption="Means over steps of raw values. Intervals: 1.96 standard errors, as if every image were of a prompt of its own; true ones are wider.",
        )
    ]
    told = [[name, str(line["step"] + 1), text] for name, log in logs.items() for line, text in _first_alarms(log)]
    if told:
        tables.append(Table(title="Alarms", columns=("Run", "Step", "What was seen"), rows=told))
    if len(logs) > 1 and any(map(flops_by_purpose, logs.values())):
        tables.append(_work_of_runs(logs))
    tables.append(
        Table(
            title="What it cost", columns=("", *logs), rows=cost_rows(logs), caption="Rewards, encoders and decoders are in seconds only."
        )
    )
    if len(settings) > 1:
        first = next(iter(settings))
        changed = [[name, text] for name in list(settings)[1:] for text in configuration.differences(settings[first], settings[name])]
        told = changed or [["all", "none"]]
        tables.append(Table(title=f"Differences in configuration from {first}", columns=("Run", "Change"), rows=told))
    return tables


def _work_of_runs(logs: Mapping[str, Log]) -> Table:
    """Say for each run what share of its floating-point operations each purpose had."""
    found = {name: flops_by_purpose(log) for name, log in logs.items()}
    purposes = list(dict.fromkeys(purpose for flops in found.values() for purpose in flops))
    cells = [
        [f"{100 * flops[purpose] / sum(flops.values()):.1f} %" if purpose in flops else "" for flops in found.values()]
        for purpose in purposes
    ]
    rows = [[purpose, *row] for purpose, row in zip(purposes, cells, strict=True)]
    return Table(title="Where the floating-point operations went", columns=("Purpose", *logs), rows=rows)


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> str:
    """Return a reward's mean over steps with its interval, as if every image were of a prompt of its own."""
    told = [line for line in lines if name in line["reward"]]
    if not told:
        return ""
    mean = sum(line["reward"][name] for line in told) / len(told)
    variances = [
        line["reward_std"][name] ** 2 / line["images"] for line in told if line.get("images", 0) > 1 and name in line.get("reward_std", {})
    ]
    half = 1.96 * math.sqrt(sum(variances)) / len(told) if len(variances) == len(told) else None
    return f"{mean:.4g}" + ("" if half is None else f" [{mean - half:.4g}, {mean + half:.4g}]")


def _first_alarms(log: Log) -> list[tuple[dict[str, Any], str]]:
    """Return each kind of alarm where it was first raised; what comes before the colon or comma names the kind."""
    first: dict[str, tuple[dict[str, Any], str]] = {}
    for line in log:
        for text in line.get("alarm", ()):
            first.setdefault(text.partition(":")[0].partition(",")[0], (line, text))
    return list(first.values())


def _notes(logs: Mapping[str, Log]) -> list[str]:
    notes = ["Rewards and monitors are of training prompts and of the noisy policy; flowalign evaluate gives scores with intervals."]
    alarmed = [name for name, log in logs.items() if any("alarm" in line for line in log)]
    return [*notes, f"Alarms in: {', '.join(alarmed)}."] if alarmed else notes
