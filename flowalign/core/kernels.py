"""One reverse transition: from ``x`` at ``sigma`` to a Gaussian at ``sigma_next``.

Every kernel is the Euler step of the probability-flow ODE plus a correction along the predicted noise that pays for
the noise it adds. At noise 0 the correction is exactly 0, so "SDE or ODE" is never a flag, only ``std == 0``. Two families:

* `FlowSDE` and `DanceSDE` discretise an SDE that keeps the marginals for any diffusion ``g``: the drift gains
  ``g**2 / 2 * score``.
* `DDIM` and `CPS` keep the coefficients: the next state holds ``1 - sigma_next`` of the data and ``sigma_next`` of
  noise, part of it predicted and part of it drawn.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.core.gaussians import Reduction, gaussian_kl, gaussian_log_prob, reduce_event
from flowalign.core.paths import ROUNDING, Level, at_least_float32, expand_level, expand_like, velocity_to_noise

__all__ = [
    "CPS",
    "DDIM",
    "DanceSDE",
    "Euler",
    "FlowSDE",
    "Kernel",
    "Reduction",
    "Step",
    "gaussian_kl",
    "gaussian_log_prob",
    "reduce_event",
    "sample",
]


@dataclass(frozen=True)
class Step:
    """The Gaussian law of the next state.

    Shapes:
        mean: ``[batch, *event]``.
        std: 0-dim or ``[batch]``; 0 for a deterministic step.
    """

    mean: Tensor
    std: Tensor


@runtime_checkable
class Kernel(Protocol):
    """What every kernel promises."""

    @property
    def is_deterministic(self) -> bool:
        """Whether the std is 0 at every noise level."""
        ...

    def __call__(self, x: Tensor, velocity: Tensor, sigma: Level, sigma_next: Level) -> Step:
        """Return mean and std of the state at ``sigma_next``."""
        ...


def sample(step: Step, noise: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
    """Draw the next state: ``mean + std * noise``."""
    return step.mean + expand_like(step.std, step.mean) * noise


@dataclass(frozen=True)
class Euler:
    """The deterministic step ``x + (sigma_next - sigma) * velocity``.

    With 0-dim float32 noise levels the mean is, bit for bit, the step of diffusers'
    ``FlowMatchEulerDiscreteScheduler``.
    """

    @property
    def is_deterministic(self) -> bool:
        """Always true."""
        return True

    def __call__(self, x: Tensor, velocity: Tensor, sigma: Level, sigma_next: Level) -> Step:
        """Follow the probability-flow ODE.

        Raises:
            ValueError: If the noise levels are outside [0, 1] or do not decrease.
        """
        now, then = _check_levels(x, sigma, sigma_next)
        return Step(_euler_mean(x, velocity, now, then), _per_row(torch.zeros_like(now - then)))


@dataclass(frozen=True)
class FlowSDE:
    """The SDE step of Flow-GRPO, with diffusion ``noise_level * sqrt(sigma / (1 - sigma))``.

    ``noise_level = sqrt(2)`` is the memoryless (ancestral) SDE, 0 the ODE. At ``sigma = 1``, where the diffusion is infinite, the
    denominator is ``1 - sigma_next``. That first step inflates the variance of N(0, 1) data by
    ``noise_level**4 / 4``, however many steps follow; only further mixing forgets it.

    References:
        Liu et al., "Flow-GRPO", 2025, https://arxiv.org/abs/2505.05470, equation 9 and section 4.2 (0.7 for SD3.5).
        Deviation: levels within 1e-6 of 1 count as 1, because a schedule may miss 1 by a float32 rounding and the
        diffusion would then be a thousandfold.
    """

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        """Check the range of the noise level."""
        _check_noise("FlowSDE.noise_level", self.noise_level, math.inf)

    @property
    def is_deterministic(self) -> bool:
        """Whether the noise level is 0."""
        return self.noise_level == 0

    def __call__(self, x: Tensor, velocity: Tensor, sigma: Level, sigma_next: Level) -> Step:
        """Take one Euler-Maruyama step.

        Raises:
            ValueError: If the noise levels are outside [0, 1] or do not decrease.
        """
        now, then = _check_levels(x, sigma, sigma_next)
        remaining = torch.where(now > 1 - ROUNDING, 1 - then, 1 - now)
        return _marginal_preserving(x, velocity, now, then, self.noise_level**2 * now / remaining)


@dataclass(frozen=True)
class DanceSDE:
    """The SDE step of DanceGRPO, with constant diffusion ``eta``.

    References:
        Xue et al., "DanceGRPO", 2025, https://arxiv.org/abs/2505.07818, equation 8; 0.3 is its released default.
    """

    eta: float = 0.3

    def __post_init__(self) -> None:
        """Check the range of eta."""
        _check_noise("DanceSDE.eta", self.eta, math.inf)

    @property
    def is_deterministic(self) -> bool:
        """Whether eta is 0."""
        return self.eta == 0

    def __call__(self, x: Tensor, velocity: Tensor, sigma: Level, sigma_next: Level) -> Step:
        """Take one Euler-Maruyama step.

        Raises:
            ValueError: If the noise levels are outside [0, 1] or do not decrease.
        """
        now, then = _check_levels(x, sigma, sigma_next)
        return _marginal_preserving(x, velocity, now, then, torch.full_like(now, self.eta**2))


@dataclass(frozen=True)
class DDIM:
    """DDIM with ``eta``, in the coordinates of the straight path; ``eta = 1`` is DDPO's ancestral sampler.

    The std is ``eta * u * sqrt(1 - (u * (1 - t) / (t * (1 - u)))**2)`` with ``t = sigma`` and ``u = sigma_next``.

    References:
        Song et al., "Denoising Diffusion Implicit Models", 2020, https://arxiv.org/abs/2010.02502, equations 12 and 16, after
        `flowalign.core.paths.vp_to_flow`. With ``eta = 1`` it is also the first-order SDE step of DPM-Solver++.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        """Check the range of eta."""
        _check_noise("DDIM.eta", self.eta, 1.0)

    @property
    def is_deterministic(self) -> bool:
        """Whether eta is 0."""
        return self.eta == 0

    def __call__(self, x: Tensor, velocity: Tensor, sigma: Level, sigma_next: Level) -> Step:
        """Replace part of the predicted noise by fresh noise.

        Raises:
            ValueError: If the noise levels are outside [0, 1] or do not decrease.
        """
        now, then = _check_levels(x, sigma, sigma_next)
        correlation = (then * (1 - now) / (now * (1 - then))).clamp(-1, 1)
        std = self.eta * then * torch.sqrt(1 - correlation * correlation)
        return _coefficient_preserving(x, velocity, now, then, std)


@dataclass(frozen=True)
class CPS:
    """Coefficient-preserving sampling: std ``sigma_next * sin(noise_level * pi / 2)``.

    It redraws a fixed share of the noise at every step, so it does **not** keep the marginals, not even in the limit
    of many steps: N(0, 1) data comes out with variance 0.65 at ``noise_level = 0.8``. What it keeps are the coefficients
    ``1 - sigma_next`` of the data and ``sigma_next`` of the noise.

    References:
        Wang and Yu, "Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching", 2025,
        https://arxiv.org/abs/2509.05952; Flow-GRPO's ``sde_type='cps'`` with 0.8. Deviation: none in the step; the released surrogate
        drops ``1 / (2 std**2)`` from the log density, which `gaussian_log_prob` does not.
    """

    noise_level: float = 0.8

    def __post_init__(self) -> None:
        """Check the range of the noise level."""
        _check_noise("CPS.noise_level", self.noise_level, 1.0)

    @property
    def is_deterministic(self) -> bool:
        """Whether the noise level is 0."""
        return self.noise_level == 0

    def __call__(self, x: Tensor, velocity: Tensor, sigma: Level, sigma_next: Level) -> Step:
        """Replace a fixed share of the predicted noise by fresh noise.

        Raises:
            ValueError: If the noise levels are outside [0, 1] or do not decrease.
        """
        now, then = _check_levels(x, sigma, sigma_next)
        std = torch.zeros_like(now) + then * math.sin(self.noise_level * math.pi / 2)
        return _coefficient_preserving(x, velocity, now, then, std)


def _euler_mean(x: Tensor, velocity: Tensor, now: Tensor, then: Tensor) -> Tensor:
    return at_least_float32(x) + (then - now) * at_least_float32(velocity)


def _marginal_preserving(x: Tensor, velocity: Tensor, now: Tensor, then: Tensor, diffusion2: Tensor) -> Step:
    """Euler-Maruyama with ``g**2 = diffusion2``: drift ``-velocity + g**2 / 2 * score`` over ``now - then``."""
    noise = velocity_to_noise(velocity, x, _per_row(now))
    variance = diffusion2 * (now - then)
    mean = _euler_mean(x, velocity, now, then) - variance / (2 * now) * noise
    return Step(mean, _per_row(torch.sqrt(variance)))


def _coefficient_preserving(x: Tensor, velocity: Tensor, now: Tensor, then: Tensor, std: Tensor) -> Step:
    """Move to ``(1 - then) * x0 + sqrt(then**2 - std**2) * noise``, leaving ``std**2`` of the noise to be drawn."""
    noise = velocity_to_noise(velocity, x, _per_row(now))
    kept = torch.sqrt((then * then - std * std).clamp(min=0))
    mean = _euler_mean(x, velocity, now, then) + (kept - then) * noise
    return Step(mean, _per_row(std))


def _per_row(value: Tensor) -> Tensor:
    return value.flatten() if value.ndim else value


def _check_levels(x: Tensor, sigma: Level, sigma_next: Level) -> tuple[Tensor, Tensor]:
    now = expand_level(sigma, x, positive=True)
    then = expand_level(sigma_next, x, name="sigma_next")
    if not bool((then < now).all()):
        raise ValueError(
            f"sigma_next: got {sigma_next} after sigma {sigma}; need it to be smaller, because a step removes noise "
            f"(schedules decrease from 1 to 0; flip one that increases)"
        )
    return now, then


def _check_noise(name: str, value: float, highest: float) -> None:
    if not (0 <= value <= highest and math.isfinite(value)):
        limit = "finite" if math.isinf(highest) else f"at most {highest:g}"
        raise ValueError(f"{name}: got {value}; need at least 0 and {limit} (0 is the deterministic step)")
