"""Rollouts: run a plan from noise to data and keep the transitions that are trained, as one flat table."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
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
        sample: ``[rows]`` int64, row of the final table that the transition leads to.
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
        return Transitions(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def mean_log_prob(self) -> Tensor:
        """Return the log density of each recorded draw, a mean over latent elements, ``[rows]``."""
        return gaussian_log_prob(self.x_next, self.mean, self.std, reduction="mean")

    @staticmethod
    def concatenate(parts: "list[Transitions]") -> "Transitions":
        """Join tables; rows are ordered by step, then sample."""
        joined = {field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Transitions)}
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
        x_init, x0: ``[batch, *event]``.
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
        plan: One kernel for each step.
        noise: Standard normal draws ``[batch, *event]`` for a step; only called where the kernel has noise.

    Returns:
        The trajectory.

    Raises:
        ValueError: If plan and grid have different lengths.

    Examples:
        >>> from flowalign.core.plans import ode
        >>> x = torch.ones(2, 3)
        >>> done = rollout(lambda x, sigma: x, x, torch.tensor([1.0, 0.5, 0.0]), ode(2), lambda step: x)
        >>> done.x0[0].tolist()
        [0.25, 0.25, 0.25]
    """
    plan.check(len(sigmas) - 1)
    x, kept = x_init, [Transitions.empty(x_init)]
    for i, step in enumerate(plan.steps):
        v = velocity(x, sigmas[i])
        law = step.kernel(x, v, sigmas[i], sigmas[i + 1])
        x_next = law.mean if step.kernel.is_deterministic else sample(law, noise(i))
        if step.is_trained:
            kept.append(transition_rows(i, x, x_next, v, law.mean, law.std, sigmas[i], sigmas[i + 1]))
        x = x_next
    return Trajectory(x_init=x_init, x0=x, sigmas=sigmas, transitions=Transitions.concatenate(kept))


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
