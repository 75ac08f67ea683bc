"""Surrogates: one number per row that stands for the log-likelihood of a sample."""

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.core.gaussians import Reduction, gaussian_log_prob, reduce_event
from flowalign.core.kernels import Kernel, Step
from flowalign.core.paths import Level, expand_level, widest

# From the mean squared error and sigma, float64 [batch], to a score: higher is more likely.
Weighting = Callable[[Tensor, Tensor], Tensor]

_FLOOR = 1e-10  # inside the roots, as in the released AWM code: keeps their gradient finite at an error of 0
_POWER = 0.25


def _uniform(mse: Tensor, sigma: Tensor) -> Tensor:
    return -mse


def _sigma(mse: Tensor, sigma: Tensor) -> Tensor:
    return -sigma * mse


def _sigma_squared(mse: Tensor, sigma: Tensor) -> Tensor:
    return -sigma.square() * mse


def _huber(mse: Tensor, sigma: Tensor) -> Tensor:
    return -sigma * ((mse + _FLOOR).sqrt() - math.sqrt(_FLOOR))


def _ghuber(mse: Tensor, sigma: Tensor) -> Tensor:
    return -sigma / _POWER * (torch.pow(mse + _FLOOR, _POWER) - math.pow(_FLOOR, _POWER))


WEIGHTINGS: Mapping[str, Weighting] = {
    "uniform": _uniform,
    "sigma": _sigma,
    "sigma_squared": _sigma_squared,
    "huber": _huber,
    "ghuber": _ghuber,
}
"""Named weightings of the matching score. ``ghuber``'s gradient is ``sigma * mse**(p - 1)`` times that of the error, p = 0.25."""


def matching_score(
    velocity: Float[Tensor, "batch *event"],
    noise: Float[Tensor, "batch *event"],
    x0: Float[Tensor, "batch *event"],
    sigma: Level,
    *,
    weighting: Weighting,
) -> Float[Tensor, " batch"]:
    """Score how well a velocity points from the noise back to the sample: minus a weight times the mean squared error.

    Args:
        velocity: Prediction at ``(1 - sigma) * x0 + sigma * noise``.
        noise: The noise of that state.
        x0: The clean sample.
        sigma: Noise level.
        weighting: One of ``WEIGHTINGS`` or a function like them.

    Returns:
        One score per row, at most 0, in float32 or the dtype of the velocity if wider.

    References:
        Xue et al., "Advantage Weighted Matching", 2025, https://arxiv.org/abs/2509.25050, section 4; weightings of its released code.
        The arithmetic is float64, as in that code: differences of scores are far below the scores.
    """
    error = widest(velocity) - (widest(noise) - widest(x0))
    mse = reduce_event(error.square(), "mean")
    level = expand_level(sigma, velocity).flatten().to(mse)
    score = weighting(mse, level.expand(len(mse)))
    return score.to(velocity.device, torch.promote_types(velocity.dtype, torch.float32))


def transition_score(
    kernel: Kernel,
    velocity: Float[Tensor, "batch *event"],
    x: Float[Tensor, "batch *event"],
    x_next: Float[Tensor, "batch *event"],
    sigma: Level,
    sigma_next: Level,
    *,
    reduction: Reduction,
) -> tuple[Float[Tensor, " batch"], Step]:
    """Score recorded transitions by their log density under a velocity.

    Args:
        kernel: The kernel that drew them; its std must be positive.
        velocity: Prediction at ``x``; gradient flows through it alone.
        x: State before the step.
        x_next: State after it, as recorded.
        sigma: Noise level before.
        sigma_next: Noise level after.
        reduction: ``"mean"`` is the unit of published clip ranges, ``"sum"`` the true log-likelihood.

    Returns:
        One score per row, and the kernel's step for penalties that need its mean or std.

    Raises:
        ValueError: If the step has no noise, the noise levels do not decrease, or a score is not finite.

    References:
        Black et al., "Training Diffusion Models with Reinforcement Learning", 2023, https://arxiv.org/abs/2305.13301, equation 6;
        Liu et al., "Flow-GRPO", 2025, https://arxiv.org/abs/2505.05470, equation 5.
    """
    step = kernel(x.detach(), velocity, sigma, sigma_next)
    return gaussian_log_prob(x_next.detach(), step.mean, step.std, reduction=reduction), step
