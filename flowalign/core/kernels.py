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
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.core.paths import ROUNDING, Level, at_least_float32, expand_level, expand_like, velocity_to_noise

Reduction: TypeAlias = Literal["sum", "mean"]
"""How a quantity per latent element becomes one per row. There is no default: published constants depend on it."""


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


def reduce_event(values: Float[Tensor, "batch *event"], reduction: Reduction) -> Float[Tensor, " batch"]:
    """Sum or average over every axis but the first.

    Sums are accumulated in float64 where the device has it: a clip range of 1e-5 is not far above the rounding of a
    float32 mean over 65536 elements.

    Args:
        values: One number per latent element; ``[batch]`` alone counts as one element per row.
        reduction: ``"sum"`` or ``"mean"``.

    Returns:
        One number per row, in the dtype of ``values``.

    Raises:
        ValueError: If ``reduction`` is anything else.

    Examples:
        >>> reduce_event(torch.ones(2, 3, 4), "sum")
        tensor([12., 12.])
        >>> reduce_event(torch.tensor([5.0, 7.0]), "mean")
        tensor([5., 7.])
    """
    # The extra axis keeps a scalar event a row of its own: torch reduces everything when it is given no axis.
    flat = values.unsqueeze(-1).flatten(1)
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    if reduction == "sum":
        return flat.sum(1, dtype=wide).to(values.dtype)
    if reduction == "mean":
        return flat.mean(1, dtype=wide).to(values.dtype)
    raise ValueError(
        f"reduction: got {reduction!r}; need 'sum' (a true log-likelihood or KL) or 'mean' (the unit of published clip ranges such as 1e-4)"
    )


def gaussian_log_prob(
    x_next: Float[Tensor, "batch *event"],
    mean: Float[Tensor, "batch *event"],
    std: Level,
    *,
    reduction: Reduction,
) -> Float[Tensor, " batch"]:
    """Return the log density of ``x_next`` under a Gaussian, all constants included.

    Args:
        x_next: Where the density is evaluated.
        mean: Centre of the Gaussian.
        std: Positive; float, 0-dim or ``[batch]``.
        reduction: ``"sum"`` gives `log_prob`, ``"mean"`` gives `mean_log_prob` (divided by the number of elements).

    Returns:
        One log density per row.

    Raises:
        ValueError: If ``std`` is 0 (a deterministic step has no density), negative or nan, the shapes differ, or a
            result is not finite.

    References:
        Liu et al., "Flow-GRPO", 2025, https://arxiv.org/abs/2505.05470; its released code uses the mean.

    Examples:
        >>> gaussian_log_prob(torch.zeros(1, 4), torch.zeros(1, 4), 1.0, reduction="mean")
        tensor([-0.9189])
    """
    _check_std(std, "gaussian_log_prob")
    _check_same_shape(x_next, mean, "gaussian_log_prob")
    scale = expand_like(std, mean)
    deviation = (at_least_float32(x_next) - at_least_float32(mean)) / scale
    num_elements = mean[0].numel() if reduction == "sum" and mean.shape[0] else 1
    constant = torch.log(scale.flatten() if scale.ndim else scale) + 0.5 * math.log(2 * math.pi)
    result = -0.5 * reduce_event(deviation * deviation, reduction) - num_elements * constant
    return _finite_rows(result, "gaussian_log_prob")


def gaussian_kl(
    mean: Float[Tensor, "batch *event"],
    mean_other: Float[Tensor, "batch *event"],
    std: Level,
    *,
    reduction: Reduction,
) -> Float[Tensor, " batch"]:
    """Return the KL divergence between two Gaussians of equal std: ``|mean - mean_other|**2 / (2 std**2)``.

    Args:
        mean: Centre of the first Gaussian.
        mean_other: Centre of the second.
        std: Positive; float, 0-dim or ``[batch]``.
        reduction: ``"sum"`` gives nats, ``"mean"`` nats per latent element.

    Returns:
        One divergence per row, at least 0.

    Raises:
        ValueError: If ``std`` is 0, negative or nan, the shapes differ, or a result is not finite.

    References:
        Liu et al., "Flow-GRPO", 2025, https://arxiv.org/abs/2505.05470, equation 10. Deviation: the released code leaves ``sqrt(d sigma)`` out of the
        std, so its KL is this one times ``sigma - sigma_next``; see `flowalign.core.penalties.scaled_kernel_kl`.

    Examples:
        >>> gaussian_kl(torch.ones(1, 4), torch.zeros(1, 4), 0.5, reduction="mean")
        tensor([2.])
    """
    _check_std(std, "gaussian_kl")
    _check_same_shape(mean, mean_other, "gaussian_kl")
    deviation = (at_least_float32(mean) - at_least_float32(mean_other)) / expand_like(std, mean)
    return _finite_rows(0.5 * reduce_event(deviation * deviation, reduction), "gaussian_kl")


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


def _check_std(std: Level, where: str) -> None:
    value = torch.as_tensor(std)
    if not bool(((value > 0) & torch.isfinite(value)).all()):
        raise ValueError(
            f"{where}: std: got {value.min().item()}; need a positive number, because a deterministic step has no "
            f"density (train only the steps of a stochastic kernel, see Plan.trained)"
        )


def _check_same_shape(first: Tensor, second: Tensor, where: str) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"{where}: got shapes {list(first.shape)} and {list(second.shape)}; need equal shapes (repeat the rows of a shared mean)"
        )


def _finite_rows(rows: Tensor, where: str) -> Tensor:
    is_finite = torch.isfinite(rows)
    if not bool(is_finite.all()):
        first = int((~is_finite).nonzero()[0, 0])
        raise ValueError(
            f"{where}: row {first} is {rows[first].item()}; need finite states (look for nan or inf in the velocity, "
            f"and keep latents in float32)"
        )
    return rows
