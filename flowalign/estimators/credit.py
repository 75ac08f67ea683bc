"""Which step of a sample gets which part of its advantage."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.combine import choose_weights, weighted_sum
from flowalign.estimators.kinds import FACTORS, Signature
from flowalign.estimators.links import LARGEST_LOG_RATIO, link
from flowalign.estimators.needs import need
from flowalign.estimators.options import at_least, inside
from flowalign.estimators.segmentation import segment_key
from flowalign.estimators.segments import RTOL, segment_stats
from flowalign.estimators.signals import Signal, Stage, pure, stage

_COMPARED_STEPS = Signature(rows="sample -> step", rewards="several -> one", phase="reward -> centred", refuses=f"{FACTORS} | shaped")


@stage
def broadcast_steps() -> Stage:
    """Give every trained step of a sample the sample's advantage."""

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        steps = batch.num_steps
        spread = {
            name: _spread(value, steps)
            for name, value in (
                ("x", signal.x),
                ("raw", signal.raw),
                ("sample", signal.sample),
                ("weight", signal.weight),
                ("target", signal.target),
            )
            if value is not None
        }
        step = torch.arange(steps).expand(len(signal.sample), -1).reshape(-1)
        return replace(signal, **spread, step=step)  # type: ignore[arg-type]

    return replace(pure(Signature(rows="sample -> step", rewards="one"), apply), spreads=True)


def _spread(value: Tensor, steps: int) -> Tensor:
    """Repeat each row; several times faster than ``repeat_interleave``."""
    return value[:, None].expand(-1, steps, *value.shape[1:]).reshape(-1, *value.shape[1:])


def trained_steps(batch: RewardBatch) -> tuple[Tensor, Tensor]:
    """List sample and step of every trained step, ordered by sample, then step."""
    num, steps = len(batch.rewards), batch.num_steps
    sample, step = _spread(torch.arange(num), steps), torch.arange(steps).expand(num, -1).reshape(-1)
    if batch.step_mask is None:
        return sample, step
    trained = batch.step_mask.flatten().nonzero()[:, 0]
    return sample[trained], step[trained]


def to_steps(signal: Signal, batch: RewardBatch, table: Tensor) -> Signal:
    """Make rows of the trained steps from a table ``[batch, T, ...]``."""
    sample, step = trained_steps(batch)
    x = table.flatten(0, 1) if len(sample) == table.shape[0] * table.shape[1] else table[sample, step]
    target = None if signal.target is None else signal.target[sample]
    return replace(signal, x=x, sample=sample, step=step, weight=signal.weight[sample], target=target, raw=None)


def _combined(table: Tensor, weights: Sequence[float] | None) -> Tensor:
    """Add up the last axis as ``combine_rewards`` does; a reward of weight 0 is not looked at."""
    return weighted_sum(table, choose_weights(weights, table.shape[-1]))


@stage
def take_step_rewards() -> Stage:
    """Go on with the rewards of the trained steps instead of those of the samples."""

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        return to_steps(signal, batch, need(batch, "step_rewards", "take_step_rewards"))

    return pure(
        Signature(rows="sample -> step", rewards="several", phase="reward", refuses=f"{FACTORS} | shaped"),
        apply,
        needs=("step_rewards", "step_judge"),
    )


@stage
def link_steps(divergence: str = "reverse_kl", *, beta: float = 1.0, alpha: float = 0.5) -> Stage:
    """Turn log ratios of the steps, log teacher - log policy, into rewards: ``-beta f'(u)`` with ``u = policy / teacher``.

    With ``reverse_kl`` that is beta times the log ratio, less a constant: what a teacher's preference for a transition is worth.
    Log ratios are clamped to +-30.

    Args:
        divergence: Which ``f'``, see ``links.link``.
        beta: Size of the rewards.
        alpha: Of the alpha-divergence.

    References:
        ADPA (advantage distillation of a preference-aligned teacher), for ``reverse_kl``; f-DPG, https://arxiv.org/abs/2302.08215, for the others.
    """
    link(divergence, torch.zeros(1), alpha=alpha)  # refuse a wrong name when the chain is built

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        # Log ratios summed over a latent may be hundreds, whose exp would overflow.
        return replace(signal, x=-beta * link(divergence, -signal.x.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO), alpha=alpha))

    return pure(Signature(rows="step", phase="reward", adds="shaped"), apply)


@stage
def reward_to_go(*, discount: float = 1.0, divide: Literal["none", "remaining"] = "none") -> Stage:
    """Give every step the sum of what its own and all later trained steps got.

    Args:
        discount: Factor per trained step.
        divide: By the number of steps that are summed, so that early steps do not weigh more.
    """
    if not 0 <= discount <= 1:
        raise ValueError(f"discount: got {discount}, needed a factor in [0, 1]")

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        num, steps, width = len(batch.rewards), batch.num_steps, signal.x.shape[1]
        place = signal.sample * steps + signal.step
        table = torch.zeros(num * steps, width, dtype=torch.float64).index_copy(0, place, signal.x).view(num, steps, width)
        there = torch.zeros(num * steps, dtype=torch.float64).index_fill(0, place, 1.0).view(num, steps)
        if batch.step_mask is not None:  # rows may have been spread over steps that are not trained
            there = there * batch.step_mask
            table = torch.where(there[..., None] > 0, table, 0.0)
        returns = _returns(table, there, discount).view(-1, width).index_select(0, place)
        if divide == "remaining":
            returns = returns / there.flip(1).cumsum(1).flip(1).clamp(min=1).view(-1, 1).index_select(0, place)
        return replace(signal, x=returns, raw=None)

    return pure(Signature(rows="step"), apply)


def _returns(table: Tensor, there: Tensor, discount: float) -> Tensor:
    """Sum ``[batch, T, R]`` from the back; steps that are not there neither count nor discount."""
    if discount == 1:
        return table.flip(1).cumsum(1).flip(1)
    later, returns = torch.zeros_like(table[:, 0]), torch.empty_like(table)
    for step in range(table.shape[1] - 1, -1, -1):
        later = torch.where(there[:, step, None] > 0, table[:, step] + discount * later, later)
        returns[:, step] = later
    return returns


@stage
def two_level_anchors(reward_weights: Sequence[float] | None = None, *, weight: float = 1.0, discount: float = 0.95) -> Stage:
    """Add to each sample's comparison within its group a comparison of its steps with those that start from the same state.

    A step is compared by what followed: the discounted sum of ``step_rewards`` from it on, or, if the batch has none, the discounted final
    reward. A state that occurs once carries no comparison and adds 0.

    Args:
        reward_weights: One for each reward; None for 1 each.
        weight: Of the comparison between steps.
        discount: Factor per trained step.
    """
    at_least("weight", weight, 0.0)
    inside("discount", discount, 0.0, 1.0)

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        need(batch, "anchor_id", "two_level_anchors")
        final = _combined(signal.x, reward_weights)
        there = torch.ones(len(final), batch.num_steps) if batch.step_mask is None else batch.step_mask
        if batch.step_rewards is None:
            later = there.double().flip(1).cumsum(1).flip(1) - 1
            returns = final[:, None] * torch.tensor(discount, dtype=torch.float64) ** later
        else:
            rewards = _combined(batch.step_rewards, reward_weights)
            returns = _returns(torch.where(there > 0, rewards, 0.0)[..., None], there.double(), discount)[..., 0]
        rows = to_steps(signal, batch, returns[..., None])
        episode = _centred(final[:, None], batch.group)[rows.sample]
        return replace(rows, x=episode + weight * _centred(rows.x, segment_key(rows, batch, "anchor")))

    return pure(_COMPARED_STEPS, apply, needs=("anchor_id",))


def _centred(x: Tensor, key: Tensor) -> Tensor:
    """Subtract the mean of the segment; flat segments and segments of one give 0."""
    stats = segment_stats(x, key)
    return torch.where(stats.rows(stats.is_flat) & ~torch.isnan(x), 0.0, x - stats.rows(stats.mean))


def state_values(signal: Signal, batch: RewardBatch, weights: Sequence[float] | None, stage: str) -> Tensor:
    """Lay out ``[batch, T + 1]``: the values of the states that the steps start from, then the final reward.

    An untrained step is deterministic, so the state before it is worth what the state after it is worth.
    """
    final = _combined(signal.x, weights)
    values = torch.cat([_combined(need(batch, "step_rewards", stage), weights), final[:, None]], 1)
    if batch.step_mask is not None:
        for step in range(batch.num_steps - 1, -1, -1):
            unknown = torch.isnan(values[:, step]) & ~batch.step_mask[:, step]
            values[:, step] = torch.where(unknown, values[:, step + 1], values[:, step])
    return values


def change(before: Tensor, after: Tensor) -> Tensor:
    """Subtract; what differs by rounding only is 0, because signs and std are taken of it."""
    same = (after - before).abs() <= RTOL * torch.maximum(after.abs(), before.abs())
    return torch.where(same, 0.0, after - before)


@stage
def chain_differences(reward_weights: Sequence[float] | None = None) -> Stage:
    """Give every step what it changed: the value of the state after it minus that of the state before it.

    ``step_rewards`` holds the values of the states that the steps start from; the last step leads to the final reward. Where a value is NaN,
    the segment between the known ones is credited as a whole: each of its steps gets the difference over the segment.

    Args:
        reward_weights: One for each reward; None for 1 each.
    """

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        values = state_values(signal, batch, reward_weights, "chain_differences")
        before, after = values[:, :-1].clone(), values[:, 1:].clone()
        for step in range(1, batch.num_steps) if bool(torch.isnan(values.sum())) else ():
            before[:, step] = torch.where(torch.isnan(before[:, step]), before[:, step - 1], before[:, step])
            back = batch.num_steps - 1 - step
            after[:, back] = torch.where(torch.isnan(after[:, back]), after[:, back + 1], after[:, back])
        return to_steps(signal, batch, change(before, after)[..., None])

    return pure(_COMPARED_STEPS, apply, needs=("step_rewards",))


@stage
def subtract_critic(reward_weights: Sequence[float] | None = None) -> Stage:
    """Give every step the final reward minus a critic's value of the state that the step starts from (``step_rewards``).

    Args:
        reward_weights: One for each reward; None for 1 each.
    """

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        values = state_values(signal, batch, reward_weights, "subtract_critic")
        return to_steps(signal, batch, change(values[:, :-1], values[:, -1:].expand(-1, batch.num_steps))[..., None])

    return pure(_COMPARED_STEPS, apply, needs=("step_rewards",))


STAGES = (broadcast_steps, take_step_rewards, link_steps, reward_to_go, two_level_anchors, chain_differences, subtract_critic)
"""For ``stages.STAGES``."""
