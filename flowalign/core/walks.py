"""The steps of one walk of a rollout: which children each has is worked out before it begins, so that none of its steps waits for a device."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowalign.core.kernels import Kernel
from flowalign.core.plan import Plan
from flowalign.core.transitions import Transitions

Noise = Callable[[int], Tensor]
Ended = Callable[[Tensor, Tensor], None]
"""Told of final states and their rows of the final table."""


@dataclass(frozen=True, kw_only=True)
class Branch:
    """What is known of the children of a step before their states are.

    Attributes:
        kernel: Makes them.
        num: Children of each state.
        below: Final states below each child.
        leaf: First final state below each child, on the CPU.
        noise: Their draws, on the device of the states; None where the kernel draws nothing.
        is_trained: Whether their transitions are kept.
    """

    kernel: Kernel
    num: int
    below: int
    leaf: Tensor
    noise: Tensor | None
    is_trained: bool


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Transitions of one step of one walk, with what names their rows still on the CPU."""

    index: int
    x: Tensor
    x_next: Tensor
    velocity: Tensor
    mean: Tensor
    std: Tensor
    branch: Branch


@dataclass(kw_only=True)
class Run:
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
    kept: list[Kept] = field(default_factory=list)
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

    def branch(self, index: int, kernel: Kernel, num: int, leaf: Tensor, below: int, is_trained: bool, like: Tensor) -> Branch:
        """Say which ``num`` children, each above ``below`` final states, states above the given final states will have; send their noise."""
        children = (leaf[:, None] + below * torch.arange(num)).flatten()
        noise = None if kernel.is_deterministic else self._draw(index, children, like)
        return Branch(kernel=kernel, num=num, below=below, leaf=children, noise=noise, is_trained=is_trained)

    def _draw(self, index: int, leaf: Tensor, like: Tensor) -> Tensor:
        places = torch.tensor(self.plan.drawn(index, self.start))
        if index not in self.drawn:
            self.drawn[index] = self.noise(index)
            needed = (self.num * len(places), *like.shape[1:])
            if self.drawn[index].shape != needed:
                raise ValueError(
                    f"noise({index}): got shape {list(self.drawn[index].shape)}, needed {list(needed)}: one row per state, children included"
                )
        rows = leaf // self.leaves * len(places) + torch.searchsorted(places, leaf % self.leaves)
        noise = self.drawn[index]
        return _sent(noise[rows.to(noise.device)], like.device)

    def make(self, index: int, branch: Branch, x: Tensor, velocity: Tensor) -> Tensor:
        """Make the children of each state."""
        law = branch.kernel(x, velocity, self.sigmas[index], self.sigmas[index + 1])
        x, velocity, mean = (table.repeat_interleave(branch.num, 0) if branch.num > 1 else table for table in (x, velocity, law.mean))
        x_next = mean if branch.noise is None else mean + law.std * branch.noise
        if branch.is_trained:
            self.kept.append(
                Kept(index=index, x=x, x_next=x_next, velocity=velocity, mean=mean, std=torch.as_tensor(law.std), branch=branch)
            )
        return x_next

    def transitions(self, like: Tensor) -> Transitions:
        """Lay out what was kept; the columns of numbers are made on the CPU and sent once."""
        if not self.kept:
            return Transitions.concatenate((), like)
        num = torch.tensor([len(kept.x) for kept in self.kept])
        step, below = (
            torch.tensor(values).repeat_interleave(num)
            for values in ([kept.index for kept in self.kept], [kept.branch.below for kept in self.kept])
        )
        sample = torch.cat([kept.branch.leaf for kept in self.kept])
        # Children of a state lie between its first final state and the next state's: the number of the first names it.
        first = torch.cat([self._first_of_state(kept.index, kept.branch.leaf) for kept in self.kept])
        grid = step.to(self.sigmas.device)
        columns = {
            "std": torch.cat([kept.std.expand(len(kept.x)) for kept in self.kept]),
            "sigma": self.sigmas[grid],
            "sigma_next": self.sigmas[grid + 1],
            "step": step,
            "seed": sample // self.leaves,
            "state": step * self.num * self.leaves + first,
            "sample": sample,
            "num_leaves": below,
            "parent": torch.full_like(step, -1),
        }
        states = {name: torch.cat([vars(kept)[name] for kept in self.kept]) for name in ("x", "x_next", "velocity", "mean")}
        numbers = {name: value.to(like.device) for name, value in columns.items()}
        return Transitions.concatenate([Transitions(**states, **numbers)], like)

    def _first_of_state(self, index: int, children: Tensor) -> Tensor:
        states = torch.tensor(self.plan.states(index, self.start))
        place = torch.searchsorted(states, children % self.leaves, right=True) - 1
        return children // self.leaves * self.leaves + states[place]


class Take:
    """Makes the steps of one walk: from a step, the states before it and their velocities to the states after it."""

    def __init__(self, run: Run, x: Tensor, leaf: Tensor, *, start: int, stop: int, completion: Kernel | None) -> None:
        """Work the walk out.

        Args:
            run: The rollout.
            x: The states that it begins with.
            leaf: First final state below each of them.
            start: Its first step.
            stop: Where it ends.
            completion: Kernel of children that have left the path; None on the path.
        """
        self.leaf, self.stop, self.completion = leaf, stop, completion
        self._run, self._start = run, start
        self._ahead = [self._look_ahead(index, x) for index in range(start, stop)]

    def _look_ahead(self, index: int, like: Tensor) -> tuple[Branch | None, Branch | None]:
        """Return what forks off at a step, and what goes on."""
        run, plan, step = self._run, self._run.plan, self._run.plan.steps[index]
        if self.completion is not None:
            return None, run.branch(index, self.completion, 1, self.leaf, 1, False, like)
        forked = None if step.fork is None else run.branch(index, step.fork.kernel, step.fork.num_children, self.leaf, 1, True, like)
        if index + 1 == plan.path_end and not plan.keeps_path:
            return forked, None
        leaf = self.leaf if step.fork is None else self.leaf + step.fork.num_children
        path = run.branch(index, step.kernel, step.num_children, leaf, plan.leaves_after(index), step.is_trained, like)
        self.leaf = path.leaf
        return forked, path

    def kernel(self, index: int) -> Kernel:
        """Return the kernel of a step."""
        return self._run.plan.steps[index].kernel if self.completion is None else self.completion

    def is_trained(self, index: int) -> bool:
        """Tell whether trained transitions begin at the states before a step, so that a replay will begin there."""
        return self.completion is None and index in self._run.plan.trained

    @property
    def ends(self) -> bool:
        """Whether the states that the walk ends with are final ones; else they split, or nobody needs them."""
        plan = self._run.plan
        on_path = plan.keeps_path and self.stop == plan.num_steps and plan.steps[-1].num_children == 1
        return self.completion is not None or on_path

    def __call__(self, index: int, x: Tensor, velocity: Tensor) -> Tensor:
        """Make step ``index``; what leaves the path waits, a split ends the walk."""
        run = self._run
        run.evaluations += len(x)
        forked, path = self._ahead[index - self._start]
        if forked is not None:
            fork = run.plan.steps[index].fork
            assert fork is not None
            run.put(index + 1, fork.completion, run.make(index, forked, x, velocity), forked.leaf)
        if path is None:
            return x
        x_next = run.make(index, path, x, velocity)
        if path.num == 1:
            return x_next
        run.put(index + 1, None, x_next, path.leaf)
        return x


def _sent(noise: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; from pinned memory the copy is queued with the work there, and nobody waits for it."""
    if noise.device.type == "cpu" and device.type == "cuda":
        return noise.pin_memory().to(device, non_blocking=True)
    return noise.to(device)
