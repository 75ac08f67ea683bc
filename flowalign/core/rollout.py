"""Rollouts: run a plan from noise to data and keep the transitions that are trained, as one flat table."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.core.kernels import gaussian_log_prob
from flowalign.core.plan import Plan
from flowalign.core.transitions import Trajectory as Trajectory
from flowalign.core.transitions import Transitions as Transitions
from flowalign.core.walks import Ended as Ended
from flowalign.core.walks import Noise as Noise
from flowalign.core.walks import Run
from flowalign.core.walks import Take as Take

Walk = Callable[[Tensor, Tensor, int, int, "Take"], Tensor]
"""What evaluates the model: a loop over a velocity, or a pipeline's own ``__call__``. From states ``[rows, *event]``, for each row which
initial state it descends from (and so its conditioning), the steps ``start`` to ``stop - 1`` and what makes each of them, to the states that
it ends with; these are looked at where they are final (``Take.ends``)."""


def explore(
    walk: Walk,
    x_init: Tensor,
    sigmas: Tensor,
    plan: Plan,
    noise: Noise,
    *,
    start: int = 0,
    batch_size: int | None = None,
    kinds: Tensor | None = None,
    finish: Callable[[Tensor], Tensor] = lambda x: x,
    ended: Ended | None = None,
) -> Trajectory:
    """Run a plan with whatever evaluates the model; every common beginning is evaluated once.

    Args:
        walk: Evaluates the model.
        x_init: State at ``sigmas[start]``, ``[batch, *event]``.
        sigmas: Grid of the whole schedule, ``[steps + 1]``, decreasing.
        plan: One step for each of the schedule.
        noise: Standard normal draws for a step, ``[batch * len(plan.drawn(step, start)), *event]``; asked once where something is drawn.
        start: Begin in the middle of the schedule.
        batch_size: States of one walk; None for all.
        kinds: A number for each initial state, on the CPU: what descends from states of different numbers is never in one walk. None for one number.
        finish: From a state at the end of the grid to what walks return there.
        ended: Called with final states as they come and their rows of ``x0``: what follows a rollout may begin before it is over.

    Returns:
        The trajectory, final states in order.

    Raises:
        ValueError: If plan and grid have different lengths, the grid does not decrease, or the noise has another shape than the states.
    """
    plan.check(len(sigmas) - 1)
    if not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError("sigmas: got a grid that does not decrease at every step, needed 1 (noise) to 0 (data); flip an increasing one")
    if not 0 <= start < plan.path_end:
        raise ValueError(f"start: got {start}, needed a step in [0, {plan.path_end})")
    leaves = plan.leaves_after(start - 1)
    run = Run(plan=plan, sigmas=sigmas, noise=noise, num=len(x_init), start=start, leaves=leaves, finish=finish, ended=ended)
    run.put(start, None, x_init, leaves * torch.arange(len(x_init)))
    while run.waiting:
        # The path first, then by step: branches that go the same way are evaluated together.
        at, kernel = min(run.waiting, key=lambda key: (key[1] is not None, key[0]))
        parts = run.waiting.pop((at, kernel))
        x, leaf = (torch.cat(column) for column in zip(*parts, strict=True))
        stop = plan.path_stop(at) if kernel is None else plan.num_steps
        for rows in _walks(leaf // leaves, kinds, batch_size):
            states = x[rows.to(x.device)]
            take = Take(run, states, leaf[rows], start=at, stop=stop, completion=kernel)
            end = walk(states, leaf[rows] // leaves, at, stop, take)
            if take.ends:
                run.end(end, take.leaf)
    ends, order = (torch.cat(column) for column in zip(*run.finals, strict=True))
    return Trajectory(
        x_init=x_init,
        x0=ends[torch.argsort(order).to(ends.device)],
        sigmas=sigmas,
        transitions=run.transitions(x_init),
        num_leaves=leaves,
        evaluations=run.evaluations,
    )


def _walks(seed: Tensor, kinds: Tensor | None, batch_size: int | None) -> Iterator[Tensor]:
    """Share states, told by their initial ones, out among walks."""
    groups = [torch.arange(len(seed))] if kinds is None else [(kinds[seed] == kind).nonzero().squeeze(1) for kind in kinds[seed].unique()]
    for group in groups:
        yield from group.split(batch_size or max(1, len(group)))


def rollout(
    velocity: Callable[[Tensor, Tensor], Tensor], x_init: Tensor, sigmas: Tensor, plan: Plan, noise: Noise, *, start: int = 0
) -> Trajectory:
    """Run a plan with a velocity function; the pipelines return the same type.

    Args:
        velocity: From ``x [batch, *event]`` and a 0-dim ``sigma`` to the velocity.
        x_init: State at ``sigmas[start]``, ``[batch, *event]``.
        sigmas: Grid, ``[steps + 1]``, decreasing.
        plan: One kernel for each step. Where it forks, the children share the evaluation of their parent.
        noise: Standard normal draws for a step, one row per state after it; only called where the kernel has noise.
        start: Complete states from the middle of a schedule.

    Returns:
        The trajectory.

    Raises:
        ValueError: If plan and grid have different lengths, the grid does not decrease, or the noise has another shape than the states.

    Examples:
        >>> from flowalign.core.plans import ode
        >>> x = torch.ones(2, 3)
        >>> done = rollout(lambda x, sigma: x, x, torch.tensor([1.0, 0.5, 0.0]), ode(2), lambda step: x)
        >>> done.x0[0].tolist()
        [0.25, 0.25, 0.25]
    """

    def walk(x: Tensor, seed: Tensor, start: int, stop: int, take: Take) -> Tensor:
        for i in range(start, stop):
            x = take(i, x, velocity(x, sigmas[i]))
        return x

    return explore(walk, x_init, sigmas, plan, noise, start=start)


def replay(velocity: Callable[[Tensor, Tensor], Tensor], transitions: Transitions, plan: Plan) -> Float[Tensor, " rows"]:
    """Score recorded transitions under the same model, or a later one, as the rollout would have.

    The rows of a step are evaluated together with a 0-dim ``sigma``. If they are all the rows that the rollout evaluated together and the
    model has not changed, the result equals ``transitions.mean_log_prob()`` to the last bit: the ratio is one before the first update.

    Args:
        velocity: From ``x [rows, *event]`` and a 0-dim ``sigma`` to the velocity; gradient flows through it.
        transitions: Rows in any order.
        plan: The plan that recorded them.

    Returns:
        Log density per latent element, in the order of the rows.

    Raises:
        ValueError: If a row's step is not a noisy step of the plan.
    """
    found = torch.zeros_like(transitions.sigma)
    for i in sorted(set(transitions.step.tolist())):
        if not 0 <= i < plan.num_steps:
            raise ValueError(f"replay: a row is of step {i}, but the plan has {plan.num_steps} steps; pass the plan of the rollout")
        chosen = (transitions.step == i).nonzero().squeeze(1)
        rows = transitions.take(chosen)
        kernel = plan.steps[i].trained_kernel
        law = kernel(rows.x, velocity(rows.x, rows.sigma[0]), rows.sigma[0], rows.sigma_next[0])
        score = gaussian_log_prob(rows.x_next, law.mean, law.std, reduction="mean")
        found = found.to(score.dtype).index_put((chosen,), score)
    return found
