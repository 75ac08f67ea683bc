"""Diversity of a group, where language models have the entropy of a policy.

A diffusion sampler's transition has a fixed variance, so its entropy does not depend on the weights, and a bonus for it has no gradient. What
can be kept up is how different the samples of a prompt are: ``metric`` holds each sample's novelty, its mean distance to the others of its
group in some feature space, and the diversity of the group is the mean of it. Raising the probability of a sample of more than average
novelty raises the diversity, to first order by ``novelty - diversity``; that is what the stages here use.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.kinds import Signature
from flowalign.estimators.needs import need_column
from flowalign.estimators.options import at_least
from flowalign.estimators.segments import SegmentStats, segment_stats
from flowalign.estimators.signals import Signal, Stage, State, pure, scored_samples, stage

Curve = Literal["inverse", "linear", "exponential"]


def novelty(signal: Signal, batch: RewardBatch, metric: int, stage: str) -> tuple[Tensor, SegmentStats]:
    """Read the samples' novelty and the groups' diversity, its mean over the samples of each group that were scored.

    Raises:
        ValueError: If it is missing or negative.
    """
    values = need_column(batch, "metric", metric, stage)
    if bool((values < 0).any()):
        row = int((values < 0).nonzero()[0])
        raise ValueError(
            f"{stage}: metric[{row}, {metric}] is {values[row].item():g}; novelty is a mean distance and cannot be negative (choose its column)"
        )
    values = torch.where(scored_samples(signal, batch), values, torch.nan)
    return values, segment_stats(values[:, None], batch.group)


def group_novelty(features: Tensor, group_id: Tensor) -> Tensor:
    """Measure each sample's novelty: its mean distance to the other samples of its group.

    Args:
        features: ``[batch, D]``, any features; a distance is the root mean square difference over them.
        group_id: ``[batch]`` int64.

    Returns:
        ``[batch]`` float64, at least 0; NaN for a group of one, which has nothing to differ from.

    Examples:
        >>> group_novelty(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([7, 7, 7]))
        tensor([2.0000, 1.5000, 2.5000], dtype=torch.float64)
    """
    found = torch.full((len(features),), torch.nan, dtype=torch.float64)
    for group in torch.unique(group_id):
        members = (group_id == group).nonzero()[:, 0]
        if len(members) > 1:
            table = features[members].double()
            distance = (table[:, None] - table[None]).square().mean(2).sqrt()
            found[members] = distance.sum(1) / (len(members) - 1)
    return found


def diversity_curve(loss: Tensor, curve: Curve, strength: float) -> Tensor:
    """Map predicted losses of diversity to weights.

    Args:
        loss: Any shape; NaN gets weight 1.
        curve: ``inverse``: 1 / (1 + strength * loss) for losses, 1 for gains. ``linear``: from 1 + strength for the smallest size to
            1 - strength for the largest. ``exponential``: from 1 for size 0 down to 1 - strength for the largest.
        strength: 0 changes nothing.

    Examples:
        >>> diversity_curve(torch.tensor([0.0, 0.5, -1.0]), "linear", 0.2)
        tensor([1.2000, 1.0000, 0.8000])
    """
    known = ~torch.isnan(loss)
    if not bool(known.any()):
        return torch.ones_like(loss)
    size = loss.abs()
    low, high = size[known].min(), size[known].max()
    if curve == "inverse":
        weight = 1 / (1 + strength * loss.clamp(min=0))
    elif curve == "linear":
        weight = 1 + strength - 2 * strength * (size - low) / (high - low).clamp(min=1e-12)
    else:
        rate = -torch.log(torch.tensor(1 - strength, dtype=loss.dtype)) / high.clamp(min=0.02)  # 0.02: STEER's code
        weight = torch.exp(-rate * size).clamp(1 - strength, 1.0)
    return torch.where(known, weight, 1.0)


@stage
def weigh_by_diversity(curve: Curve = "inverse", *, strength: float = 1.0, metric: int = 0) -> Stage:
    """Take weight from samples whose advantage would cost the group diversity.

    The predicted relative change of diversity is ``advantage * (novelty - diversity) / diversity``; a loss is its negative. It is a loss
    when a typical sample is pushed up or a novel one down.

    Args:
        curve: From loss to weight, see ``diversity_curve``.
        strength: Of the curve.
        metric: Column of ``RewardBatch.metric`` with the novelty.
    """
    if strength < 0 or (curve != "inverse" and strength >= 1):
        raise ValueError(f"strength: got {strength}, needed at least 0, and below 1 for linear and exponential curves")

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        values, stats = novelty(signal, batch, metric, "weigh_by_diversity")
        diversity = stats.rows(stats.mean)[:, 0]
        relative = torch.where(diversity > 0, (values - diversity) / torch.where(diversity > 0, diversity, 1.0), 0.0)
        relative = torch.where(torch.isnan(values), torch.nan, relative)
        weight = diversity_curve(-signal.x[:, 0] * relative[signal.sample], curve, strength)
        return replace(signal, weight=signal.weight * weight).note(diversity=float(stats.mean.nanmean()) if len(stats.mean) else 0.0)

    signature = Signature(rows="sample | step", rewards="one", phase="centred | scaled | calibrated", adds="weights")
    return pure(signature, apply, needs=("metric",))


def anneal(step: int, num_steps: int) -> float:
    """Let a coefficient fall over a run: slowly in the first half, fast in the second.

    References:
        Xu et al., "EPO", 2025, as in the released code: .8 + .2 exp(-4 f) up to half of the steps, then .8 exp(-6 (f - 1/2)).
    """
    share = min(1.0, step / num_steps)
    exponent = torch.tensor([-4 * share, -6 * (share - 0.5)], dtype=torch.float64).exp()
    return float(0.8 + 0.2 * exponent[0]) if share <= 0.5 else float(0.8 * exponent[1])


@stage
def keep_diversity_in_band(
    *, low: float = 0.8, high: float = 1.2, strength: float = 0.1, metric: int = 0, anneal_steps: int | None = None
) -> Stage:
    """Reward novelty in groups less diverse than usual, and its absence in groups more diverse than usual.

    Usual is the mean diversity of all groups so far, this step's included. Below the band every sample's reward gets
    ``strength * (novelty - diversity) / usual``, above it the negative, inside nothing: the gradient of the distance from the band.

    Args:
        low: Lower edge of the band, as a share of the usual.
        high: Upper edge.
        strength: Size, in units of the reward.
        metric: Column of ``RewardBatch.metric`` with the novelty.
        anneal_steps: Steps of the run, over which the strength falls (see ``anneal``); None to keep it.
    """
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"band: got {low} to {high}, needed 0 <= low <= 1 <= high")
    at_least("strength", strength, 0.0)
    if anneal_steps is not None:
        at_least("anneal_steps", anneal_steps, 1)

    def apply(signal: Signal, batch: RewardBatch, state: State) -> tuple[Signal, State]:
        values, stats = novelty(signal, batch, metric, "keep_diversity_in_band")
        known = stats.mean[~torch.isnan(stats.mean)]
        groups, total = int(state["groups"]) + len(known), float(state["total"]) + float(known.sum())
        usual = total / groups if groups else 0.0
        size = strength if anneal_steps is None else strength * anneal(int(state["step"]), anneal_steps)
        diversity = stats.rows(stats.mean)[:, 0]
        side = (diversity < low * usual).double() - (diversity > high * usual).double()
        push = size * side * (values - diversity) / usual if usual > 0 else torch.zeros_like(values)
        outside = float((side != 0).double().mean()) if len(side) else 0.0
        shaped = signal.x + torch.nan_to_num(push)[signal.sample, None]
        after = {"step": int(state["step"]) + 1, "groups": groups, "total": total}
        return replace(signal, x=shaped).note(diversity=usual, outside_band=outside), after

    return Stage(
        signature=Signature(rows="sample", rewards="one", phase="reward", adds="shaped"),
        apply=apply,
        init=lambda: {"step": 0, "groups": 0, "total": 0.0},
        needs=("metric",),
    )


STAGES = (weigh_by_diversity, keep_diversity_in_band)
"""For ``stages.STAGES``."""
