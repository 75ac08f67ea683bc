"""Weights between rewards that follow the training: by hypervolume, and by agreement of gradients."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.combine import choose_weights
from flowalign.estimators.kinds import Signature
from flowalign.estimators.options import at_least
from flowalign.estimators.signals import Signal, Stage, State, stage

_NUM_POINTS = 4096  # of a Sobol sequence, for four rewards and more; the error of a volume is near 1 %


def hypervolume(points: Tensor, reference: Tensor, *, top: Tensor | None = None) -> float:
    """Measure the volume that the points dominate above a reference point.

    Exact for up to three rewards. For more it is a quasi-random estimate with 4,096 points, good to about 1 % of the bounding box.

    Args:
        points: ``[points, R]``; those that do not exceed the reference in every reward count nothing.
        reference: ``[R]``.
        top: ``[R]``, upper corner of the box that an estimate draws from, at least every point; None for the points' own. Volumes that are
            compared need the same box, or their difference is the estimate's error.

    Examples:
        >>> hypervolume(torch.tensor([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]), torch.zeros(2))
        6.0
    """
    above = (points - reference).to(torch.float64)
    above = above[(above > 0).all(1)]
    if not len(above):
        return 0.0
    if above.shape[1] == 1:
        return float(above.max())
    if above.shape[1] == 2:
        return _area(above)
    if above.shape[1] > 3:
        top = above.amax(0) if top is None else (top - reference).to(torch.float64)
        draws = torch.quasirandom.SobolEngine(above.shape[1]).draw(_NUM_POINTS, dtype=torch.float64) * top
        return float((draws[:, None] <= above[None]).all(2).any(1).double().mean() * top.prod())
    above = above[torch.argsort(above[:, 2], descending=True)]
    heights = torch.cat([above[:, 2], above.new_zeros(1)])
    return sum(_area(above[: i + 1, :2]) * float(heights[i] - heights[i + 1]) for i in range(len(above)) if heights[i] > heights[i + 1])


def _area(points: Tensor) -> float:
    ordered = points[torch.argsort(points[:, 0], descending=True)]
    height = torch.cummax(ordered[:, 1], 0).values
    rise = torch.diff(height, prepend=height.new_zeros(1))
    return float((ordered[:, 0] * rise).sum())


@stage
def weigh_by_hypervolume(*, reference: float = 0.0, size: int = 64, rewards: Sequence[float] | None = None) -> Stage:
    """Multiply by ``0.5 + 1.5 * tanh(growth)``: steps whose mean rewards push the Pareto front of all steps so far count more.

    The factor is the same for all samples, so a standard deviation after it would undo it. State: the front of the mean rewards.

    Args:
        reference: Rewards up to this count nothing for the volume.
        size: Points of the front that are kept; the oldest go first.
        rewards: Weights of the rewards; those of weight 0 are left out.

    References:
        Lu et al., "Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting", 2025, https://arxiv.org/abs/2509.11452,
        and its released code. Deviation: that code multiplies the reward before a standard deviation, which cancels it.
    """
    at_least("size", size, 1)

    def apply(signal: Signal, batch: RewardBatch, state: State) -> tuple[Signal, State]:
        used = choose_weights(rewards, batch.rewards.shape[1]) != 0
        mean = torch.nanmean(batch.rewards[:, used], 0, keepdim=True)
        front = state["front"]
        if not bool(torch.isfinite(mean).all()):  # a reward that nobody got
            return signal, state
        front = front if front.shape[1] == mean.shape[1] else mean[:0]
        point = torch.full((mean.shape[1],), reference, dtype=torch.float64)
        joined = torch.cat([front, mean])
        top = joined.amax(0)
        growth = max(hypervolume(joined, point, top=top) - hypervolume(front, point, top=top), 0.0)
        factor = 0.5 + 1.5 * math.tanh(growth)
        kept = joined[~_dominated(joined)][-size:]
        return replace(signal, x=signal.x * factor).note(meta_reward=factor), {"front": kept}

    signature = Signature(phase="reward | centred | scaled | calibrated", adds="common")
    init: Callable[[], State] = lambda: {"front": torch.zeros(0, 0, dtype=torch.float64)}  # noqa: E731
    return Stage(signature=signature, apply=apply, init=init)


def _dominated(points: Tensor) -> Tensor:
    """Tell which points another one dominates; of equal points the last counts."""
    no_worse = (points[None] >= points[:, None]).all(2)
    better = (points[None] > points[:, None]).any(2)
    later = torch.ones(len(points), len(points)).triu(1).bool()
    return (no_worse & (better | later)).any(1)


def reweigh(weights: Tensor, gram: Tensor, *, rate: float, scale: float = 1.0) -> Tensor:
    """Give rewards whose gradients agree with the others more weight: ``softmax(log w + rate * sum_j <g_i, g_j> / scale)``.

    Args:
        weights: ``[R]``, positive.
        gram: ``[R, R]``, inner products of the gradients of the rewards.
        rate: Step size.
        scale: What inner products are divided by.

    Examples:
        >>> gram = torch.tensor([[5.0, 2.0, 0.0], [2.0, 2.0, 0.5], [0.0, 0.5, 1.25]])
        >>> reweigh(torch.tensor([0.4, 0.3, 0.3]), gram, rate=0.1)
        tensor([0.4932, 0.2881, 0.2188])
    """
    return torch.softmax(weights.log() + rate * gram.sum(1) / scale, 0)


@stage
def combine_by_gradients(weights: Sequence[float] | None = None, *, rate: float = 0.1, scale: float = 1.0) -> Stage:
    """Add up the advantages of the rewards with weights that grow where a reward's gradient agrees with the others'.

    The weights sum to the number of rewards. Each step sets those of the next. The inner products of the gradients are those handed in
    by ``observe_gradients``; without them those of the advantages stand in, which is what they would be if the scores of different
    samples were orthogonal and of one size, as independent noise in many dimensions nearly is.

    Args:
        weights: Weights to begin with, one for each reward; None for equal ones. A reward of weight 0 is only logged.
        rate: Step size of the weights.
        scale: What inner products are divided by.

    References:
        Lu et al., "Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting", 2025, https://arxiv.org/abs/2509.11452,
        and its released code. Deviations: the stand-in; weights are used one step later; they sum to the number of rewards, not to 1.
    """
    if not (rate >= 0 and scale > 0):
        raise ValueError(f"combine_by_gradients: got rate {rate} and scale {scale}, needed rate 0 or more and a positive scale")

    def apply(signal: Signal, batch: RewardBatch, state: State) -> tuple[Signal, State]:
        start = choose_weights(weights, signal.x.shape[1])
        used = start > 0
        if bool((start < 0).any()) or not bool(used.any()):
            raise ValueError(f"reward_weights: got {start.tolist()}, needed weights of 0 or more that are not all 0")
        fits = len(state["weights"]) == int(used.sum())
        current = state["weights"] if fits else start[used] / start[used].sum()
        x = signal.x[:, used]
        unknown, filled = torch.isnan(x), torch.nan_to_num(x)
        gram = _gram(state["gram"], used) if len(state["gram"]) else filled.T @ filled / max(len(x), 1)
        total = (filled * current).sum(1, keepdim=True) * len(current)
        total = torch.where(unknown.all(1, keepdim=True), torch.nan, total)
        noted = replace(signal, x=total).note(**{f"weight_{k}": float(w) for k, w in enumerate(current)})
        return noted, {"weights": reweigh(current, gram, rate=rate, scale=scale), "gram": torch.zeros(0, 0, dtype=torch.float64)}

    signature = Signature(rewards="several -> one", phase="centred | scaled | calibrated", drops="rewards")

    def init() -> State:
        return {"weights": torch.zeros(0, dtype=torch.float64), "gram": torch.zeros(0, 0, dtype=torch.float64)}

    return Stage(signature=signature, apply=apply, init=init)


def _gram(measured: Tensor, used: Tensor) -> Tensor:
    """Take the rewards that are used out of a measured matrix of all rewards, or of just those."""
    if len(measured) == len(used):
        return measured[used][:, used]
    if len(measured) == int(used.sum()):
        return measured
    raise ValueError(f"observe_gradients: got a matrix of {len(measured)} rewards, needed {len(used)}")


def observe_gradients(state: Mapping[str, State], gram: Tensor) -> dict[str, Mapping[str, Any]]:
    """Put measured inner products of the rewards' gradients into an estimator's state; the next update uses them once.

    Args:
        state: From ``Estimator.init`` or ``Estimator.update``.
        gram: ``[R, R]``, summed over ranks; of all rewards, or of those whose weight is not 0.

    Raises:
        ValueError: If no stage of the estimator weighs by gradients, or the matrix is not square or not finite.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise ValueError(f"gram: got shape {tuple(gram.shape)}, needed [rewards, rewards]")
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("gram: got entries that are not finite, which would spoil the weights of all later steps")
    if not any("gram" in entry for entry in state.values()):
        raise ValueError("observe_gradients: no stage of this estimator weighs by gradients; use the recipe 'gradient_weights'")
    return {key: {**entry, "gram": gram.detach().cpu().double()} if "gram" in entry else entry for key, entry in state.items()}


STAGES: Sequence[Callable[..., Stage]] = (weigh_by_hypervolume, combine_by_gradients)
"""For ``stages.STAGES``."""
