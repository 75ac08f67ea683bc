"""What a reward is compared with. Flat segments (by their range) and segments of one give exactly 0.

Every baseline keeps the values that it started from in ``Signal.raw``, for scales over raw rewards.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.kinds import FACTORS, Signature
from flowalign.estimators.needs import need, need_column
from flowalign.estimators.segmentation import Segmentation, segment_key, segment_needs, statistics
from flowalign.estimators.segments import SegmentStats, segment_medians, segment_ranks, segment_stats
from flowalign.estimators.signals import Signal, Stage, State, pure, stage

_SIGNATURE = Signature(phase="reward -> centred")


def _compare(signal: Signal, stats: SegmentStats, deviation: Tensor, flat: Tensor | None = None) -> Signal:
    """Put in the deviations; by range and not by value, so that rounding never becomes an advantage."""
    per_segment = stats.is_flat if flat is None else flat
    centred = torch.where(stats.rows(per_segment) & ~torch.isnan(signal.x), 0.0, deviation)
    return replace(signal, x=centred, raw=signal.x)


def _baseline(over: Segmentation, deviation: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Stage:
    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        signal, stats = statistics(signal, batch, over)
        return _compare(signal, stats, deviation(signal.x, stats.rows(stats.mean), stats.rows(stats.count)))

    return pure(_SIGNATURE, apply, needs=segment_needs(over))


@stage
def center(over: Segmentation = "group") -> Stage:
    """Subtract the mean of the segment; flat segments and segments of one give 0."""
    return _baseline(over, lambda x, mean, count: x - mean)


@stage
def leave_one_out(over: Segmentation = "group") -> Stage:
    """Subtract the mean of the *other* values of the segment: ``K / (K - 1)`` times what ``center`` gives."""
    return _baseline(over, lambda x, mean, count: (x - mean) * count / (count - 1).clamp(min=1))


@stage
def center_by_median(over: Segmentation = "group") -> Stage:
    """Subtract the median of the segment; of an even number of values it is the midpoint of the two in the middle."""

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        key = segment_key(signal, batch, over)
        stats = segment_stats(signal.x, key)
        return _compare(signal, stats, signal.x - stats.rows(segment_medians(signal.x, key)))

    return pure(_SIGNATURE, apply, needs=segment_needs(over))


@stage
def center_by_weighted_mean(over: Segmentation = "group", *, metric: int | None = None) -> Stage:
    """Subtract a weighted mean of the segment, which minimises the variance when the weights are squared gradient norms.

    Args:
        over: Segment.
        metric: Column of ``RewardBatch.metric`` with the weights, all positive; None for the number of trained steps of each sample.
    """

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        if metric is not None:
            weight = need_column(batch, "metric", metric, "center_by_weighted_mean")
        elif batch.step_mask is not None:
            weight = batch.step_mask.double().sum(1)
        else:
            weight = torch.ones(len(batch.rewards), dtype=torch.float64)
        bad = ~(weight > 0) | torch.isinf(weight)
        if metric is not None and bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(f"metric[{row}, {metric}]: got {weight[row].item():g}, needed a positive weight for the baseline")
        key = segment_key(signal, batch, over)
        known = torch.where(torch.isnan(signal.x), torch.nan, weight[signal.sample, None])
        stats, total = segment_stats(signal.x, key), segment_stats(known, key)
        mean = segment_stats(signal.x * known, key).mean / torch.where(total.mean > 0, total.mean, 1.0)
        return _compare(signal, stats, signal.x - stats.rows(mean))

    return pure(_SIGNATURE, apply, needs=(*segment_needs(over), *(() if metric is None else ("metric",))))


@stage
def subtract_given() -> Stage:
    """Subtract ``RewardBatch.baseline``, reward by reward; nothing is compared within the group, so a group of one works."""

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        given = need(batch, "baseline", "subtract_given")
        if given.shape[1] != signal.x.shape[1]:
            raise ValueError(f"baseline: got {given.shape[1]} columns for {signal.x.shape[1]} rewards, needed one each")
        return replace(signal, x=signal.x - given[signal.sample], raw=signal.x)

    return pure(
        Signature(rows="sample", rewards="several", phase="reward -> centred", refuses=f"{FACTORS} | shaped"), apply, needs=("baseline",)
    )


def with_virtual(stats: SegmentStats, value: float, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Add ``num`` virtual values to every segment.

    Returns:
        Mean, sum of squared deviations and flatness of the augmented segments. A segment of fewer than two real values counts as flat.
    """
    total = stats.count + num
    mean = (torch.nan_to_num(stats.mean) * stats.count + num * value) / total
    m2 = stats.m2 + stats.count * num / total * (torch.nan_to_num(stats.mean) - value).square()
    low, high = stats.minimum.clamp(max=value), stats.maximum.clamp(min=value)
    augmented = SegmentStats(index=stats.index, count=total, mean=mean, m2=m2, minimum=low, maximum=high)
    return mean, m2, augmented.is_flat | (stats.count < 2)


@stage
def center_with_virtual(value: float = 1.0, *, num: int = 1) -> Stage:
    """Subtract the mean of the group and of ``num`` virtual samples that got ``value``, the largest possible reward.

    A group in which all are wrong then learns that all are wrong. Groups that are flat at ``value`` itself, and groups of one, give 0.

    Args:
        value: Reward of the virtual samples; no real reward may exceed it.
        num: How many there are; 0 gives ``center``.
    """
    if num < 0:
        raise ValueError(f"num: got {num} virtual samples, needed 0 or more")

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        signal, stats = statistics(signal, batch, "group")
        mean, _, flat = with_virtual(stats, value, num) if num else (stats.mean, stats.m2, stats.is_flat)
        return _compare(signal, stats, signal.x - stats.rows(mean), flat)

    return pure(_SIGNATURE, apply)


@stage
def center_across_halves(
    inter: float = 0.5, *, metric: int = 0, discount: float = 1.0, discounted: Literal["low", "high"] = "low"
) -> Stage:
    """Split each group at the median rank of a metric, and compare with the other half as well as with the own one.

    ``A = inter * (r - mean of the other half) + (1 - inter) * (r - mean of the own half)``; inside the first bracket the rewards of one
    half may be discounted. The lower half has ``floor(K / 2)`` samples; ties in the metric are broken by ``sample_uid``.

    Args:
        inter: Share of the comparison between the halves, in [0, 1].
        metric: Column of ``RewardBatch.metric``.
        discount: Factor on the rewards of the discounted half where halves are compared.
        discounted: Which half that is.
    """
    if not 0 <= inter <= 1:
        raise ValueError(f"inter: got {inter}, needed a share in [0, 1]")

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        value = need_column(batch, "metric", metric, "center_across_halves")[signal.sample, None]
        missing = torch.isnan(value) & ~torch.isnan(signal.x)
        if bool(missing.any()):
            row = int(missing.nonzero()[0, 0])
            raise ValueError(f"metric[{row}, {metric}] of sample {int(batch.sample_uid[row])} is nan, needed a number to split its group")
        key = segment_key(signal, batch, "group")
        stats = segment_stats(signal.x, key)
        rank = segment_ranks(torch.where(torch.isnan(signal.x), torch.nan, value), key)
        high = rank >= torch.floor(stats.rows(stats.count) / 2)
        means = [segment_stats(torch.where(mask, signal.x, torch.nan), key).mean for mask in (~high, high)]
        low_mean, high_mean = (stats.rows(torch.nan_to_num(mean)) for mean in means)
        own, other = torch.where(high, high_mean, low_mean), torch.where(high, low_mean, high_mean)
        is_discounted = high if discounted == "high" else ~high
        across = torch.where(is_discounted, discount * signal.x - other, signal.x - discount * other)
        deviation = inter * across + (1 - inter) * (signal.x - own)
        return _compare(signal, stats, deviation)

    return pure(Signature(rewards="one", phase="reward -> centred"), apply, needs=("metric",))


@stage
def center_by_running_mean(*, decay: float = 0.9, min_count: float = 4.0) -> Stage:
    """Subtract a mean over this and earlier steps of the same prompt, for prompts that come back and groups that are small.

    Until a prompt has ``min_count`` remembered samples, the mean of the batch stands in. State: one row per prompt.

    Args:
        decay: What one more step leaves of the memory of a prompt; only prompts of the batch are touched.
        min_count: Number of remembered samples from which the own mean is used.

    References:
        Black et al., "Training Diffusion Models with Reinforcement Learning", 2023, https://arxiv.org/abs/2305.13301: per-prompt
        statistics. Deviation: exponentially forgotten moments instead of a queue.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: got {decay}, needed a number in [0, 1]")

    def apply(signal: Signal, batch: RewardBatch, state: State) -> tuple[Signal, State]:
        group = batch.group_id[signal.sample]
        now = segment_stats(signal.x, group)
        ids, known, rewards = torch.unique(group), state["id"], signal.x.shape[1]
        count, mean = state["count"].reshape(-1, rewards), state["mean"].reshape(-1, rewards)
        every = torch.unique(torch.cat([known, ids]))
        old_count, old_mean = torch.zeros(2, len(every), rewards, dtype=torch.float64)
        here = torch.searchsorted(every, known)
        old_count[here], old_mean[here] = count, mean
        place = torch.searchsorted(every, ids)
        old_count[place] *= decay
        total = old_count[place] + now.count
        fresh = (old_count[place] * old_mean[place] + now.count * torch.nan_to_num(now.mean)) / total.clamp(min=1e-12)
        old_count[place], old_mean[place] = total, fresh
        overall = segment_stats(signal.x, torch.zeros_like(group)).mean
        baseline = torch.where(total >= min_count, fresh, overall.expand_as(fresh) if len(fresh) else fresh)
        centred = replace(signal, x=signal.x - now.rows(baseline), raw=signal.x)
        return centred, {"id": every, "count": old_count, "mean": old_mean}

    def init() -> State:
        empty = torch.zeros(0, 1, dtype=torch.float64)
        return {"id": torch.zeros(0, dtype=torch.int64), "count": empty, "mean": empty}

    return Stage(signature=_SIGNATURE, apply=apply, init=init)


STAGES: Sequence[Callable[..., Stage]] = (
    center,
    leave_one_out,
    center_by_median,
    center_by_weighted_mean,
    subtract_given,
    center_with_virtual,
    center_across_halves,
    center_by_running_mean,
)
"""For ``stages.STAGES``."""
