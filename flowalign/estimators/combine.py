"""Several rewards become one number: before they are compared, or after."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.kinds import Signature
from flowalign.estimators.signals import Signal, Stage, State, pure, stage

_COMPARED = "centred | scaled | calibrated"


def choose_weights(weights: Sequence[float] | None, num: int) -> Tensor:
    """Return one weight for each reward.

    Raises:
        ValueError: If their number is wrong.
    """
    if weights is None:
        return torch.ones(num, dtype=torch.float64)
    if len(weights) != num:
        raise ValueError(f"reward_weights: got {len(weights)} weights for {num} rewards, needed one each")
    return torch.tensor(list(weights), dtype=torch.float64)


def weighted_sum(table: Tensor, weights: Tensor) -> Tensor:
    """Add up the last axis by weight; what has weight 0 is only logged and may be NaN.

    Column by column: a matrix product may round a row differently in a batch of another size.
    """
    total = torch.zeros(table.shape[:-1], dtype=torch.float64)
    for column, weight in enumerate(weights.tolist()):
        if weight != 0:
            total = total.add(table[..., column], alpha=weight)
    return total


@stage
def combine_rewards(weights: Sequence[float] | None = None) -> Stage:
    """Add the rewards up, weighted, before anything is compared.

    A sample that lacks one of its rewards cannot be compared and becomes NaN; counting the missing one as 0 would punish it.

    Args:
        weights: One for each reward; None for 1 each.
    """

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        chosen = choose_weights(weights, signal.x.shape[1])
        return replace(signal, x=weighted_sum(signal.x, chosen)[:, None])

    return pure(Signature(rewards="several -> one", phase="reward", drops="rewards"), apply)


@stage
def combine_advantages(weights: Sequence[float] | None = None, *, missing: Literal["zero", "drop"] = "zero") -> Stage:
    """Add up what the rewards gave after they were compared one by one.

    Args:
        weights: One for each reward; None for 1 each.
        missing: A reward that a sample lacks adds nothing ("zero"), or makes the whole sample unscorable ("drop").
    """

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        return replace(signal, x=_add(signal.x, choose_weights(weights, signal.x.shape[1]), missing))

    return pure(Signature(rewards="several -> one", phase=_COMPARED, drops="rewards"), apply)


@stage
def average_advantages(weights: Sequence[float] | None = None) -> Stage:
    """Average, weighted, what the rewards gave after they were compared one by one; a reward that a sample lacks counts as 0.

    Args:
        weights: One for each reward; None for 1 each.
    """

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        chosen = choose_weights(weights, signal.x.shape[1])
        if not float(chosen.sum()) > 0:
            raise ValueError(f"reward_weights: got {chosen.tolist()}, needed a positive sum to average")
        return replace(signal, x=_add(signal.x, chosen / chosen.sum(), "zero"))

    return pure(Signature(rewards="several -> one", phase=_COMPARED, drops="rewards"), apply)


@stage
def combine_by_shortfall(weights: Sequence[float] | None = None, *, smoothing: float = 0.0) -> Stage:
    """Score each sample by the reward that falls furthest short of its best value so far: ``-max_k w_k (best_k - r_k)``.

    Unlike a weighted sum it reaches the parts of a Pareto front that are not convex. State: the best value of each reward so far.

    Args:
        weights: One for each reward; None for 1 each. Rewards should have similar scales.
        smoothing: Above 0, ``-smoothing * log sum_k exp(w_k (best_k - r_k) / smoothing)`` instead of the maximum.

    References:
        Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", 2024, https://arxiv.org/abs/2402.19078.
        Deviation: the ideal point is the running maximum.
    """
    if smoothing < 0:
        raise ValueError(f"smoothing: got {smoothing}, needed 0 or more")

    def apply(signal: Signal, batch: RewardBatch, state: State) -> tuple[Signal, State]:
        chosen = choose_weights(weights, signal.x.shape[1])
        seen = torch.where(torch.isnan(signal.x), -torch.inf, signal.x)
        best = torch.cat([seen, state["best"].expand(1, -1) if state["best"].numel() else seen[:0]])
        best = best.amax(0, keepdim=True) if len(best) else torch.zeros(1, signal.x.shape[1], dtype=torch.float64)
        shortfall = (chosen * (torch.where(torch.isinf(best), 0.0, best) - signal.x))[:, chosen != 0]
        worst = shortfall.amax(1, keepdim=True) if smoothing == 0 else smoothing * torch.logsumexp(shortfall / smoothing, 1, keepdim=True)
        return replace(signal, x=-worst), {"best": best}

    def init() -> State:
        return {"best": torch.zeros(1, 0, dtype=torch.float64)}

    return Stage(signature=Signature(rewards="several -> one", phase="reward", adds="shaped", drops="rewards"), apply=apply, init=init)


def _add(x: Tensor, weights: Tensor, missing: str) -> Tensor:
    used = weights != 0
    terms = x * weights if bool(used.all()) else x[:, used] * weights[used]
    unknown = torch.isnan(terms)
    if missing == "drop" or not bool(unknown.any()):
        return terms.sum(1, keepdim=True)
    return torch.where(unknown.all(1, keepdim=True), torch.nan, torch.nan_to_num(terms).sum(1, keepdim=True))


STAGES: Sequence[Callable[..., Stage]] = (combine_rewards, combine_advantages, average_advantages, combine_by_shortfall)
"""For ``stages.STAGES``."""
