"""GenEval's rules: from what a detector found to verdicts. Official, strict and graded variants, each under its own name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowalign.rewards.geneval_prompts import MAX_CLAUSES

Box = tuple[float, float, float, float]
CLAUSES = (*(f"{kind} {number}" for number in range(1, MAX_CLAUSES + 1) for kind in ("count", "color", "position")), "not too many")


@dataclass(frozen=True, kw_only=True)
class Found:
    """An object that a detector found.

    Attributes:
        box: Left, top, right, bottom in pixels.
        score: The detector's.
        color: Its colour, where the prompt asks for one.
    """

    box: Box
    score: float = 1.0
    color: str | None = None


Objects = Mapping[str, Sequence[Found]]
"""What was found of each class, highest score first, as :func:`kept` leaves it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the rules say of one image.

    Attributes:
        official: GenEval's own "correct".
        strict: Every number exactly met, which GenEval asks of counting prompts alone; Flow-GRPO's strict reward.
        graded: Mean of the terms of :func:`graded`, in [0, 1].
        graded_flow_grpo: The graded reward of Flow-GRPO's server with its two defects: unbounded below, and 0.75 for a wrong position.
        clauses: The official sub-checks by name, those that the prompt asks for.
        reason: Why the image is not officially correct; empty where it is.
    """

    official: bool
    strict: bool
    graded: float
    graded_flow_grpo: float
    clauses: Mapping[str, bool]
    reason: str


def threshold(tag: str) -> float:
    """Return the score above which a detection counts."""
    return 0.9 if tag == "counting" else 0.3


MAX_OBJECTS = 16  # of a class


def kept(found: Sequence[Found], tag: str) -> list[Found]:
    """Return the detections of a class that count, highest score first: above the threshold, at most 16.

    The official non-maximum suppression is switched off by its own default (an overlap of 1).
    """
    good = sorted((one for one in found if one.score > threshold(tag)), key=lambda one: -one.score)
    return good[:MAX_OBJECTS]


def relations(one: Box, other: Box) -> set[str]:
    """Return how the first box stands to the second: none, one, or two on a diagonal.

    Examples:
        >>> sorted(relations((0, 0, 10, 10), (50, 50, 60, 60))), relations((0, 0, 10, 10), (1, 0, 11, 10))
        (['above', 'left of'], set())
    """
    offset = [(one[i] + one[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(one[i + 2] - one[i]) + abs(other[i + 2] - other[i]) for i in (0, 1)]
    left = [math.copysign(max(abs(shift) - 0.1 * size, 0), shift) for shift, size in zip(offset, sizes, strict=True)]
    if max(map(abs, left)) < 1e-3:
        return set()
    # Over the length of the whole offset, not of what the margin left of it: that is the official rule.
    x, y = (part / math.hypot(*offset) for part in left)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, is_so in holds.items() if is_so}


def judge(record: Mapping[str, Any], objects: Objects) -> Verdict:
    """Judge what was found in an image against a prompt's record.

    Args:
        record: GenEval metadata, checked by ``check_record``.
        objects: The detections that count, with the colours of those whose clause asks for one.
    """
    clauses, reasons = official(record, objects)
    terms, strict = flow_grpo(record, objects)
    return Verdict(
        official=not reasons,
        strict=strict,
        graded=graded(record, objects),
        graded_flow_grpo=sum(terms) / len(terms),
        clauses=clauses,
        reason="; ".join(reasons),
    )


def official(record: Mapping[str, Any], objects: Objects) -> tuple[dict[str, bool], list[str]]:
    """Apply GenEval's own rules: sub-checks by name, and the reasons of failure (none: correct).

    References:
        Ghosh et al., 2023, section 3.2 and their ``evaluate_images.py``.
    """
    clauses: dict[str, bool] = {}
    reasons: list[str] = []
    groups: list[Sequence[Found] | None] = []
    for number, clause in enumerate(record["include"], 1):
        name, count = clause["class"], clause["count"]
        first = objects.get(name, ())[:count]
        failed = []
        clauses[f"count {number}"] = enough = len(first) >= count
        if not enough:
            failed.append(f"expected {name}>={count}, found {len(first)}")
        if "color" in clause:
            right = sum(one.color == clause["color"] for one in first)
            clauses[f"color {number}"] = enough and right >= count
            if enough and right < count:
                seen = ", ".join(str(one.color) for one in first)
                failed.append(f"expected {clause['color']} {name}>={count}, found {right} ({seen})")
        if "position" in clause:
            relation, target = clause["position"]
            wrong = failed or _misplaced(first, groups[target], relation)
            clauses[f"position {number}"] = not wrong
            if not failed and wrong:
                failed.append(f"expected {name} {relation} {record['include'][target]['class']}, found {wrong}")
        groups.append(None if failed else first)
        reasons += failed
    for clause in record.get("exclude", ()):
        num = len(objects.get(clause["class"], ()))
        clauses["not too many"] = clauses.get("not too many", True) and num < clause["count"]
        if num >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {num}")
    return clauses, reasons


def _misplaced(subjects: Sequence[Found], targets: Sequence[Found] | None, relation: str) -> str:
    """Say what is wrong with the positions; empty if every pair is right."""
    if targets is None:
        return "no target"
    for subject in subjects:
        for target in targets:
            true = relations(subject.box, target.box)
            if relation not in true:
                return " and ".join(sorted(true)) or "no relation"
    return ""


def graded(record: Mapping[str, Any], objects: Objects) -> float:
    """Return partial credit in [0, 1]: the mean of these terms, for each include clause.

    Number: ``min(n, count) / max(n, count)``. Colour: the share of the ``count`` best-scored that have it. Position: the share of pairs of
    best-scored subjects and targets that show it, 0 without either. Our own; it repairs what is noted at :func:`flow_grpo`.
    """
    terms = []
    for clause in record["include"]:
        found, count = objects.get(clause["class"], ()), clause["count"]
        terms.append(min(len(found), count) / max(len(found), count))
        if "color" in clause:
            terms.append(sum(one.color == clause["color"] for one in found[:count]) / count)
        if "position" in clause:
            relation, target = clause["position"]
            aim = record["include"][target]
            others = objects.get(aim["class"], ())[: aim["count"]]
            right = sum(relation in relations(one.box, other.box) for one in found[:count] for other in others)
            terms.append(right / (count * aim["count"]))
    return sum(terms) / len(terms)


def flow_grpo(record: Mapping[str, Any], objects: Objects) -> tuple[list[float], bool]:
    """Return the terms of Flow-GRPO's graded reward, whose mean it is, and its strict verdict.

    Kept with two defects, to compare with published runs: a term is unbounded below (16 benches where one was wanted give -14), and a wrong
    position gives a 0 and then also a 1. It ignores the exclude clauses, which exact numbers cover.

    References:
        Liu et al., "Flow-GRPO", 2025, https://arxiv.org/abs/2505.05470, and its reward server.
    """
    terms: list[float] = []
    strict = True
    groups: list[Sequence[Found] | None] = []
    for clause in record["include"]:
        found, count = objects.get(clause["class"], ()), clause["count"]
        matched = len(found) == count
        terms.append(1 - abs(count - len(found)) / count)
        if not matched:
            terms += [0.0] * ("color" in clause or "position" in clause)
        else:
            if "color" in clause:
                right = sum(one.color == clause["color"] for one in found)
                terms.append(1 - abs(count - right) / count)
                matched = right == count
            if "position" in clause and matched:
                relation, target = clause["position"]
                wrong = _misplaced(found, groups[target], relation)
                matched = not wrong
                terms += [0.0] if groups[target] is None else [0.0, 1.0] if wrong else [1.0]
        strict = strict and matched
        groups.append(found if matched else None)
    return terms, strict


def clause_rows(verdicts: Sequence[Verdict]) -> tuple[list[list[float]], list[list[bool]]]:
    """Lay sub-checks out as rows of ``CLAUSES``: which hold, and which were asked for."""
    holds = [[float(verdict.clauses.get(name, False)) for name in CLAUSES] for verdict in verdicts]
    return holds, [[name in verdict.clauses for name in CLAUSES] for verdict in verdicts]
