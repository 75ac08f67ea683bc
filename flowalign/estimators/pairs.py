"""Contrasts inside a group that are not a mean: best and worst, best and second best, passed and failed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.kinds import FACTORS, Signature
from flowalign.estimators.needs import need_column
from flowalign.estimators.segmentation import segment_key
from flowalign.estimators.segments import segment_pairs, segment_ranks, segment_starts, segment_stats, settle_ties
from flowalign.estimators.shape import mean_log_prob
from flowalign.estimators.signals import Signal, Stage, pure, stage


@dataclass(frozen=True, kw_only=True)
class PreferencePairs:
    """Pairs of samples of one prompt.

    Shapes:
        winner, loser: ``[pairs]`` int64, rows of the batch.
        gap: ``[pairs]`` float64, reward of the winner less that of the loser; positive.
    """

    winner: Tensor
    loser: Tensor
    gap: Tensor


def select_pairs(
    rewards: Tensor, group_id: Tensor, sample_uid: Tensor, *, rule: Literal["best_worst", "all"] = "best_worst", margin: float = 0.0
) -> PreferencePairs:
    """Choose preference pairs: the best and the worst of each group, or all pairs that differ enough.

    Flat groups (by range) give no pair, since their order would be arbitrary; ties go to the lower ``sample_uid``.

    Args:
        rewards: ``[batch]``, NaN where not computed.
        group_id: ``[batch]``.
        sample_uid: ``[batch]``.
        rule: Which pairs.
        margin: Least difference of the rewards.

    Raises:
        ValueError: If the rule is unknown.

    References:
        Liu et al., "Flow-GRPO", 2025, released code, online DPO. Deviation: that code pairs the first two samples of a flat group.

    Examples:
        >>> rewards, ids = torch.tensor([0.2, 0.4, 0.9, 0.5, 7.0, 7.0]), torch.tensor([0, 0, 0, 0, 1, 1])
        >>> pairs = select_pairs(rewards, ids, torch.arange(6))
        >>> pairs.winner.tolist(), pairs.loser.tolist()
        ([2], [0])
    """
    order = torch.argsort(sample_uid)
    key = group_id[order]
    x = settle_ties(rewards.to(torch.float64)[order][:, None], key)
    stats = segment_stats(x, key)
    if rule == "best_worst":
        groups = stats.index[segment_starts(stats.index)]
        winner, loser = (_row_of_rank_zero(segment_ranks(values, key)[:, 0], stats.index)[groups] for values in (-x, x))
    elif rule == "all":
        winner, loser = segment_pairs(key)
    else:
        raise ValueError(f"rule: got {rule!r}, needed 'best_worst' or 'all'")
    real = (winner >= 0) & (loser >= 0)
    winner, loser = winner[real], loser[real]
    gap = (x[winner] - x[loser])[:, 0]
    wanted = (gap > 0) & (gap >= margin) & ~stats.rows(stats.is_flat)[winner, 0]
    return PreferencePairs(winner=order[winner[wanted]], loser=order[loser[wanted]], gap=gap[wanted])


def _row_of_rank_zero(rank: Tensor, index: Tensor) -> Tensor:
    num = int(index.max()) + 1 if len(index) else 0
    first = (rank == 0).nonzero()[:, 0]
    return torch.full((num,), -1, dtype=torch.int64).index_put((index[first],), first)


@stage
def best_against_worst(*, margin: float = 0.0) -> Stage:
    """Give the best sample of each group 1, the worst -1 and the others 0; groups without a pair get 0.

    Args:
        margin: Least difference of their rewards.
    """

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        pairs = select_pairs(signal.x[:, 0], batch.group_id[signal.sample], batch.sample_uid[signal.sample], margin=margin)
        x = torch.where(torch.isnan(signal.x), signal.x, 0.0)
        x[pairs.winner], x[pairs.loser] = 1.0, -1.0
        return replace(signal, x=x, raw=signal.x).note(pairs=float(len(pairs.gap)))

    signature = Signature(rows="sample", rewards="one", phase="reward -> calibrated", refuses=FACTORS)
    return pure(signature, apply)


@stage
def best_over_second() -> Stage:
    """Give the best sample of each group its lead over the second best, and the others 0."""

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        key = segment_key(signal, batch, "group")
        stats = segment_stats(signal.x, key)
        rank = segment_ranks(-signal.x, key)
        second = segment_stats(torch.where(rank == 1, signal.x, torch.nan), key).mean
        lead = torch.where(rank == 0, signal.x - stats.rows(second), torch.where(torch.isnan(signal.x), torch.nan, 0.0))
        flat = stats.rows(stats.is_flat) & ~torch.isnan(signal.x)
        return replace(signal, x=torch.where(flat, 0.0, lead), raw=signal.x)

    return pure(Signature(rows="sample", phase="reward -> centred"), apply)


@stage
def decouple_outcomes(*, temperature: float = 10.0, sharpness: float = 0.1, metric: int = 0) -> Stage:
    """Share +1 among the samples of a group that pass and -1 among those that fail.

    Passing samples share by preference, ``exp(preference / sharpness)``, failing ones by how likely they are, ``exp(S / temperature)``
    with ``S`` the mean log-prob. So a pass is never punished for being plain. Groups without both kinds get 0 and are dropped.

    Args:
        temperature: Of the shares among failures.
        sharpness: Difference of preference that gives ``e`` times the share.
        metric: Column of ``RewardBatch.metric`` with the preference, in [0, 1].
    """
    if not (temperature > 0 and sharpness > 0):
        raise ValueError(f"decouple_outcomes: got temperature {temperature} and sharpness {sharpness}, needed two positive numbers")

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        preference = need_column(batch, "metric", metric, "decouple_outcomes")[signal.sample, None]
        # Only passing samples need one; what is given must fit all the same.
        wrong = (preference < 0) | (preference > 1) | (torch.isnan(preference) & (signal.x > 0.5))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            got = f"metric[{row}, {metric}] of sample {int(batch.sample_uid[row])}: got {preference[row, 0].item():g}"
            raise ValueError(f"{got}, but decouple_outcomes needs its preference in [0, 1]")
        likely = mean_log_prob(batch, "decouple_outcomes")[signal.sample, None]
        key = segment_key(signal, batch, "group")
        passed = _shares(torch.where(signal.x > 0.5, preference / sharpness, torch.nan), key)
        failed = _shares(torch.where(signal.x <= 0.5, likely / temperature, torch.nan), key)
        stats = segment_stats(signal.x, key)
        mixed = stats.rows((stats.minimum < 0.5) & (stats.maximum > 0.5))
        x = torch.where(mixed, torch.nan_to_num(passed) - torch.nan_to_num(failed), 0.0)
        x = torch.where(torch.isnan(signal.x), torch.nan, x)
        return replace(signal, x=x, raw=signal.x, keep=signal.keep & mixed[:, 0])

    return pure(
        Signature(rows="sample", rewards="one", phase="reward -> calibrated", refuses=FACTORS),
        apply,
        needs=("metric", "log_prob"),
    )


def _shares(logit: Tensor, key: Tensor) -> Tensor:
    """Take the softmax over each segment; NaN is left out."""
    stats = segment_stats(logit, key)
    top = torch.where(stats.count > 0, stats.maximum, -math.inf)
    odds = torch.exp(logit - stats.rows(top))
    sums = segment_stats(odds, key)
    return odds / (sums.rows(sums.mean) * sums.rows(sums.count))


STAGES: Sequence[Callable[..., Stage]] = (best_against_worst, best_over_second, decouple_outcomes)
"""For ``stages.STAGES``."""
