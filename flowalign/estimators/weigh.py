"""Weights and filters: how much a sample or a step counts, apart from its advantage. None of them touches a statistic.

A weight stands beside the advantage and is multiplied in by the loss, so no standard deviation can undo it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.kinds import Signature
from flowalign.estimators.needs import need, need_column
from flowalign.estimators.options import at_least
from flowalign.estimators.segmentation import statistics
from flowalign.estimators.segments import segment_stats
from flowalign.estimators.signals import Signal, Stage, pure, scored_samples, stage

Schedule = Literal["s_1", "s_2", "s_3", "h_1", "h_2", "h_3"]

_ROWS = "sample | step"
_COMPARED = "centred | scaled | calibrated"


@stage
def keep_contrast() -> Stage:
    """Drop the groups in which every reward is flat: nothing can be learnt from them, and their only gradient is the penalty's."""

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        signal, stats = statistics(signal, batch, "group")
        keep = signal.keep & ~stats.rows(stats.is_flat).all(1)
        return replace(signal, keep=keep)

    return pure(Signature(phase="reward", rows="sample"), apply)


def pass_rates(batch: RewardBatch, *, reward: int, stage: str, threshold: float | None = None) -> Tensor:
    """Compute for each sample the pass rate of its group.

    Args:
        batch: The batch.
        reward: Which column of the rewards says how right a sample is.
        stage: Who asks, for messages.
        threshold: A sample passes from this reward on; None to average the rewards as they are, which must lie in [0, 1].

    Returns:
        ``[batch]``; NaN where nothing of the group was scored.

    Raises:
        ValueError: If a reward lies outside [0, 1] and no threshold is given.
    """
    right = need_column(batch, "rewards", reward, stage)
    if threshold is not None:
        right = torch.where(torch.isnan(right), torch.nan, (right >= threshold).double())
    outside = (right < 0) | (right > 1)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"{stage}: rewards[{row}, {reward}] is {right[row].item():g}, needed a pass rate in [0, 1]; choose the column of a verifiable reward"
        )
    stats = segment_stats(right[:, None], batch.group_id)
    return stats.rows(stats.mean)[:, 0]


@stage
def keep_pass_rates(bands: Sequence[Sequence[float]], *, reward: int = 0, threshold: float = 1.0) -> Stage:
    """Keep the groups whose pass rate lies in one of the bands, ends included.

    Args:
        bands: For example ``((1 / 8, 2 / 8), (6 / 8, 7 / 8))``: one rare success or one rare failure among eight.
        reward: Which column of the rewards decides.
        threshold: A sample passes from this reward on.
    """
    for number, band in enumerate(bands):
        if len(band) != 2:
            raise ValueError(f"bands[{number}]: got {tuple(band)}, needed two ends")
    at_least("reward", reward, 0)
    for low, high in bands:
        if not 0 <= low <= high <= 1:
            raise ValueError(f"bands: got ({low}, {high}), needed 0 <= low <= high <= 1")

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        rate = pass_rates(batch, reward=reward, stage="keep_pass_rates", threshold=threshold)
        inside = torch.zeros_like(rate, dtype=torch.bool)
        for low, high in bands:
            inside |= (rate >= low - 1e-9) & (rate <= high + 1e-9)
        return replace(signal, keep=signal.keep & inside)

    return pure(Signature(rows=_ROWS), apply)


def difficulty_weight(rate: Tensor, schedule: Schedule) -> Tensor:
    """Map pass rates to weights of a curriculum; ``s`` is smooth, ``h`` hard, 1 prefers hard prompts and 3 easy ones.

    Args:
        rate: Pass rates in [0, 1].
        schedule: Which of the six curves.

    References:
        Yuan et al., "VL-Cogito", 2025, https://arxiv.org/abs/2507.22607, online difficulty soft weighting, as in the released code.

    Examples:
        >>> difficulty_weight(torch.tensor([0.0, 0.25, 0.75]), "s_1")
        tensor([0.2500, 1.0000, 0.7071])
    """
    smooth = torch.cos((rate - 0.5) * math.pi).clamp(min=0)
    smooth = torch.where(smooth < 1e-6, 0.0, smooth)  # the cosine of pi / 2 is 6e-17
    one = torch.ones_like(rate)
    curves: dict[str, Callable[[], Tensor]] = {
        "s_1": lambda: torch.where(rate == 0, 0.25, torch.where(rate <= 0.5, one, smooth)),
        "s_2": lambda: smooth,
        "s_3": lambda: torch.where(rate < 0.5, smooth, one),
        "h_1": lambda: ((rate > 0) & (rate <= 0.5)).to(rate),
        "h_2": lambda: ((rate > 0) & (rate < 1)).to(rate),
        "h_3": lambda: (rate >= 0.5).to(rate),
    }
    if schedule not in curves:
        raise ValueError(f"schedule: got {schedule!r}, needed one of {', '.join(curves)}")
    return torch.where(torch.isnan(rate), 0.0, curves[schedule]())


@stage
def weigh_by_difficulty(schedule: Schedule = "s_1", *, reward: int = 0) -> Stage:
    """Weigh each group by how hard its prompt is.

    Args:
        schedule: Curve from pass rate to weight, see ``difficulty_weight``.
        reward: Column of the rewards that is the accuracy, in [0, 1].
    """
    at_least("reward", reward, 0)

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        weight = difficulty_weight(pass_rates(batch, reward=reward, stage="weigh_by_difficulty"), schedule)
        return replace(signal, weight=signal.weight * weight[signal.sample])

    return pure(Signature(rows=_ROWS, adds="weights"), apply)


@stage
def weigh_steps_by_spread(top: float = 1.7, *, of: Literal["step_rewards", "log_prob"] = "step_rewards") -> Stage:
    """Weigh the steps at which the samples of a group differ most: from 1 for the least spread to ``top`` for the largest.

    Args:
        top: Largest weight.
        of: Which table's variance over the group (population) tells how much a step matters.
    """
    if top < 1:
        raise ValueError(f"top: got {top}, needed at least 1")

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        table = need(batch, of, "weigh_steps_by_spread")
        scalar = table.flatten(2).sum(2) if table.ndim > 2 else table
        counted = scored_samples(signal, batch)[:, None]
        scalar = torch.where(counted if batch.step_mask is None else counted & batch.step_mask, scalar, torch.nan)
        stats = segment_stats(scalar, batch.group_id)
        variance = torch.where(stats.is_flat, 0.0, stats.variance(ddof=0))  # what differs by rounding only does not differ
        variance = torch.where(stats.count > 0, variance, torch.nan)
        low = torch.where(torch.isnan(variance), torch.inf, variance).amin(1, keepdim=True)
        high = torch.where(torch.isnan(variance), -torch.inf, variance).amax(1, keepdim=True)
        weight = 1 + (top - 1) * torch.nan_to_num((variance - low) / (high - low + 1e-8))  # 1e-8: TW-GRPO's code
        return replace(signal, weight=signal.weight * stats.rows(weight)[signal.sample, signal.step])

    return pure(Signature(rows="step", adds="weights"), apply, needs=(of,))


STAGES = (keep_contrast, keep_pass_rates, weigh_by_difficulty, weigh_steps_by_spread)
"""For ``stages.STAGES``."""
