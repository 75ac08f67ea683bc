"""Plans by name: chain, window, fork and tree, and where a window lies."""

from collections.abc import Collection

from flowalign.core.kernels import CPS, DDIM, Euler, Kernel
from flowalign.core.plan import Compare as Compare
from flowalign.core.plan import Fork as Fork
from flowalign.core.plan import Plan as Plan
from flowalign.core.plan import PlanStep as PlanStep


def chain(kernel: Kernel, num_steps: int, *, train_last: bool = False, trained: Collection[int] | None = None) -> Plan:
    """Apply one kernel at every step; train every noisy step, the last one only on request, or some of them.

    The last step ends at ``sigma = 0``, where its noise is all but gone and its gradient is mostly noise (spec oracle: a standard
    deviation of 0.315 around a signal of 0.011 in the linear-Gaussian chain).

    Args:
        kernel: Kernel of every step.
        num_steps: Number of steps.
        train_last: Train the last step too.
        trained: The steps that are trained; None for all that may be.

    Returns:
        The plan; model evaluations per sample: ``num_steps`` in the rollout, and in training ``num_steps - 1``, ``num_steps`` with ``train_last``, or the
        number of ``trained``; none without noise.

    Raises:
        ValueError: If ``num_steps`` is not positive, a step that is to be trained is none of those that may be, or the last one has no noise.

    Examples:
        >>> from flowalign.core.kernels import FlowSDE
        >>> chain(FlowSDE(0.7), 4).trained
        (0, 1, 2)
    """
    if train_last:
        _check_last(kernel, num_steps - 1, num_steps, "chain")
    possible = range(0 if kernel.is_deterministic else num_steps if train_last else num_steps - 1)
    chosen = possible if trained is None else trained
    if not set(chosen) <= set(possible):
        raise ValueError(f"chain.trained: got {sorted(chosen)}, needed steps of 0 to {len(possible) - 1}")
    return Plan(tuple(PlanStep(kernel=kernel, is_trained=i in chosen) for i in range(num_steps)))


def window(kernel: Kernel, num_steps: int, *, start: int, size: int, num_children: int = 1) -> Plan:
    """Apply and train one noisy kernel in a window of steps, and follow the ODE outside.

    Model evaluations per initial state, with ``n`` steps and K children: ``start + 1 + K (n - start - 1)`` in the rollout,
    ``1 + K (size - 1)`` in training.

    Args:
        kernel: Kernel of the window.
        num_steps: Number of steps of the whole plan.
        start: First step of the window.
        size: Number of steps in it.
        num_children: Samples of an initial state; they part at the first step of the window and share everything before it.

    Returns:
        The plan.

    Raises:
        ValueError: If the window does not lie inside the plan, or the kernel has no noise in it.

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
    _check_last(kernel, start + size - 1, num_steps, "window")
    inside, outside = PlanStep(kernel=kernel, is_trained=True), PlanStep(kernel=Euler())
    first = PlanStep(kernel=kernel, is_trained=True, num_children=num_children)
    return Plan(tuple(first if i == start else inside if start < i < start + size else outside for i in range(num_steps)))


def ode(num_steps: int) -> Plan:
    """Sample by the probability-flow ODE; nothing is trained."""
    return chain(Euler(), num_steps)


def fork(
    kernel: Kernel,
    num_steps: int,
    *,
    num_children: int,
    steps: range | None = None,
    path: Kernel | None = None,
    completion: Kernel | None = None,
    compare: Compare = "state",
) -> Plan:
    """Follow one path and let ``num_children`` children leave it at every step, each with noise at that step alone.

    Model evaluations per initial state, for forks at all steps but the last of ``n``: ``n - 1`` on the path and ``K n (n - 1) / 2`` for the
    children in the rollout, and ``n - 1`` in training, because the children of a state share its evaluation.

    Args:
        kernel: Draws the children.
        num_steps: Number of steps, n.
        num_children: Children of each state, K.
        steps: Where the path forks; None for all steps but the last.
        path: Kernel of the path; None for the ODE.
        completion: Kernel that leads children to the end; None for the ODE.
        compare: Whom a final state is compared with.

    Returns:
        The plan; the path's own end is no final state.

    Raises:
        ValueError: If there is no step to fork at, one lies outside the plan, or the kernel has no noise.

    References:
        He et al., "TempFlow-GRPO", 2025, https://arxiv.org/abs/2508.04324, trajectory branching.

    Examples:
        >>> from flowalign.core.kernels import FlowSDE
        >>> plan = fork(FlowSDE(0.7), 10, num_children=6)
        >>> plan.num_leaves, plan.evaluations, plan.training_evaluations
        (54, 279, 9)
    """
    chosen = range(num_steps - 1) if steps is None else steps
    if steps is None and not chosen:
        raise ValueError(f"fork: got {num_steps} steps, needed at least 2: forks are at every step but the last")
    if not chosen or min(chosen) < 0 or max(chosen) >= num_steps:
        raise ValueError(f"fork: got steps {list(chosen)} for {num_steps} steps, needed at least one of 0 to {num_steps - 1}")
    _check_last(kernel, max(chosen), num_steps, "fork")
    side = Fork(kernel=kernel, num_children=num_children, completion=Euler() if completion is None else completion)
    trunk = Euler() if path is None else path
    made = tuple(PlanStep(kernel=trunk, fork=side if i in chosen else None) for i in range(num_steps))
    return Plan(made, keeps_path=False, compare=compare)


def tree(kernel: Kernel, num_steps: int, *, depths: tuple[int, ...], num_children: int) -> Plan:
    """Use one noisy kernel at every step, split every state into ``num_children`` at given steps, and train all steps but the last.

    Model evaluations per initial state: the number of states at each step, added up, in the rollout, and the same without the last step in
    training.

    Args:
        kernel: Kernel of every step.
        num_steps: Number of steps.
        depths: Steps at which every state splits.
        num_children: Children of each state there.

    Returns:
        The plan, with ``num_children ** len(depths)`` final states per initial state.

    Raises:
        ValueError: If a depth lies outside the plan, or the tree does not split.

    References:
        Li et al., "BranchGRPO", 2025, https://arxiv.org/abs/2509.06040.

    Examples:
        >>> from flowalign.core.kernels import FlowSDE
        >>> tree(FlowSDE(0.7), 6, depths=(0, 3), num_children=2).evaluations
        15
    """
    if not depths or len(set(depths)) < len(depths) or min(depths) < 0 or max(depths) >= num_steps - 1:
        raise ValueError(
            f"tree: got depths {list(depths)} for {num_steps} steps, needed one or more different ones of 0 to {num_steps - 2} (a tree cannot "
            "be deeper than the schedule, and the last step is not trained)"
        )
    if num_children < 2:
        raise ValueError(f"tree.num_children: got {num_children}, needed at least 2; for no branches use chain")
    return Plan(
        tuple(
            PlanStep(kernel=kernel, is_trained=i < num_steps - 1, num_children=num_children if i in depths else 1) for i in range(num_steps)
        )
    )


def progressive_start(step: int, *, size: int, limit: int, every: int = 25, stride: int = 1) -> int:
    """Return where MixGRPO's window begins: it moves towards the end of the schedule, and from there back to the start.

    Args:
        step: Training step.
        size: Size of the window.
        limit: The window stays below this step; the last step of a schedule is usually left out.
        every: Training steps between moves.
        stride: Steps of a move.

    Returns:
        The first step of the window; the window is whole at every training step.

    Raises:
        ValueError: If the window does not fit below the limit, or does not move.

    References:
        Li et al., "MixGRPO", 2025, https://arxiv.org/abs/2507.21802, progressive strategy with interval 25, stride 1 and size 4.
        Deviation: the released scheduler lets the window shrink at the end, in the end to nothing, which trains nothing; here the last
        window is the last whole one, and after it the first one follows.

    Examples:
        >>> [progressive_start(step, size=4, limit=23) for step in (0, 25, 475, 499, 500)]
        [0, 1, 19, 19, 0]
    """
    if size < 1 or size > limit:
        raise ValueError(f"window: got size {size}, needed 1 to {limit}, the number of steps that it may lie in")
    if every < 1 or stride < 1:
        raise ValueError(f"window: got a move of {stride} steps after {every}, needed at least 1 each")
    last = limit - size
    places = -(-last // stride) + 1
    return min(step // every % places * stride, last)


def _check_last(kernel: Kernel, last: int, num_steps: int, where: str) -> None:
    if last == num_steps - 1 and isinstance(kernel, CPS | DDIM):
        raise ValueError(
            f"{where}: step {last} is the last one, where {type(kernel).__name__} has no noise and so no log-prob; end before it, or use "
            "FlowSDE or DanceSDE"
        )
