"""Plans: for each step of a rollout its kernel, how many children it forks and whether it is trained."""

import math
from dataclasses import dataclass, replace

from flowalign.core.kernels import Euler, Kernel


@dataclass(frozen=True, kw_only=True)
class PlanStep:
    """One step: the kernel that is applied, the children of each state, and whether its transitions are kept for training."""

    kernel: Kernel
    num_children: int = 1
    is_trained: bool = False

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


@dataclass(frozen=True)
class Plan:
    """The steps of a rollout, from noise to data."""

    steps: tuple[PlanStep, ...]

    def __post_init__(self) -> None:
        """Refuse an empty plan."""
        if not self.steps:
            raise ValueError("a plan needs at least one step, got none")

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        return len(self.steps)

    @property
    def trained(self) -> tuple[int, ...]:
        """Positions of the trained steps."""
        return tuple(i for i, step in enumerate(self.steps) if step.is_trained)

    @property
    def num_leaves(self) -> int:
        """Final states per initial state."""
        return self.leaves_after(-1)

    @property
    def evaluations(self) -> int:
        """Model evaluations per initial state in the rollout; a common prefix is evaluated once."""
        return sum(self.num_leaves // self.leaves_after(i - 1) for i in range(self.num_steps))

    def leaves_after(self, index: int) -> int:
        """Return how many final states descend from one state that step ``index`` produced."""
        return math.prod(step.num_children for step in self.steps[index + 1 :])

    def without_training(self) -> "Plan":
        """Return the same sampler with no transition kept."""
        return Plan(tuple(replace(step, is_trained=False) for step in self.steps))

    def check(self, num_steps: int) -> None:
        """Raise unless the plan has as many steps as the schedule.

        Raises:
            ValueError: If the numbers differ.
        """
        if self.num_steps != num_steps:
            raise ValueError(f"plan: has {self.num_steps} steps, but the schedule has {num_steps}; build both with the same num_steps")


def chain(kernel: Kernel, num_steps: int, *, train_last: bool = False) -> Plan:
    """Apply one kernel at every step; train every noisy step, the last one only on request.

    The last step ends at ``sigma = 0``, where its noise is all but gone and its gradient is mostly noise (spec oracle: a standard
    deviation of 0.315 around a signal of 0.011 in the linear-Gaussian chain).

    Args:
        kernel: Kernel of every step.
        num_steps: Number of steps.
        train_last: Train the last step too.

    Returns:
        The plan; model evaluations per sample: ``num_steps`` in the rollout and ``len(plan.trained)`` in training.

    Raises:
        ValueError: If ``num_steps`` is not positive.

    Examples:
        >>> from flowalign.core.kernels import FlowSDE
        >>> chain(FlowSDE(0.7), 4).trained
        (0, 1, 2)
    """
    noisy = not kernel.is_deterministic
    return Plan(tuple(PlanStep(kernel=kernel, is_trained=noisy and (train_last or i < num_steps - 1)) for i in range(num_steps)))


def window(kernel: Kernel, num_steps: int, *, start: int, size: int) -> Plan:
    """Apply and train one noisy kernel in a window of steps, and follow the ODE outside.

    Args:
        kernel: Kernel of the window.
        num_steps: Number of steps of the whole plan.
        start: First step of the window.
        size: Number of steps in it.

    Returns:
        The plan.

    Raises:
        ValueError: If the window does not lie inside the plan, or the kernel has no noise.

    References:
        Li et al., "MixGRPO", 2025, https://arxiv.org/abs/2507.21802; Flow-GRPO-Fast.
        Deviation: a window that would leave the schedule is refused; MixGRPO's released scheduler lets it shrink, at last to nothing.

    Examples:
        >>> from flowalign.core.kernels import FlowSDE
        >>> window(FlowSDE(0.7), 10, start=2, size=3).trained
        (2, 3, 4)
    """
    if start < 0 or size < 1 or start + size > num_steps:
        raise ValueError(f"window: got start {start} and size {size} for {num_steps} steps, needed 0 <= start < start + size <= num_steps")
    inside, outside = PlanStep(kernel=kernel, is_trained=True), PlanStep(kernel=Euler())
    return Plan(tuple(inside if start <= i < start + size else outside for i in range(num_steps)))


def ode(num_steps: int) -> Plan:
    """Sample by the probability-flow ODE; nothing is trained."""
    return chain(Euler(), num_steps)
