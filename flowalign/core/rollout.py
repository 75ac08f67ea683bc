"""Rollouts: run a plan from noise to data and keep the transitions that are trained, as one flat table."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.core.kernels import gaussian_log_prob, sample
from flowalign.core.plans import Plan


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """Rows of trained transitions.

    Shapes:
        x, x_next, velocity, mean: ``[rows, *event]`` float32; ``x_next`` is a draw from N(mean, std**2).
        std, sigma, sigma_next: ``[rows]``.
        step: ``[rows]`` int64, position in the plan.
        sample: ``[rows]`` int64, row of the final table that the transition leads to; the first of them where the plan forks later.
    """

    x: Tensor
    x_next: Tensor
    velocity: Tensor
    mean: Tensor
    std: Tensor
    sigma: Tensor
    sigma_next: Tensor
    step: Tensor
    sample: Tensor

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.sample)

    def take(self, index: Tensor) -> "Transitions":
        """Select rows."""
        return Transitions(**{field.name: vars(self)[field.name][index] for field in fields(self)})

    def mean_log_prob(self) -> Tensor:
        """Return the log density of each recorded draw, a mean over latent elements, ``[rows]``."""
        return gaussian_log_prob(self.x_next, self.mean, self.std, reduction="mean")

    @staticmethod
    def concatenate(parts: "list[Transitions]") -> "Transitions":
        """Join tables; rows are ordered by step, then sample."""
        joined = {field.name: torch.cat([vars(part)[field.name] for part in parts]) for field in fields(Transitions)}
        order = torch.argsort(joined["step"] * (joined["sample"].max() + 1) + joined["sample"]) if len(joined["step"]) else slice(None)
        return Transitions(**{name: value[order] for name, value in joined.items()})

    @staticmethod
    def empty(x: Tensor) -> "Transitions":
        """Return a table without rows for latents like ``x``."""
        none, rows = x[:0].float(), x.new_zeros(0, dtype=torch.float32)
        index = torch.zeros(0, dtype=torch.int64, device=x.device)
        return Transitions(x=none, x_next=none, velocity=none, mean=none, std=rows, sigma=rows, sigma_next=rows, step=index, sample=index)


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What a rollout leaves: where it began and ended, its grid, and the trained transitions.

    Shapes:
        x_init: ``[batch, *event]``.
        x0: ``[batch * plan.num_leaves, *event]``; descendants of one initial state lie side by side.
        sigmas: ``[steps + 1]``, decreasing.
    """

    x_init: Tensor
    x0: Tensor
    sigmas: Tensor
    transitions: Transitions


def rollout(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x_init: Tensor,
    sigmas: Tensor,
    plan: Plan,
    noise: Callable[[int], Tensor],
) -> Trajectory:
    """Run a plan with a velocity function; the pipelines return the same type.

    Args:
        velocity: From ``x [batch, *event]`` and a 0-dim ``sigma`` to the velocity.
        x_init: State at ``sigmas[0]``, ``[batch, *event]``.
        sigmas: Grid, ``[steps + 1]``, decreasing.
        plan: One kernel for each step. Where it forks, the children share the evaluation of their parent.
        noise: Standard normal draws for a step, one row per state after it; only called where the kernel has noise.

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
    plan.check(len(sigmas) - 1)
    if not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError("sigmas: got a grid that does not decrease at every step, needed 1 (noise) to 0 (data); flip an increasing one")
    x, kept = x_init, [Transitions.empty(x_init)]
    for i, step in enumerate(plan.steps):
        v = velocity(x, sigmas[i])
        law = step.kernel(x, v, sigmas[i], sigmas[i + 1])
        if step.num_children > 1:
            x, v, mean = (table.repeat_interleave(step.num_children, 0) for table in (x, v, law.mean))
            law = replace(law, mean=mean)
        x_next = law.mean if step.kernel.is_deterministic else sample(law, _check_noise(noise(i), law.mean, i))
        if step.is_trained:
            rows = transition_rows(i, x, x_next, v, law.mean, law.std, sigmas[i], sigmas[i + 1])
            kept.append(replace(rows, sample=rows.sample * plan.leaves_after(i)))
        x = x_next
    return Trajectory(x_init=x_init, x0=x, sigmas=sigmas, transitions=Transitions.concatenate(kept))


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
        law = plan.steps[i].kernel(rows.x, velocity(rows.x, rows.sigma[0]), rows.sigma[0], rows.sigma_next[0])
        score = gaussian_log_prob(rows.x_next, law.mean, law.std, reduction="mean")
        found = found.to(score.dtype).index_put((chosen,), score)
    return found


def transition_rows(
    step: int, x: Tensor, x_next: Tensor, velocity: Tensor, mean: Tensor, std: Tensor, sigma: Tensor, sigma_next: Tensor
) -> Transitions:
    """Lay one step of a whole batch out as rows; ``std``, ``sigma`` and ``sigma_next`` may be 0-dim."""
    rows = len(x)
    return Transitions(
        x=x,
        x_next=x_next,
        velocity=velocity,
        mean=mean,
        std=torch.as_tensor(std).expand(rows).to(x.device),
        sigma=torch.as_tensor(sigma).expand(rows).to(x.device),
        sigma_next=torch.as_tensor(sigma_next).expand(rows).to(x.device),
        step=torch.full((rows,), step, dtype=torch.int64, device=x.device),
        sample=torch.arange(rows, device=x.device),
    )


def _check_noise(noise: Tensor, mean: Tensor, step: int) -> Tensor:
    if noise.shape != mean.shape:
        raise ValueError(f"noise({step}): got shape {list(noise.shape)}, needed {list(mean.shape)}: one row per state, children included")
    return noise
