"""Rollouts: run a plan from noise to data and keep the transitions that are trained, as one flat table."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.core.kernels import Kernel, gaussian_log_prob
from flowalign.core.plan import Plan
from flowalign.core.transitions import Trajectory as Trajectory
from flowalign.core.transitions import Transitions as Transitions

Noise = Callable[[int], Tensor]
Walk = Callable[[Tensor, Tensor, int, int, "Take"], Tensor]
"""What evaluates the model: a loop over a velocity, or a pipeline's own ``__call__``. From states ``[rows, *event]``, for each row which
initial state it descends from (and so its conditioning), the steps ``start`` to ``stop - 1`` and what makes each of them, to the states that
it ends with; these are looked at where they are final (``Take.ends``)."""

Ended = Callable[[Tensor, Tensor], None]
"""Told of final states and their rows of the final table."""


@dataclass(kw_only=True)
class _Run:
    """A rollout that is under way. Branches wait here until the model gets to them; nothing is ever evaluated twice.

    Attributes:
        leaves: Final states of each initial state.
        waiting: From a first step and a kernel, None on the path, to states and the first final states below them.
        finals: Final states with their rows.
        finish: Applied to final states that no walk ends with.
        ended: Told of final states as they come, with their rows of the final table.
    """

    plan: Plan
    sigmas: Tensor
    noise: Noise
    num: int
    start: int
    leaves: int
    finish: Callable[[Tensor], Tensor]
    ended: Ended | None
    waiting: dict[tuple[int, Kernel | None], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    finals: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    kept: list[Transitions] = field(default_factory=list)
    drawn: dict[int, Tensor] = field(default_factory=dict)
    evaluations: int = 0

    def put(self, step: int, kernel: Kernel | None, x: Tensor, leaf: Tensor) -> None:
        """Let a branch wait, or end."""
        if step == self.plan.num_steps:
            self.end(self.finish(x), leaf)
        else:
            self.waiting.setdefault((step, kernel), []).append((x, leaf))

    def end(self, x: Tensor, leaf: Tensor) -> None:
        """Keep final states."""
        self.finals.append((x, leaf))
        if self.ended is not None:
            self.ended(x, leaf)

    def draw(self, index: int, mean: Tensor, std: Tensor, kernel: Kernel, leaf: Tensor) -> Tensor:
        """Draw the states above the given final states."""
        if kernel.is_deterministic:
            return mean
        places = torch.tensor(self.plan.drawn(index, self.start))
        if index not in self.drawn:
            self.drawn[index] = self.noise(index)
            needed = (self.num * len(places), *mean.shape[1:])
            if self.drawn[index].shape != needed:
                raise ValueError(
                    f"noise({index}): got shape {list(self.drawn[index].shape)}, needed {list(needed)}: one row per state, children included"
                )
        rows = leaf // self.leaves * len(places) + torch.searchsorted(places, leaf % self.leaves)
        noise = self.drawn[index]
        return mean + std * noise[rows.to(noise.device)].to(mean.device)

    def branch(
        self, index: int, kernel: Kernel, num: int, x: Tensor, velocity: Tensor, leaf: Tensor, below: int, is_trained: bool
    ) -> tuple[Tensor, Tensor]:
        """Make ``num`` children of each state, each above ``below`` final states; returns them with the first of these."""
        law = kernel(x, velocity, self.sigmas[index], self.sigmas[index + 1])
        children = (leaf[:, None] + below * torch.arange(num)).flatten()
        repeated = [table.repeat_interleave(num, 0) if num > 1 else table for table in (x, velocity, law.mean)]
        x_next = self.draw(index, repeated[2], law.std, kernel, children)
        if is_trained:
            self._keep(index, repeated, x_next, law.std, children, below)
        return x_next, children

    def _keep(self, index: int, parts: list[Tensor], x_next: Tensor, std: Tensor, children: Tensor, below: int) -> None:
        x, velocity, mean = parts
        num, device = len(x), x.device
        # Children of a state lie between its first final state and the next state's: the number of the first names it.
        first = self._first_of_state(index, children)

        def column(value: Tensor) -> Tensor:
            return torch.as_tensor(value).to(device).expand(num)

        self.kept.append(
            Transitions(
                x=x,
                x_next=x_next,
                velocity=velocity,
                mean=mean,
                std=column(std),
                sigma=column(self.sigmas[index]),
                sigma_next=column(self.sigmas[index + 1]),
                step=torch.full((num,), index, dtype=torch.int64, device=device),
                seed=(children // self.leaves).to(device),
                state=(index * self.num * self.leaves + first).to(device),
                sample=children.to(device),
                num_leaves=torch.full((num,), below, dtype=torch.int64, device=device),
                parent=torch.full((num,), -1, dtype=torch.int64, device=device),
            )
        )

    def _first_of_state(self, index: int, children: Tensor) -> Tensor:
        states = torch.tensor(self.plan.states(index, self.start))
        place = torch.searchsorted(states, children % self.leaves, right=True) - 1
        return children // self.leaves * self.leaves + states[place]


@dataclass(kw_only=True)
class Take:
    """Makes the steps of one walk: from a step, the states before it and their velocities to the states after it.

    Attributes:
        run: The rollout.
        leaf: First final state below each state.
        completion: Kernel of children that have left the path; None on the path.
        stop: Where the walk ends.
    """

    run: _Run
    leaf: Tensor
    completion: Kernel | None
    stop: int

    def kernel(self, index: int) -> Kernel:
        """Return the kernel of a step."""
        return self.run.plan.steps[index].kernel if self.completion is None else self.completion

    def is_trained(self, index: int) -> bool:
        """Tell whether trained transitions begin at the states before a step, so that a replay will begin there."""
        return self.completion is None and index in self.run.plan.trained

    @property
    def ends(self) -> bool:
        """Whether the states that the walk ends with are final ones; else they split, or nobody needs them."""
        plan = self.run.plan
        on_path = plan.keeps_path and self.stop == plan.num_steps and plan.steps[-1].num_children == 1
        return self.completion is not None or on_path

    def __call__(self, index: int, x: Tensor, velocity: Tensor) -> Tensor:
        """Make step ``index``; what leaves the path waits, a split ends the walk."""
        self.run.evaluations += len(x)
        if self.completion is not None:
            return self.run.branch(index, self.completion, 1, x, velocity, self.leaf, 1, False)[0]
        plan, step, first = self.run.plan, self.run.plan.steps[index], 0
        if step.fork is not None:
            first = step.fork.num_children
            children, leaves = self.run.branch(index, step.fork.kernel, first, x, velocity, self.leaf, 1, True)
            self.run.put(index + 1, step.fork.completion, children, leaves)
        if index + 1 == plan.path_end and not plan.keeps_path:
            return x
        below, num = plan.leaves_after(index), step.num_children
        x_next, self.leaf = self.run.branch(index, step.kernel, num, x, velocity, self.leaf + first, below, step.is_trained)
        if num == 1:
            return x_next
        self.run.put(index + 1, None, x_next, self.leaf)
        return x


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
    run = _Run(plan=plan, sigmas=sigmas, noise=noise, num=len(x_init), start=start, leaves=leaves, finish=finish, ended=ended)
    run.put(start, None, x_init, leaves * torch.arange(len(x_init)))
    while run.waiting:
        # The path first, then by step: branches that go the same way are evaluated together.
        at, kernel = min(run.waiting, key=lambda key: (key[1] is not None, key[0]))
        parts = run.waiting.pop((at, kernel))
        x, leaf = (torch.cat(column) for column in zip(*parts, strict=True))
        stop = plan.path_stop(at) if kernel is None else plan.num_steps
        for rows in _walks(leaf // leaves, kinds, batch_size):
            take = Take(run=run, leaf=leaf[rows], completion=kernel, stop=stop)
            end = walk(x[rows.to(x.device)], take.leaf // leaves, at, stop, take)
            if take.ends:
                run.end(end, take.leaf)
    ends, order = (torch.cat(column) for column in zip(*run.finals, strict=True))
    return Trajectory(
        x_init=x_init,
        x0=ends[torch.argsort(order).to(ends.device)],
        sigmas=sigmas,
        transitions=Transitions.concatenate(run.kept, x_init),
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
