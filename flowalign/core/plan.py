"""What a plan is: for each step of a rollout its kernel, how many children it has, what forks off and what is trained."""

from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from flowalign.core.kernels import Euler, Kernel

Compare: TypeAlias = Literal["prompt", "step", "state"]
"""Which final states are compared with each other: all of a prompt, those that left the path at the same step, or those that also share
the initial noise, and so the very state that they left from."""


@dataclass(frozen=True, kw_only=True)
class Fork:
    """Children that leave the path at one step: drawn from one evaluation of its state, trained, and led to the end one by one.

    Attributes:
        kernel: Draws the children; it needs noise.
        num_children: How many.
        completion: Leads each child to the end; the ODE keeps the child's noise the only difference between siblings.
    """

    kernel: Kernel
    num_children: int
    completion: Kernel = field(default_factory=Euler)

    def __post_init__(self) -> None:
        """Refuse children that are none or equal."""
        if self.num_children < 1:
            raise ValueError(f"Fork.num_children: got {self.num_children}, needed at least 1")
        if self.kernel.is_deterministic:
            raise ValueError(
                f"Fork.kernel: got {type(self.kernel).__name__} without noise, whose children would be equal and have no log-prob; "
                "needed FlowSDE, DanceSDE, DDIM or CPS with positive noise"
            )


@dataclass(frozen=True, kw_only=True)
class PlanStep:
    """One step of the path: its kernel, the children of each state, whether its transitions are trained, and what forks off beside it."""

    kernel: Kernel
    num_children: int = 1
    is_trained: bool = False
    fork: Fork | None = None

    def __post_init__(self) -> None:
        """Refuse a step that cannot be trained or taken."""
        if self.num_children < 1:
            raise ValueError(f"num_children: got {self.num_children}, needed at least 1")
        if self.is_trained and self.kernel.is_deterministic:
            raise ValueError(
                f"a step of {type(self.kernel).__name__} cannot be trained: without noise its transition has no log-prob "
                f"(use FlowSDE, DanceSDE, DDIM or CPS with positive noise)"
            )
        if self.num_children > 1 and self.kernel.is_deterministic:
            raise ValueError(
                f"num_children: got {self.num_children} at a step of {type(self.kernel).__name__}, whose children would be equal; "
                f"needed 1, or a kernel with noise"
            )
        if self.is_trained and self.fork is not None and self.fork.kernel != self.kernel:
            raise ValueError("a step trains its path and a fork with another kernel; needed the same kernel, or a path that is not trained")

    @property
    def trained_kernel(self) -> Kernel:
        """The kernel of the step's trained transitions."""
        return self.kernel if self.fork is None else self.fork.kernel


@dataclass(frozen=True)
class Plan:
    """The steps of a rollout, from noise to data.

    Attributes:
        steps: One for each step of the schedule.
        keeps_path: Whether the path's own end is a final state; without it the path stops after the last fork, and only what left it counts.
        compare: Whom a final state is compared with.
    """

    steps: tuple[PlanStep, ...]
    keeps_path: bool = True
    compare: Compare = "prompt"

    def __post_init__(self) -> None:
        """Refuse a plan without steps or without final states."""
        if not self.steps:
            raise ValueError("a plan needs at least one step, got none")
        if not self.keeps_path and not self.has_forks:
            raise ValueError("keeps_path: is False for a plan without forks, which has no final state then; needed True, or a fork")

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        return len(self.steps)

    @property
    def has_forks(self) -> bool:
        """Whether something leaves the path."""
        return any(step.fork is not None for step in self.steps)

    @property
    def has_siblings(self) -> bool:
        """Whether different final states share a beginning beyond the initial noise, or the choice of one."""
        return self.has_forks or any(step.num_children > 1 for step in self.steps)

    @property
    def trained(self) -> tuple[int, ...]:
        """Positions of the steps that have trained transitions."""
        return tuple(i for i, step in enumerate(self.steps) if step.is_trained or step.fork is not None)

    @property
    def num_leaves(self) -> int:
        """Final states per initial state."""
        return self.leaves_after(-1)

    @property
    def evaluations(self) -> int:
        """Model evaluations per initial state in the rollout; a common prefix is evaluated once."""
        states, total = 1, 0
        for i, step in enumerate(self.steps):
            total += states * (i < self.path_end)
            if step.fork is not None:
                total += states * step.fork.num_children * (self.num_steps - 1 - i)
            states *= step.num_children
        return total

    @property
    def training_evaluations(self) -> int:
        """Model evaluations per initial state in one pass over the trained transitions: one for each state, whatever leaves it."""
        states, total = 1, 0
        for step in self.steps:
            total += states * (step.is_trained or step.fork is not None)
            states *= step.num_children
        return total

    @property
    def path_end(self) -> int:
        """Number of steps that the path takes."""
        if self.keeps_path:
            return self.num_steps
        return 1 + max(i for i, step in enumerate(self.steps) if step.fork is not None)

    def leaves_after(self, index: int) -> int:
        """Return how many final states descend from one state of the path that step ``index`` produced."""
        leaves = int(self.keeps_path)
        for step in reversed(self.steps[index + 1 :]):
            leaves = leaves * step.num_children + (step.fork.num_children if step.fork is not None else 0)
        return leaves

    def path_stop(self, start: int) -> int:
        """Return how far the path runs from step ``start`` before it splits or ends."""
        split = (i + 1 for i in range(start, self.path_end) if self.steps[i].num_children > 1)
        return min((*split, self.path_end))

    def states(self, index: int, start: int = 0) -> tuple[int, ...]:
        """List the first final states below each state of the path before step ``index``, of one initial state at step ``start``."""
        path = [0] if start < self.path_end else []
        for i in range(start, index):
            path = self._next_leaves(path, i) if i + 1 < self.path_end else []
        return tuple(path)

    def drawn(self, index: int, start: int = 0) -> tuple[int, ...]:
        """List the first final states below each state that step ``index`` draws noise for, of one initial state at step ``start``."""
        found = [leaf for i in range(start, index) for leaf in self._children(i, start) if not self._completion_is_ode(i)]
        found += self._children(index, start)
        # A path that is not kept has no use for the state after its last fork.
        goes_on = self.keeps_path or index + 1 < self.path_end
        if goes_on and not self.steps[index].kernel.is_deterministic:
            found += self._next_leaves(list(self.states(index, start)), index)
        return tuple(sorted(found))

    def _children(self, index: int, start: int) -> list[int]:
        fork = self.steps[index].fork
        return [leaf + child for leaf in self.states(index, start) for child in range(fork.num_children)] if fork is not None else []

    def _completion_is_ode(self, index: int) -> bool:
        fork = self.steps[index].fork
        return fork is None or fork.completion.is_deterministic

    def forked_at(self) -> tuple[int, ...]:
        """Return for each final state of one initial state the step at which it left the path; -1 where it is the path's own end."""
        return self._forked_from(0)

    def _forked_from(self, index: int) -> tuple[int, ...]:
        if index == self.num_steps:
            return (-1,) * self.keeps_path
        step = self.steps[index]
        return (index,) * (step.fork.num_children if step.fork else 0) + self._forked_from(index + 1) * step.num_children

    def _next_leaves(self, path: list[int], index: int) -> list[int]:
        """Step along the path: the first final states below its states; those that fork off come before."""
        step, below = self.steps[index], self.leaves_after(index)
        first = step.fork.num_children if step.fork is not None else 0
        return [leaf + first + child * below for leaf in path for child in range(step.num_children)]

    def without_training(self) -> "Plan":
        """Return the same sampler with no transition kept; what forks off has no use then and is refused.

        Raises:
            ValueError: If the plan forks.
        """
        if self.has_forks:
            raise ValueError("without_training: the plan forks, and its children are only there to be trained; use chain or ode")
        return replace(self, steps=tuple(replace(step, is_trained=False) for step in self.steps))

    def check(self, num_steps: int) -> None:
        """Raise unless the plan has as many steps as the schedule.

        Raises:
            ValueError: If the numbers differ.
        """
        if self.num_steps != num_steps:
            raise ValueError(f"plan: has {self.num_steps} steps, but the schedule has {num_steps}; build both with the same num_steps")
