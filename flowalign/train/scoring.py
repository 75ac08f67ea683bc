"""From images to a reward table: every reward's raw values, checked at the border."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from flowalign.rewards.parts import scores_alone


@runtime_checkable
class Scores(Protocol):
    """What a reward returns that has more to tell than one number: named columns ``[batch]``, and clause matrices where it has them."""

    values: Mapping[str, Tensor]
    clauses: Tensor | None
    clauses_valid: Tensor | None


class Reward(Protocol):
    """Scores images ``[batch, 3, h, w]`` in [0, 1] against their prompts; higher is better."""

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor | Scores:
        """Return a score for each image: a tensor ``[batch]``, or several in ``Scores``."""
        ...


@runtime_checkable
class ChecksRecords(Protocol):
    """A reward that reads the records of prompts, and can tell beforehand which it cannot score."""

    def check(self, record: dict[str, Any]) -> None:
        """Raise a ValueError that says what is wrong with a record."""
        ...


@runtime_checkable
class Submits(Protocol):
    """A reward that works elsewhere, such as on a server: started first, waited for last, so that the others run meanwhile."""

    def submit(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Callable[[], Tensor | Scores]:
        """Start scoring and return what waits for the result."""
        ...


@runtime_checkable
class NamesClauses(Protocol):
    """A reward that says what its sub-checks are."""

    @property
    def clause_names(self) -> tuple[str, ...]:
        """One name for each column of its clause matrix."""
        ...


Result = Tensor | Scores


@dataclass(frozen=True, kw_only=True)
class NamedReward:
    """A reward of a run: its name in logs, and whether NaN may mean "not computed"."""

    name: str
    reward: Reward
    may_skip: bool = False

    @property
    def is_alone(self) -> bool:
        """Whether it scores each image by itself; see :mod:`flowalign.rewards.parts`."""
        return scores_alone(self.reward)


@dataclass(frozen=True, kw_only=True)
class RewardTable:
    """Raw rewards ``[batch, R]`` float64 in the order of ``names``, with the first clause matrix that a reward gave."""

    names: tuple[str, ...]
    values: Tensor
    clauses: Tensor | None = None
    clauses_valid: Tensor | None = None
    clause_names: tuple[str, ...] = ()

    def verdicts(self, row: int) -> dict[str, bool]:
        """Return which of the sub-checks that were asked of an image hold, by name."""
        if self.clauses is None:
            return {}
        values = self.clauses[row].tolist()
        names = self.clause_names if len(self.clause_names) == len(values) else [f"check {number + 1}" for number in range(len(values))]
        asked = [True] * len(values) if self.clauses_valid is None else self.clauses_valid[row].tolist()
        return {name: value >= 1 for name, value, valid in zip(names, values, asked, strict=True) if valid and not math.isnan(value)}

    def means(self) -> dict[str, float]:
        """Return the mean of each column over what was computed."""
        return dict(zip(self.names, torch.nanmean(self.values, 0).tolist(), strict=True))

    def stds(self) -> dict[str, float]:
        """Return the population standard deviation of each column over what was computed."""
        spread = (self.values - torch.nanmean(self.values, 0)).square().nanmean(0).sqrt()
        return dict(zip(self.names, spread.tolist(), strict=True))


def _check(name: str, values: Tensor, prompts: Sequence[str], may_skip: bool) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64).cpu()
    if values.shape != (len(prompts),):
        raise ValueError(f"reward {name!r}: returned shape {tuple(values.shape)} for {len(prompts)} images, needed ({len(prompts)},)")
    bad = torch.isinf(values) if may_skip else ~torch.isfinite(values)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        hint = "" if may_skip else "; if it may skip samples, set may_skip: true for this reward"
        raise ValueError(f"reward {name!r}: returned {values[row].item()} for sample {row} (prompt {prompts[row]!r}){hint}")
    return values


def score(rewards: Sequence[NamedReward], images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> RewardTable:
    """Run every reward on the images.

    Args:
        rewards: At least one; a reward with several named columns gives ``name/column`` for each.
        images: ``[batch, 3, h, w]`` in [0, 1].
        prompts: One text for each image.
        metadata: One record for each image.

    Returns:
        The table of raw values, before any weighting.

    Raises:
        ValueError: If a reward returns something else, the wrong length or a value that is not finite; reward, sample and prompt are named.
    """
    waiting = {i: entry.reward.submit(images, prompts, metadata) for i, entry in enumerate(rewards) if isinstance(entry.reward, Submits)}
    here = {i: entry.reward(images, prompts, metadata) for i, entry in enumerate(rewards) if i not in waiting}
    results = [waiting[i]() if i in waiting else here[i] for i in range(len(rewards))]
    return to_table(rewards, [([result], None) for result in results], prompts)


def to_table(
    rewards: Sequence[NamedReward], results: Sequence[tuple[Sequence[Result], Tensor | None]], prompts: Sequence[str]
) -> RewardTable:
    """Check what rewards returned and join it.

    Args:
        rewards: The rewards.
        results: Of each what it returned for parts of the images, and the order that puts their rows, one part after the other, into that of the
            prompts; None where they are.
        prompts: One text for each image.

    Raises:
        ValueError: As :func:`score`.
    """
    if not rewards:
        return RewardTable(names=(), values=torch.zeros(len(prompts), 0, dtype=torch.float64))
    names: list[str] = []
    columns: list[Tensor] = []
    clauses = valid = None
    called: tuple[str, ...] = ()
    for entry, (parts, order) in zip(rewards, results, strict=True):
        values, found, asked = _joined(entry.name, parts, order)
        for column, told in values.items():
            names.append(entry.name if len(values) == 1 else f"{entry.name}/{column}")
            columns.append(_check(names[-1], told, prompts, entry.may_skip))
        if clauses is None and found is not None:
            clauses, valid = found, asked
            called = entry.reward.clause_names if isinstance(entry.reward, NamesClauses) else ()
    return RewardTable(names=tuple(names), values=torch.stack(columns, 1), clauses=clauses, clauses_valid=valid, clause_names=called)


def _joined(name: str, parts: Sequence[Result], order: Tensor | None) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """Join the parts of one reward's result: its columns, clauses and which of them are asked."""

    def cat(tables: Sequence[Tensor]) -> Tensor:
        rows = torch.cat([torch.as_tensor(table) for table in tables]) if len(tables) > 1 else torch.as_tensor(tables[0])
        return rows if order is None or len(rows) != len(order) else rows[order.to(rows.device)]

    odd = next((part for part in parts if not isinstance(part, Tensor | Scores)), None)
    if odd is not None:
        raise ValueError(f"reward {name!r}: returned {type(odd).__name__}, needed a tensor [batch] or an object with 'values'")
    plain = [part for part in parts if isinstance(part, Tensor)]
    if len(plain) == len(parts):
        return {"": cat(plain)}, None, None
    told = [part for part in parts if not isinstance(part, Tensor)]
    values = {column: cat([part.values[column] for part in told]) for column in told[0].values}
    clauses = [part.clauses for part in told if part.clauses is not None]
    valid = [part.clauses_valid for part in told if part.clauses_valid is not None]
    whole = len(clauses) == len(valid) == len(parts)
    return values, cat(clauses) if whole else None, cat(valid) if whole else None
