"""Rewards that are only orders: win rates, Pareto ranks, and comparison reward by reward in order of importance."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.kinds import FACTORS, Signature
from flowalign.estimators.options import at_least
from flowalign.estimators.segmentation import Segmentation, segment_key, segment_needs
from flowalign.estimators.segments import segment_pairs, segment_stats, settle_ties
from flowalign.estimators.signals import Signal, Stage, pure, stage


@stage
def win_rate() -> Stage:
    """Replace each reward by the share of the other samples of the group that it beats; a tie counts half."""

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        key = segment_key(signal, batch, "group")
        left, right = segment_pairs(key)
        settled = settle_ties(signal.x, key)
        gap = settled[left] - settled[right]
        won = torch.where(torch.isnan(gap), 0.0, torch.sign(gap) / 2 + 0.5)
        stats = segment_stats(signal.x, key)
        rate = torch.zeros_like(signal.x).index_add(0, left, won) / (stats.rows(stats.count) - 1).clamp(min=1)
        return replace(signal, x=torch.where(torch.isnan(signal.x), torch.nan, rate))

    return pure(Signature(phase="reward", refuses=FACTORS, adds="shaped"), apply)


def pareto_ranks(x: Tensor, key: Tensor, *, box: float = 0.0) -> Tensor:
    """Sort the rows of each segment into fronts: 0 for those that no other dominates, 1 for those that only rank 0 dominates, and so on.

    Args:
        x: ``[rows, rewards]``; a row with NaN gets rank NaN.
        key: Rows with equal keys form a segment.
        box: Rewards are compared in steps of this size, because with four or more rewards hardly anything is dominated otherwise.

    Examples:
        >>> x = torch.tensor([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [1.0, 1.0], [2.0, 1.0], [0.0, 0.0]])
        >>> pareto_ranks(x, torch.zeros(6, dtype=torch.int64)).tolist()
        [0.0, 0.0, 0.0, 2.0, 1.0, 3.0]
    """
    # Boxes keep dominance transitive; a margin on each comparison would allow cycles.
    settled = settle_ties(x, key)
    cells = torch.floor(settled / box) if box > 0 else settled
    left, right = segment_pairs(key)
    better = (cells[left] >= cells[right]).all(1) & (cells[left] > cells[right]).any(1)
    left, right = left[better], right[better]
    rank = torch.full((len(x),), torch.nan, dtype=torch.float64)
    open_rows = ~torch.isnan(x).any(1)
    above = torch.bincount(right, minlength=len(x))
    front = 0
    while bool(open_rows.any()):
        now = open_rows & (above == 0)
        rank[now] = float(front)
        open_rows = open_rows & ~now
        above = above - torch.bincount(right[now[left]], minlength=len(x))
        front += 1
    return rank


@stage
def pareto_rank(*, over: Segmentation = "group", box: float = 0.0, rewards: Sequence[float] | None = None) -> Stage:
    """Replace several rewards by minus the number of the front that a sample lies on.

    Args:
        over: Segment that is sorted.
        box: See ``pareto_ranks``.
        rewards: 1 for rewards that count and 0 for those that are only logged; None for all.
    """
    at_least("box", box, 0.0)

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        used = selected(rewards, signal.x.shape[1], "pareto_rank")
        ranks = pareto_ranks(signal.x[:, used], segment_key(signal, batch, over), box=box)
        fronts = float(ranks.nan_to_num().max()) + 1 if len(ranks) else 0.0
        return replace(signal, x=-ranks[:, None]).note(fronts=fronts)

    return pure(Signature(rewards="several -> one", phase="reward", refuses=FACTORS, adds="shaped"), apply, needs=segment_needs(over))


@stage
def keep_front(*, over: Literal["batch", "group"] = "batch", box: float = 0.0, rewards: Sequence[float] | None = None) -> Stage:
    """Keep only the samples that no other sample dominates.

    Args:
        over: ``batch`` or ``group``.
        box: See ``pareto_ranks``.
        rewards: 1 for rewards that count and 0 for those that are only logged; None for all.
    """
    at_least("box", box, 0.0)

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        used = selected(rewards, batch.rewards.shape[1], "keep_front")
        key = batch.group_id if over == "group" else torch.zeros_like(batch.group_id)
        return replace(signal, keep=signal.keep & (pareto_ranks(batch.rewards[:, used], key, box=box) == 0))

    return pure(Signature(), apply)


@stage
def hierarchy(
    order: Sequence[int] | None = None, *, margins: Sequence[float] | float = 0.0, rewards: Sequence[float] | None = None
) -> Stage:
    """Compare the samples of a group reward by reward in order of importance: ``(wins - losses) / (K - 1)``.

    Of two samples the first reward that differs by more than its margin decides; margins are in standard deviations of that reward
    within the group (population). With margins above 0 the comparison is not transitive.

    Args:
        order: Columns of the rewards, most important first; None for the order in which they come.
        margins: One for all levels, or one for each.
        rewards: 1 for rewards that count and 0 for those that are only logged; None for all.
    """
    for margin in [margins] if isinstance(margins, float) else margins:
        at_least("margins", margin, 0.0)

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        levels = _levels(order, rewards, signal.x.shape[1])
        sizes = [margins] * len(levels) if isinstance(margins, float | int) else list(margins)
        if len(sizes) != len(levels):
            raise ValueError(f"margins: got {len(sizes)} for {len(levels)} levels, needed one number, or one each")
        key = segment_key(signal, batch, "group")
        complete = torch.where(torch.isnan(signal.x[:, levels]).any(1, keepdim=True), torch.nan, settle_ties(signal.x[:, levels], key))
        stats = segment_stats(complete, key)
        std = stats.rows(stats.variance(ddof=0).sqrt() * torch.tensor(sizes, dtype=torch.float64))
        left, right = segment_pairs(key)
        decision = torch.zeros(len(left), dtype=torch.float64)
        for level in range(len(levels)):
            gap = complete[left, level] - complete[right, level]
            decided = (decision == 0) & (gap.abs() > std[left, level])  # a gap to an unscored sample decides nothing
            decision = torch.where(decided, torch.sign(gap), decision)
        score = torch.zeros(len(complete), dtype=torch.float64).index_add(0, left, decision)
        score = score / (stats.rows(stats.count)[:, 0] - 1).clamp(min=1)
        return replace(signal, x=torch.where(torch.isnan(complete[:, 0]), torch.nan, score)[:, None])

    return pure(Signature(rewards="several -> one", phase="reward", refuses=FACTORS, adds="shaped"), apply)


def selected(rewards: Sequence[float] | None, num: int, stage: str) -> list[int]:
    """Return the columns that count where rewards are only ordered.

    Raises:
        ValueError: If a weight is neither 0 nor 1, since it would do nothing, or none is 1.
    """
    if rewards is None:
        return list(range(num))
    if len(rewards) != num:
        raise ValueError(f"reward_weights: got {len(rewards)} weights for {num} rewards, needed one each")
    if any(weight not in (0, 1) for weight in rewards) or not any(rewards):
        raise ValueError(
            f"reward_weights: got {list(rewards)}, but {stage} only orders rewards, so a weight can be 1 (counts) or 0 (logged)"
        )
    return [i for i, weight in enumerate(rewards) if weight == 1]


def _levels(order: Sequence[int] | None, rewards: Sequence[float] | None, num: int) -> list[int]:
    used = selected(rewards, num, "hierarchy")
    if order is None:
        return used
    wrong = [column for column in order if not 0 <= column < num]
    if wrong or len(set(order)) != len(order) or not order:
        raise ValueError(f"order: got {tuple(order)} for {num} rewards, needed different columns from 0 to {num - 1}")
    return [column for column in order if column in used]


STAGES: Sequence[Callable[..., Stage]] = (win_rate, pareto_rank, keep_front, hierarchy)
"""For ``stages.STAGES``."""
