"""Surrogates: one number per row that stands for the log-likelihood of a sample."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

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
    return -((mse + _FLOOR).sqrt() - _FLOOR**0.5) * sigma


def _ghuber(mse: Tensor, sigma: Tensor) -> Tensor:
    return -((mse + _FLOOR) ** _POWER - _FLOOR**_POWER) * sigma / _POWER


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
    mse = error.square().flatten(1).mean(1)
    level = expand_level(sigma, velocity).flatten().to(mse)
    score = weighting(mse, level.expand(len(mse)))
    return score.to(velocity.device, torch.promote_types(velocity.dtype, torch.float32))
