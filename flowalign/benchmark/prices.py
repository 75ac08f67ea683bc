"""What a score costs: the compute at which a run has it, and how much more another run needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flowalign.evaluate.statistics import seed_interval

Prices = Mapping[int, float | None]


def price(milestones: Sequence[Mapping[str, Any]], start: float, target: float, unit: str) -> float | None:
    """Return the compute from which a run has a score to its end, linear between milestones; None if it ends below.

    A first crossing would be one of noise: with few images a score swings by more than a step gains.

    Examples:
        >>> price([{"score": 0.5, "spent": {"evaluations": 100.0}}, {"score": 0.7, "spent": {"evaluations": 200.0}}], 0.3, 0.6, "evaluations")
        150.0
    """
    course = _course(milestones, start, unit)
    below = [number for number, (_, score) in enumerate(course) if score < target]
    return _crossing(course, target, below[-1] + 1 if below else 0)


def first_reached(milestones: Sequence[Mapping[str, Any]], start: float, target: float, unit: str) -> float | None:
    """Return the compute at which a run has a score for the first time, linear between milestones; None if it never has.

    Examples:
        >>> course = [{"score": score, "spent": {"evaluations": 100.0 * (k + 1)}} for k, score in enumerate([0.7, 0.5, 0.7])]
        >>> first_reached(course, 0.3, 0.6, "evaluations"), price(course, 0.3, 0.6, "evaluations")
        (75.0, 250.0)
    """
    course = _course(milestones, start, unit)
    return _crossing(course, target, next((number for number, (_, score) in enumerate(course) if score >= target), len(course)))


def _course(milestones: Sequence[Mapping[str, Any]], start: float, unit: str) -> list[tuple[float, float]]:
    return [(0.0, start), *((float(milestone["spent"][unit]), float(milestone["score"])) for milestone in milestones)]


def _crossing(course: Sequence[tuple[float, float]], target: float, number: int) -> float | None:
    """Return where the line that ends at a point of the course crosses the target."""
    if number in (0, len(course)):
        return None if number else 0.0
    (at, score), (then, reached) = course[number - 1 : number + 1]
    return at + (then - at) * (target - score) / (reached - score)


def price_cells(found: Prices, other: Prices | None) -> list[str]:
    """Tell how many seeds have a price, what it is, and how many times it is another method's, seed by seed."""
    known = [value for value in found.values() if value is not None]
    # An interval over the seeds that got there would be too kind to a method that often does not.
    told = _on_log_scale(known) if known and len(known) == len(found) else "" if not known else f"{min(known):.3g} at best"
    pairs = [] if other is None else [(other.get(seed), mine) for seed, mine in found.items()]
    cheaper = [theirs / mine for theirs, mine in pairs if theirs and mine]
    return [f"{len(known)} of {len(found)}", told, _on_log_scale(cheaper) if cheaper and len(cheaper) == len(pairs) else ""]


def _on_log_scale(values: Sequence[float]) -> str:
    """Return the geometric mean with its interval over seeds: a price is positive."""
    if min(values) <= 0:
        return f"{sum(values) / len(values):.3g} [no interval]"
    found = seed_interval([math.log(value) for value in values])
    if found.low is None or found.high is None:
        return f"{math.exp(found.mean):.3g} [no interval]"
    return f"{math.exp(found.mean):.3g} [{math.exp(found.low):.3g}, {math.exp(found.high):.3g}]"
