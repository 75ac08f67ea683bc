"""What happens to a reward before it is compared with others: ranges, links, gates and factors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.combine import choose_weights
from flowalign.estimators.kinds import Signature
from flowalign.estimators.links import FLink, link
from flowalign.estimators.needs import need, need_column
from flowalign.estimators.options import at_least, inside, positive
from flowalign.estimators.segmentation import segment_key
from flowalign.estimators.segments import segment_ranks, segment_stats
from flowalign.estimators.signals import Signal, Stage, State, pure, stage

_ROUNDING = 1e-6  # float32 rewards may miss the end of their range by rounding

Limit = Annotated[float, math.inf, -math.inf]
Bounds = Limit | Sequence[Limit]


def refuse_outside(x: Tensor, low: Bounds, high: Bounds, batch: RewardBatch, stage: str) -> None:
    """Raise if a reward leaves its declared range.

    Raises:
        ValueError: Names the reward, the sample and the remedy.
    """
    for name, bound in (("low", low), ("high", high)):
        if not isinstance(bound, float | int) and len(bound) != x.shape[1]:
            raise ValueError(f"{stage}.{name}: got {len(bound)} bounds for {x.shape[1]} rewards, needed one number, or one each")
    least, most = (torch.as_tensor(bound, dtype=torch.float64) for bound in (low, high))
    outside = ((x < least - _ROUNDING) | (x > most + _ROUNDING)).nonzero()
    if len(outside):
        row, column = outside[0].tolist()
        raise ValueError(
            f"rewards[{row}, {column}]: got {x[row, column].item():g} for sample {int(batch.sample_uid[row])}, but {stage} needs rewards in "
            f"[{low}, {high}]; declare the true range or clip the reward"
        )


@stage
def check_range(low: Bounds = -math.inf, high: Bounds = math.inf, *, recipe: str = "check_range") -> Stage:
    """Refuse rewards outside a declared range, and change nothing.

    Args:
        low: Least reward, one for all or one each.
        high: Largest.
        recipe: Who needs it, for the message.
    """

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        refuse_outside(signal.x, low, high, batch, recipe)
        return signal

    return pure(Signature(phase="reward"), apply)


@stage
def check_binary(*, recipe: str = "check_binary") -> Stage:
    """Refuse rewards that are not 0 or 1; what is within rounding of them becomes exactly 0 or 1."""

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        nearest = signal.x.round().clamp(0, 1)
        other = ((signal.x - nearest).abs() > _ROUNDING).nonzero()
        if len(other):
            row, column = other[0].tolist()
            raise ValueError(
                f"rewards[{row}, {column}]: got {signal.x[row, column].item():g} for sample {int(batch.sample_uid[row])}, but {recipe} needs "
                "rewards that are 0 or 1; use a strict (pass or fail) reward"
            )
        return replace(signal, x=nearest)

    return pure(Signature(phase="reward"), apply)


@stage
def affine(low: Bounds = 0.0, high: Bounds = 1.0, *, recipe: str = "affine") -> Stage:
    """Map rewards from their declared range to [0, 1], refusing those outside.

    Args:
        low: Least reward, one for all or one each.
        high: Largest.
        recipe: Who needs it, for the message.
    """
    least, most = torch.as_tensor(low, dtype=torch.float64), torch.as_tensor(high, dtype=torch.float64)
    if not bool((most > least).all()):
        raise ValueError(f"affine: got the range [{low}, {high}], needed high above low")

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        refuse_outside(signal.x, low, high, batch, recipe)
        return replace(signal, x=((signal.x - least) / (most - least)).clamp(0, 1))

    return pure(Signature(phase="reward", adds="shaped"), apply)


@stage
def clip_rewards(low: Bounds = 0.0, high: Bounds = 1.0) -> Stage:
    """Clip rewards into a range, for scores that only sometimes leave it."""
    least, most = torch.as_tensor(low, dtype=torch.float64), torch.as_tensor(high, dtype=torch.float64)
    signature = Signature(phase="reward", adds="shaped")
    return pure(signature, lambda signal, batch: replace(signal, x=signal.x.clamp(least, most)))


@stage
def signed_outcome(positive: float = 1.0, negative: float = 1.0) -> Stage:
    """Map a binary reward to ``+positive`` and ``-negative``; a standard deviation after it would undo the sizes."""
    if not (positive > 0 and negative > 0):
        raise ValueError(f"signed_outcome: got {positive} and {negative}, needed two positive sizes")
    signature = Signature(phase="reward", adds="common | shaped")
    return pure(
        signature,
        lambda signal, batch: replace(signal, x=signal.x * (positive + negative) - negative),
    )


@stage
def weigh_rewards(weights: Sequence[float]) -> Stage:
    """Multiply each reward by a number; a standard deviation of each reward after it would undo that, and is refused."""
    signature = Signature(phase="reward", rewards="several", adds="rewards | shaped")

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        return replace(signal, x=signal.x * choose_weights(weights, signal.x.shape[1]))

    return pure(signature, apply)


@stage
def novelty_rank(beta: float = 0.25, *, by: Literal["metric", "log_prob"] = "metric", metric: int = 0) -> Stage:
    """Reduce the rewards of usual samples: ``r * (1 - beta * rank / K)``, rank 0 for the most novel of the group.

    Args:
        beta: Share that the most usual sample nearly loses.
        by: Novelty is a column of ``RewardBatch.metric`` (higher is more novel), or a low log-prob.
        metric: Column of the metric.
    """
    inside("beta", beta, 0.0, 1.0)
    at_least("metric", metric, 0)

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        refuse_outside(signal.x, 0.0, math.inf, batch, "novelty_rank")
        if by == "log_prob":
            usual = mean_log_prob(batch, "novelty_rank")
        else:
            usual = -need_column(batch, "metric", metric, "novelty_rank")
        key = segment_key(signal, batch, "group")
        rank = segment_ranks(torch.where(torch.isnan(signal.x), torch.nan, usual[signal.sample, None]), key)
        stats = segment_stats(signal.x, key)
        return replace(signal, x=signal.x * (1 - beta * rank / stats.rows(stats.count)))

    return pure(Signature(phase="reward", rewards="one", adds="shaped"), apply, needs=(by,))


def mean_log_prob(batch: RewardBatch, stage: str) -> Tensor:
    """Average the log-probs of the trained steps of each sample.

    Raises:
        ValueError: If the batch has none, or a sample has none that is a number.
    """
    table = need(batch, "log_prob", stage)
    used = torch.ones_like(table, dtype=torch.bool) if batch.step_mask is None else batch.step_mask
    mean = torch.where(used, table, 0.0).sum(1) / used.sum(1).clamp(min=1)
    if not bool(torch.isfinite(mean).all()):
        row = int((~torch.isfinite(mean)).nonzero()[0])
        raise ValueError(f"log_prob[{row}] of sample {int(batch.sample_uid[row])} is not finite, needed the log-probs of its trained steps")
    return mean


@stage
def trust_gate(weights: Sequence[float] | None = None, *, scale: float = 0.3, decay_steps: float = 500.0) -> Stage:
    """Add a learned reward to a verifiable one as far as it can be trusted: ``o + scale * exp(-step / decay_steps) * gamma * think``.

    The rewards are ``(o, think)``, both in [0, 1]. Samples with ``o >= 1/2`` are right. ``gamma`` is 1 where the right ones of the group
    have the higher mean ``think``, else ``exp(mean of the right - mean of the wrong)``. Groups that are all right (``o >= 0.9``) or all
    wrong (``o <= 0.1``) get ``o`` alone. State: the number of steps so far.

    Args:
        weights: Further factors on ``o`` and ``think``; None for 1 each.
        scale: Factor of the learned reward.
        decay_steps: Steps after which that factor has fallen by ``e``.
    """
    at_least("scale", scale, 0.0)
    positive("decay_steps", decay_steps)

    def apply(signal: Signal, batch: RewardBatch, state: State) -> tuple[Signal, State]:
        if signal.x.shape[1] != 2:
            raise ValueError(f"trust_gate: got {signal.x.shape[1]} rewards, needed two: the verifiable one and the learned one")
        refuse_outside(signal.x, 0.0, 1.0, batch, "trust_gate")
        chosen = choose_weights(weights, 2)
        complete = torch.where(torch.isnan(signal.x).any(1, keepdim=True), torch.nan, signal.x)
        outcome, think = complete[:, :1], complete[:, 1:]
        key = segment_key(signal, batch, "group")
        stats = segment_stats(outcome, key)
        right, wrong = (segment_stats(torch.where(m, think, torch.nan), key).mean for m in (outcome >= 0.5, outcome < 0.5))
        gamma = torch.where(right < wrong, torch.exp(right - wrong), 1.0)
        uniform = (stats.minimum >= 0.9) | (stats.maximum <= 0.1)
        factor = torch.where(uniform, 0.0, gamma) * scale * math.exp(-float(state["step"]) / decay_steps)
        x = outcome * chosen[0] + stats.rows(factor) * think * chosen[1]
        return replace(signal, x=x).note(trust=float(gamma.mean()) if len(gamma) else 1.0), {"step": int(state["step"]) + 1}

    signature = Signature(phase="reward", rewards="several -> one", adds="shaped", drops="rewards")
    return Stage(signature=signature, apply=apply, init=lambda: {"step": 0})


@stage
def f_link(divergence: FLink = "reverse_kl", *, temperature: float = 1.0, log_ratio_metric: int | None = None) -> Stage:
    """Map rewards to ``-f'(policy / target)`` with the target ``reference * exp(r / temperature) / Z``.

    ``Z`` is estimated by the group. On-policy at the reference the log-ratio of policy and reference is 0.

    Args:
        divergence: Name of the f-divergence.
        temperature: Strength of the tie to the reference.
        log_ratio_metric: Column of ``RewardBatch.metric`` with ``log policy - log reference`` of each sample; None for 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, needed a positive number")
    link(divergence, torch.zeros(0))  # refuse a wrong name when the chain is built

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        gain = signal.x / temperature
        if log_ratio_metric is not None:
            gain = gain - need_column(batch, "metric", log_ratio_metric, "f_link")[signal.sample, None]
        key = segment_key(signal, batch, "group")
        stats = segment_stats(gain, key)
        top = torch.where(stats.count > 0, stats.maximum, 0.0)
        # The largest term is factored out: exp(r / temperature) overflows for rewards of a few hundred.
        log_z = top + segment_stats(torch.exp(gain - stats.rows(top)), key).mean.log()
        flat = stats.rows(stats.is_flat) & ~torch.isnan(gain)
        return replace(signal, x=torch.where(flat, 0.0, -link(divergence, stats.rows(log_z) - gain)))

    # Linear: its temperature is one factor for all. The other links bend.
    signature = Signature(phase="reward", rewards="one", adds="common | shaped" if divergence == "reverse_kl" else "shaped")
    return pure(signature, apply, needs=() if log_ratio_metric is None else ("metric",))


STAGES: Sequence[Callable[..., Stage]] = (
    check_range,
    check_binary,
    affine,
    clip_rewards,
    signed_outcome,
    weigh_rewards,
    novelty_rank,
    trust_gate,
    f_link,
)
"""For ``stages.STAGES``."""
