"""What a run has spent: evaluations and floating-point operations of its denoiser by purpose, seconds, and how much of scoring cost none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowalign.core.flops import DIFFERENTIATED
from flowalign.train.flops import PER_ROW
from flowalign.train.journal import HIDDEN

_PURPOSES = {
    "rollout": "rollout",
    "train": "training, with backward",
    "reference": "base, for penalties",
    "completion": "completions",
    "monitor": "monitors",
    "shown": "images shown",
}
_COUNTS = ("total", "rows_per_evaluation")


def flops_by_purpose(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sum the denoiser's floating-point operations over a log, by purpose; a pass with its backward counts as three.

    Text encoders, decoders and rewards are not counted; passes that end early ("taps") count as whole ones. Steps that were logged without the
    operations of a row count those of the first that has them; where none has, there is nothing.

    Examples:
        >>> flops_by_purpose([{"evaluations": {"rollout": 8, "train": 4, "total": 12, "rows_per_evaluation": 2}, "flops_per_row": 10.0}])
        {'rollout': 160.0, 'training, with backward': 240.0}
    """
    known = [line[PER_ROW] for line in log if line.get(PER_ROW)]
    found: dict[str, float] = {}
    for line in log if known else ():
        evaluations = line.get("evaluations", {})
        for purpose, number in evaluations.items():
            if purpose not in _COUNTS:
                weight = DIFFERENTIATED if purpose == "train" else 1.0
                name = _PURPOSES.get(purpose, purpose)
                found[name] = found.get(name, 0.0) + number * weight * evaluations["rows_per_evaluation"] * line.get(PER_ROW, known[0])
    return found


def cost_rows(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """Return rows of a table of what runs have spent, a column for each."""
    columns = {name: _costs(log) for name, log in logs.items()}
    titles = list(dict.fromkeys(title for costs in columns.values() for title in costs))
    return [[title, *(costs.get(title, "") for costs in columns.values())] for title in titles]


def _costs(log: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    def spent(name: str) -> float:
        return sum(line["time_s"].get(name, 0.0) for line in log)

    images, seconds = sum(line.get("images", 0) for line in log), spent("total")
    costs = {"Steps": str(len(log)), "Images": f"{images:,}", "Wall time": f"{seconds:,.1f} s"}
    costs["Wall time of a step"] = f"{seconds / len(log):.2f} s"
    evaluations = sum(line.get("evaluations", {}).get("total", 0) for line in log)
    if evaluations:
        costs["Evaluations of the denoiser"] = f"{evaluations:,}"
    flops = sum(flops_by_purpose(log).values())
    if flops and images:
        costs["FLOPs of the denoiser"] = f"{flops:.3g}"
        costs["FLOPs for an image"] = f"{flops / images:.3g}"
        costs["FLOP/s over the wall time"] = f"{flops / seconds:.3g}"
    hidden, waited = spent(HIDDEN), spent("reward")
    if hidden + waited > 0:
        costs["Scoring, waited for"] = f"{waited:.1f} s"
        costs["Scoring, hidden behind the rollout"] = f"{hidden:.1f} s, {100 * hidden / (hidden + waited):.0f} % of it"
    return costs
