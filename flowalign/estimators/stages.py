"""The stages that are there so far. Each standard deviation names its ddof, its eps, the rule and what it is taken over."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.chain import Signal, Stage, pure, segment_key
from flowalign.estimators.kinds import Signature
from flowalign.estimators.segments import segment_stats

Rule = Literal["add", "floor", "rsqrt"]


def combine_rewards(weights: Sequence[float] | None = None) -> Stage:
    """Add the rewards up, weighted, before anything is compared.

    A sample that lacks one of its rewards cannot be compared and becomes NaN; counting the missing one as 0 would punish it.

    Args:
        weights: One for each reward; None for 1 each.
    """

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        num = signal.x.shape[1]
        chosen = [1.0] * num if weights is None else list(weights)
        if len(chosen) != num:
            raise ValueError(f"reward_weights: got {len(chosen)} weights for {num} rewards, needed one each")
        used = [i for i, weight in enumerate(chosen) if weight != 0]  # a reward of weight 0 is only logged
        return replace(signal, x=(signal.x[:, used] * torch.tensor([chosen[i] for i in used], dtype=torch.float64)).sum(1, keepdim=True))

    name = "combine_rewards" if weights is None else f"combine_rewards({', '.join(map(str, weights))})"
    return pure(name, Signature(rewards="several -> one", phase="reward"), apply)


def _baseline(name: str, over: str, deviation: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Stage:
    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        stats = segment_stats(signal.x, segment_key(signal, batch, over))
        mean, count = stats.rows(stats.mean), stats.rows(stats.count)
        # By range and not by value: rounding must not become an advantage, and a group of one carries no comparison.
        flat = stats.rows(stats.is_flat())
        centred = torch.where(flat & ~torch.isnan(signal.x), 0.0, deviation(signal.x, mean, count))
        share = float(stats.is_flat().any(1).double().mean()) if len(stats.mean) else 0.0
        return replace(signal, x=centred, raw=signal.x).note(flat_groups=share, groups=float(len(stats.mean)))

    return pure(name, Signature(phase="reward -> centred"), apply)


def center(over: str = "group") -> Stage:
    """Subtract the mean of the segment; flat segments and segments of one give 0."""
    return _baseline(f"center(over={over})", over, lambda x, mean, count: x - mean)


def leave_one_out(over: str = "group") -> Stage:
    """Subtract the mean of the *other* values of the segment: ``K / (K - 1)`` times what ``center`` gives."""
    return _baseline(f"leave_one_out(over={over})", over, lambda x, mean, count: (x - mean) * count / (count - 1).clamp(min=1))


def scale_by_std(over: str = "group", *, of: Literal["raw", "residual"] = "raw", ddof: int, eps: float, rule: Rule = "add") -> Stage:
    """Divide by a standard deviation.

    Args:
        over: Segment that it is taken over.
        of: The values before the baseline or after it. Within a group there is no difference.
        ddof: Delta degrees of freedom.
        eps: Keeps the quotient finite ...
        rule: ... added to the std ("add"), as its least value ("floor"), or added to the variance ("rsqrt").
    """
    if rule not in ("add", "floor", "rsqrt"):
        raise ValueError(f"rule: got {rule!r}, needed 'add', 'floor' or 'rsqrt'")

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        values = signal.x if of == "residual" or signal.raw is None else signal.raw
        stats = segment_stats(values, segment_key(signal, batch, over))
        variance = stats.variance(ddof=ddof)
        std = variance.sqrt()
        divisor = {"add": std + eps, "floor": std.clamp(min=eps), "rsqrt": (variance + eps).sqrt()}[rule]
        return replace(signal, x=signal.x / stats.rows(divisor)).note(std=float(std.mean()) if std.numel() else 0.0)

    name = f"scale_by_std(over={over}, of={of}, ddof={ddof}, eps={eps:g}, rule={rule})"
    return pure(name, Signature(phase="centred -> scaled", magnitude="free"), apply)


def clip(size: float) -> Stage:
    """Clip to ``[-size, size]``."""
    if size <= 0:
        raise ValueError(f"clip: got {size}, needed a positive size")

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        known = signal.x[~torch.isnan(signal.x)]
        share = float((known.abs() > size).double().mean()) if known.numel() else 0.0
        return replace(signal, x=signal.x.clamp(-size, size)).note(clipped=share)

    return pure(f"clip({size:g})", Signature(phase="centred | scaled | calibrated -> calibrated", rewards="one"), apply)


def broadcast_steps() -> Stage:
    """Give every trained step of a sample the sample's advantage."""

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        steps = batch.num_steps
        spread = {
            name: value.repeat_interleave(steps, 0)
            for name, value in (("x", signal.x), ("sample", signal.sample), ("weight", signal.weight))
        }
        step = torch.arange(steps).repeat(len(signal.sample))
        return replace(signal, **spread, step=step, raw=None)  # type: ignore[arg-type]

    return pure("broadcast_steps", Signature(rows="sample -> step", rewards="one"), apply)


STAGES = {stage.__name__: stage for stage in (combine_rewards, center, leave_one_out, scale_by_std, clip, broadcast_steps)}
"""Names for chains that are written down in a configuration."""
