"""What happens to advantages after scaling: clipping, renormalising, maps to probabilities and to target ratios."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.kinds import FACTORS, Signature
from flowalign.estimators.needs import need_column
from flowalign.estimators.options import at_least, inside
from flowalign.estimators.scale import Rule, divisor, quotient, refuse_divisor
from flowalign.estimators.segmentation import Segmentation, segment_key, segment_needs, statistics
from flowalign.estimators.segments import segment_medians, segment_stats
from flowalign.estimators.signals import Signal, Stage, pure, stage

_CALIBRATE = Signature(phase="centred | scaled | calibrated -> calibrated", rewards="one")


@stage
def clip(size: float) -> Stage:
    """Clip to ``[-size, size]``."""
    if size <= 0:
        raise ValueError(f"clip: got {size}, needed a positive size")

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        known = signal.x[~torch.isnan(signal.x)]
        share = float((known.abs() > size).double().mean()) if known.numel() else 0.0
        return replace(signal, x=signal.x.clamp(-size, size)).note(clipped=share)

    return pure(_CALIBRATE, apply)


@stage
def renormalise(over: Segmentation = "batch", *, ddof: int = 1, eps: float = 1e-4, rule: Rule = "add") -> Stage:
    """Subtract the mean and divide by the standard deviation once more, over a larger segment.

    Over the batch this is one factor for all, so weights between rewards and between groups survive it.

    Args:
        over: Segment of mean and standard deviation.
        ddof: Delta degrees of freedom.
        eps: Keeps the quotient finite.
        rule: How, see ``scale_by_std``.
    """
    refuse_divisor(ddof=ddof, eps=eps)

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        signal, stats = statistics(signal, batch, over)
        by = divisor(stats.variance(ddof=ddof), eps=eps, rule=rule)
        # Compared values of groups already sum to 0; the rounding of that sum must not lift exact zeros.
        mean = torch.where(stats.mean.abs() <= 1e-12 * torch.maximum(stats.minimum.abs(), stats.maximum.abs()), 0.0, stats.mean)
        flat = stats.rows(stats.is_flat) & ~torch.isnan(signal.x)
        return replace(signal, x=torch.where(flat, 0.0, quotient(signal.x - stats.rows(mean), stats.rows(by))))

    return pure(replace(_CALIBRATE, refuses="rewards | common" if over == "batch" else FACTORS), apply, needs=segment_needs(over))


@stage
def sign() -> Stage:
    """Keep only the sign: 1, 0 or -1."""
    signature = replace(_CALIBRATE, refuses=FACTORS)
    return pure(signature, lambda signal, batch: replace(signal, x=torch.where(signal.x.isnan(), signal.x, torch.sign(signal.x))))


@stage
def keep_side(side: Literal["positive", "negative"]) -> Stage:
    """Set the advantages of the other side to 0: learn from successes only, or from failures only."""
    low, high = {"positive": (0.0, None), "negative": (None, 0.0)}[side]
    return pure(_CALIBRATE, lambda signal, batch: replace(signal, x=signal.x.clamp(low, high)))


@stage
def to_probability(size: float = 5.0) -> Stage:
    """Map advantages to probabilities of being good, ``clip(A / size, -1, 1) / 2 + 1/2``; 1/2 is "no preference".

    After ``sign()`` and with size 1 it is the three-valued map 0, 1/2, 1. A sample that is not kept or masked reads 0: objectives must
    respect ``keep``.

    Args:
        size: Advantages of this size and more are certain.

    References:
        Zheng et al., "DiffusionNFT", 2025, https://arxiv.org/abs/2509.16117, and its released code (all, positive, negative, binary).
    """
    if size <= 0:
        raise ValueError(f"to_probability: got {size}, needed a positive size")
    signature = replace(_CALIBRATE, phase="centred | scaled | calibrated -> probability")
    return pure(signature, lambda signal, batch: replace(signal, x=(signal.x / size).clamp(-1, 1) / 2 + 0.5))


@stage
def target_ratio(low: float = 0.2, high: float = 0.2, *, temperature: float = 1.0, ddof: int = 1, eps: float = 1e-6) -> Stage:
    """Set for each sample the ratio that a bounded policy improvement would give it: ``1 - low + (low + high) * sigmoid(t)``.

    ``t = (r - median of the group) / (std of the group + eps) / temperature``. Flat groups and groups of one get 1. The advantage itself
    is left alone; stages that follow carry the target along.

    Args:
        low: How far below 1 the ratio may be.
        high: How far above 1.
        temperature: Large values give targets near the middle.
        ddof: Delta degrees of freedom of the standard deviation.
        eps: Added to the standard deviation.
    """
    if not (0 < low < 1 and high > 0 and temperature > 0):
        raise ValueError(f"target_ratio: got low {low}, high {high}, temperature {temperature}; needed 0 < low < 1 and the others positive")
    refuse_divisor(ddof=ddof, eps=eps)

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        raw = signal.before("target_ratio")
        key = segment_key(signal, batch, "group")
        stats = segment_stats(raw, key)
        distance = (raw - stats.rows(segment_medians(raw, key))) / stats.rows(stats.variance(ddof=ddof).sqrt() + eps)
        target = 1 - low + (low + high) * torch.sigmoid(distance / temperature)
        target = torch.where(stats.rows(stats.is_flat) | torch.isnan(raw), 1.0, target)
        return replace(signal, target=target[:, 0])

    signature = Signature(rewards="one", rows="sample", phase="centred | scaled | calibrated", adds="weights | targets")
    return pure(signature, apply)


@stage
def damp_unless_elaborate(damping: float = 0.1, *, threshold: float = 0.5, variant: Literal["vl", "llm"] = "vl", metric: int = 0) -> Stage:
    """Multiply by ``damping`` the groups in which the largest metric of the passes does not exceed the mean metric of the failures.

    Args:
        damping: Factor of the damped groups.
        threshold: A sample passes above this reward.
        variant: Without passes "vl" keeps 1 and "llm" damps; without failures it is the other way round.
        metric: Column of ``RewardBatch.metric``.
    """
    inside("damping", damping, 0.0, 1.0)
    at_least("metric", metric, 0)

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        value = need_column(batch, "metric", metric, "damp_unless_elaborate")[signal.sample, None]
        raw = signal.before("damp_unless_elaborate")
        key = segment_key(signal, batch, "group")
        passed = segment_stats(torch.where(raw > threshold, value, torch.nan), key)
        failed = segment_stats(torch.where(raw <= threshold, value, torch.nan), key)
        elaborate = passed.maximum > torch.nan_to_num(failed.mean)
        none_passed, none_failed = passed.count == 0, failed.count == 0
        keep = torch.where(none_failed, variant == "llm", torch.where(none_passed, variant == "vl", elaborate))
        return replace(signal, x=torch.where(passed.rows(keep), signal.x, damping * signal.x))

    return pure(Signature(phase="centred | scaled | calibrated", rewards="one", adds="groups"), apply, needs=("metric",))


STAGES: Sequence[Callable[..., Stage]] = (clip, renormalise, sign, keep_side, to_probability, target_ratio, damp_unless_elaborate)
"""For ``stages.STAGES``."""
