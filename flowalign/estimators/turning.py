"""Turning points: the steps at which a sample's course turned towards what became of it."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.credit import change, state_values, to_steps
from flowalign.estimators.kinds import FACTORS, Signature
from flowalign.estimators.signals import Signal, Stage, pure, stage

Points = Literal["constrained", "all"]
Form = Literal["replace", "bonus"]
Balance = Literal["batch", "none"]


def find_turning_points(values: Tensor, points: Points = "constrained", trained: Tensor | None = None) -> Tensor:
    """Find the steps that go the way of the whole when the step before went against it.

    Args:
        values: ``[batch, T + 1]``, the values of the states that the steps start from, then the final reward.
        points: ``all``, or only those after which the rest of the way goes in the same direction.
        trained: ``[batch, T]`` bool, the steps that count; None for all. The others are deterministic and change nothing.

    Returns:
        ``[batch, T]`` bool. The first step turns if it goes the way of the whole. NaN is no turning point.

    Examples:
        >>> find_turning_points(torch.tensor([[0.4, 0.35, 0.5, 0.45, 0.6]]), "all").tolist()
        [[False, True, False, True]]
    """
    step = torch.sign(change(values[:, :-1], values[:, 1:]))
    along = step * torch.sign(change(values[:, :1], values[:, -1:]))
    before = torch.cat([torch.full_like(along[:, :1], -1.0), along[:, :-1]], 1)  # nothing comes before the first step
    if trained is not None:
        for at in range(1, along.shape[1]):
            before[:, at] = torch.where(trained[:, at - 1], along[:, at - 1], before[:, at - 1])
    found = (before < 0) & (along > 0) if trained is None else (before < 0) & (along > 0) & trained
    if points == "all":
        return found
    return found & (step * torch.sign(change(values[:, 1:], values[:, -1:].expand_as(step))) > 0)


def balance_turning_points(found: Tensor, total: Tensor) -> Tensor:
    """Keep as many turning points of samples that gained as of samples that lost: those with the largest change over the whole.

    Args:
        found: ``[batch, T]`` bool.
        total: ``[batch]``, change from the first state to the final reward.

    Returns:
        The turning points that stay. Ties go to the earlier sample, then to the earlier step.
    """
    sign = torch.sign(total)[:, None].expand(found.shape)
    size = total.abs()[:, None].expand(found.shape)
    num = min(int((found & (sign > 0)).sum()), int((found & (sign < 0)).sum()))
    kept = torch.zeros_like(found).flatten()
    for side in (1, -1):
        place = (found & (sign == side)).flatten().nonzero()[:, 0]
        largest = torch.argsort(size.flatten()[place], descending=True, stable=True)[:num]
        kept[place[largest]] = True
    return kept.view_as(found)


@stage
def turning_points(
    reward_weights: Sequence[float] | None = None,
    *,
    points: Points = "constrained",
    form: Form = "replace",
    balance: Balance = "none",
    bonus: float = 1.0,
) -> Stage:
    """Reward each step by what it changed, and turning points by all that followed from them.

    ``step_rewards`` holds the values of the states that the steps start from: the reward of the deterministic completion.

    Args:
        reward_weights: One for each reward; None for 1 each.
        points: Which turning points count, see ``find_turning_points``.
        form: ``replace``: a turning point gets the final reward minus the value before it, every other step its own change.
            ``bonus``: every step gets the change over the whole, turning points their own change on top.
        balance: ``batch``: as many turning points of gains as of losses, see ``balance_turning_points``.
        bonus: Factor of the bonus.
    """

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        values = state_values(signal, batch, reward_weights, "turning_points")
        step, total = change(values[:, :-1], values[:, 1:]), change(values[:, :1], values[:, -1:])
        found = find_turning_points(values, points, batch.step_mask)
        if balance == "batch":
            found = balance_turning_points(found, total[:, 0])
        if form == "replace":
            x = torch.where(found, change(values[:, :-1], values[:, -1:].expand_as(step)), step)
        else:
            x = total + bonus * torch.where(found, step, 0.0)
        share = float(found.double().mean()) if found.numel() else 0.0
        return to_steps(signal, batch, x[..., None]).note(turning_points=share)

    signature = Signature(rows="sample -> step", rewards="several -> one", phase="reward", refuses=f"{FACTORS} | shaped")
    return pure(signature, apply, needs=("step_rewards",))


STAGES = (turning_points,)
"""For ``stages.STAGES``."""
