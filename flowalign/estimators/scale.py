"""What a centred reward is divided by. Each standard deviation names its ddof, its eps, the rule and what it is taken over."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from flowalign.estimators.baseline import with_virtual
from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.kinds import FACTORS, Signature
from flowalign.estimators.options import at_least
from flowalign.estimators.segmentation import Segmentation, segment_needs, statistics
from flowalign.estimators.segments import segment_starts, segment_stats
from flowalign.estimators.signals import Signal, Stage, State, pure, stage

Rule = Literal["add", "floor", "rsqrt"]

_SIGNATURE = Signature(phase="centred -> scaled", refuses=FACTORS)


def refuse_divisor(*, ddof: int, eps: float) -> None:
    """Refuse what no standard deviation can be divided with, when a chain is built.

    Raises:
        ValueError: If ``ddof`` is negative, or ``eps``, which would turn signs around.
    """
    at_least("ddof", ddof, 0)
    at_least("eps", eps, 0.0)


def divisor(variance: Tensor, *, eps: float, rule: Rule) -> Tensor:
    """Turn a variance into what is divided by.

    Args:
        variance: Variances.
        eps: Keeps the quotient finite ...
        rule: ... added to the std ("add"), as its least value ("floor"), or added to the variance ("rsqrt").
    """
    if rule == "add":
        return variance.sqrt() + eps
    return variance.sqrt().clamp(min=eps) if rule == "floor" else (variance + eps).sqrt()


def quotient(x: Tensor, by: Tensor) -> Tensor:
    """Divide; by 0, as it may be with eps 0, gives 0: what has no spread has no contrast."""
    return x / torch.where(by == 0, torch.inf, by)


@stage
def scale_by_std(
    over: Segmentation = "group", *, of: Literal["raw", "residual"] = "raw", ddof: int, eps: float, rule: Rule = "add"
) -> Stage:
    """Divide by a standard deviation.

    Args:
        over: Segment that it is taken over.
        of: The values before the baseline or after it. Within a group there is no difference.
        ddof: Delta degrees of freedom.
        eps: Keeps the quotient finite ...
        rule: ... added to the std ("add"), as its least value ("floor"), or added to the variance ("rsqrt").
    """
    refuse_divisor(ddof=ddof, eps=eps)

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        signal, stats = statistics(signal, batch, over, signal.x if of == "residual" else signal.before("scale_by_std(of=raw)"))
        variance = stats.variance(ddof=ddof)
        by = stats.rows(divisor(variance, eps=eps, rule=rule))
        return replace(signal, x=quotient(signal.x, by)).note(std=float(variance.sqrt().mean()) if variance.numel() else 0.0)

    # A std over all samples is one factor for all groups: what was weighed between them survives.
    signature = replace(_SIGNATURE, refuses="rewards | common") if over == "batch" else _SIGNATURE
    return pure(signature, apply, needs=segment_needs(over))


@stage
def scale_by_constant(value: float) -> Stage:
    """Divide by a number that is known beforehand, such as the range of a bounded reward."""
    if not value > 0:
        raise ValueError(f"scale_by_constant: got {value}, needed a positive number")
    signature = Signature(phase="centred -> scaled", adds="common")
    return pure(signature, lambda signal, batch: replace(signal, x=signal.x / value))


@stage
def scale_with_virtual(value: float = 1.0, *, num: int = 1, ddof: int, eps: float) -> Stage:
    """Divide by the standard deviation of the group and of ``num`` virtual samples that got ``value``.

    Args:
        value: Reward of the virtual samples, as in ``center_with_virtual``.
        num: How many there are.
        ddof: Delta degrees of freedom, of the augmented group.
        eps: Added to the standard deviation.
    """
    refuse_divisor(ddof=ddof, eps=eps)

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        signal, stats = statistics(signal, batch, "group", signal.before("scale_with_virtual"))
        m2 = with_virtual(stats, value, num)[1] if num else stats.m2
        std = (m2 / (stats.count + num - ddof).clamp(min=1)).sqrt()
        return replace(signal, x=quotient(signal.x, stats.rows(std + eps)))

    return pure(_SIGNATURE, apply)


@stage
def scale_by_contrast() -> Stage:
    """Multiply by the share's inverse of the samples whose group has any contrast, so that flat groups do not shrink the mean gradient."""

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        signal, stats = statistics(signal, batch, "group", signal.before("scale_by_contrast"))
        known = ~torch.isnan(signal.x)
        lively = (known & ~stats.rows(stats.is_flat)).sum(0, keepdim=True)
        factor = known.sum(0, keepdim=True) / lively.clamp(min=1)
        return replace(signal, x=signal.x * factor).note(contrast=float((1 / factor.clamp(min=1)).mean()))

    return pure(Signature(phase="centred -> scaled", adds="common"), apply)


def beta_shape(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Turn mean and variance of the pass rates over the prompts into the two parameters of BNPO's Beta density.

    Moments give the Beta ``(a, b)`` of the pass rates; the density that minimises the variance has ``max(1, 1 + a / 3)`` and
    ``max(1, 1 + b / 3)``. Without any variance it is flat: ``(1, 1)``.
    """
    known = variance > 1e-12  # below, the rounding of the moments; the official code gives nan
    concentration = mean * (1 - mean) / torch.where(known, variance, 1.0) - 1
    parameters = [torch.where(known, 1 + concentration * share / 3, 1.0).clamp(min=1) for share in (mean, 1 - mean)]
    return parameters[0], parameters[1]


@stage
def scale_by_beta_density(*, momentum: float = 0.0, largest: float = 1e6) -> Stage:
    """Divide by the density at each group's pass rate of a Beta distribution that follows the pass rates of the prompts.

    Rewards must lie in [0, 1] (see ``affine``). Each reward has its own density. State: the moments of the pass rates.

    Args:
        momentum: What one more step leaves of the earlier moments; 0 for the moments of this batch only.
        largest: Bound on the weight ``1 / density``.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: got {momentum}, needed a number in [0, 1)")

    def apply(signal: Signal, batch: RewardBatch, state: State) -> tuple[Signal, State]:
        signal, stats = statistics(signal, batch, "group", signal.before("scale_by_beta_density"))
        rate = torch.where(stats.count > 0, stats.mean, torch.nan)
        # In the order of the first sample, so that the values of the ids do not decide the last bit.
        prompts = stats.rows(rate)[segment_starts(stats.index)]
        over = segment_stats(prompts, torch.zeros(len(prompts), dtype=torch.int64))
        mean, square = _moving(over.mean, over.mean.square() + over.variance(ddof=1), state, momentum)
        alpha, beta = beta_shape(mean, square - mean.square())
        density = _beta_density(rate, alpha, beta)
        weight = (1 / density).clamp(max=largest)
        scaled = replace(signal, x=quotient(signal.x, 1 / stats.rows(weight)))
        numbers = {f"{name}_{k}": float(v) for name, of in (("alpha", alpha), ("beta", beta)) for k, v in enumerate(of.flatten())}
        return scaled.note(**numbers), {"mean": mean, "square": square}

    def init() -> State:
        empty = torch.zeros(0, 0, dtype=torch.float64)
        return {"mean": empty, "square": empty}

    return Stage(signature=_SIGNATURE, apply=apply, init=init)


def _moving(mean: Tensor, square: Tensor, state: State, momentum: float) -> tuple[Tensor, Tensor]:
    """Move the first two moments; a reward that was not scored in this step keeps its old ones."""
    if state["mean"].shape != mean.shape:
        return mean, square
    known, remembered = ~torch.isnan(mean), ~torch.isnan(state["mean"])
    moved = []
    for new, old in ((mean, state["mean"]), (square, state["square"])):
        mixed = torch.where(remembered, momentum * old + (1 - momentum) * new, new)
        moved.append(torch.where(known, mixed, old))
    return moved[0], moved[1]


def _beta_density(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    log_norm = torch.lgamma(alpha + beta) - torch.lgamma(alpha) - torch.lgamma(beta)
    # xlogy: 0 * log 0 is 0, so a flat density is 1 at the ends too.
    return torch.exp(log_norm + torch.special.xlogy(alpha - 1, x) + torch.special.xlogy(beta - 1, 1 - x))


STAGES: Sequence[Callable[..., Stage]] = (scale_by_std, scale_by_constant, scale_with_virtual, scale_by_contrast, scale_by_beta_density)
"""For ``stages.STAGES``."""
