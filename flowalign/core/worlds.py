"""Data whose velocity, score and posterior are known exactly: where formulas are proved.

For Gaussian data ``x`` at any noise level is Gaussian, and for a mixture it is a mixture, so every quantity that a network
estimates has a closed form. Worlds are functions of ``x`` of any shape ``[batch, *event]`` with independent elements.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.core.paths import Level, at_least_float32, expand_level


@dataclass(frozen=True)
class GaussianWorld:
    """Data with independent normal elements.

    Attributes:
        mean: Number for all elements, or ``[*event]``.
        std: Positive; number for all elements, or ``[*event]``.

    Raises:
        ValueError: If a std is not positive.

    Examples:
        >>> world = GaussianWorld(0.0, 1.0)
        >>> world.velocity(torch.tensor([2.0]), 0.5)  # a symmetric point: no reason to move
        tensor([0.])
        >>> world.posterior_mean(torch.tensor([2.0]), 0.5)
        tensor([2.])
    """

    mean: float | Tensor
    std: float | Tensor

    def __post_init__(self) -> None:
        """Check the std."""
        _check_stds("GaussianWorld", torch.as_tensor(self.std))

    def marginal(self, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std of ``x`` at a noise level (broadcast against mean and std)."""
        level = torch.as_tensor(sigma, dtype=None if isinstance(sigma, Tensor) else torch.float64)
        return (1 - level) * self._mean, torch.sqrt(self._variance(level))

    def velocity(self, x: Float[Tensor, "batch *event"], sigma: Level) -> Float[Tensor, "batch *event"]:
        """Return ``E[noise - x0 | x]``, exact at both ends of the path.

        Raises:
            ValueError: If ``sigma`` is outside [0, 1].
        """
        level = expand_level(sigma, x)
        slope = (level - (1 - level) * self._std**2) / self._variance(level)
        return slope * (at_least_float32(x) - (1 - level) * self._mean) - self._mean

    def posterior_mean(self, x: Float[Tensor, "batch *event"], sigma: Level) -> Float[Tensor, "batch *event"]:
        """Return ``E[x0 | x]``.

        Raises:
            ValueError: If ``sigma`` is outside [0, 1].
        """
        level = expand_level(sigma, x)
        gain = (1 - level) * self._std**2 / self._variance(level)
        return self._mean + gain * (at_least_float32(x) - (1 - level) * self._mean)

    def score(self, x: Float[Tensor, "batch *event"], sigma: Level) -> Float[Tensor, "batch *event"]:
        """Return the gradient of `log_prob` in ``x``.

        Raises:
            ValueError: If ``sigma`` is outside [0, 1].
        """
        level = expand_level(sigma, x)
        return -(at_least_float32(x) - (1 - level) * self._mean) / self._variance(level)

    def log_prob(self, x: Float[Tensor, "batch *event"], sigma: Level) -> Float[Tensor, " batch"]:
        """Return the log density of ``x`` at a noise level, summed over event.

        Raises:
            ValueError: If ``sigma`` is outside [0, 1].
        """
        level = expand_level(sigma, x)
        variance = self._variance(level)
        deviation = at_least_float32(x) - (1 - level) * self._mean
        element = -0.5 * (deviation**2 / variance + torch.log(2 * math.pi * variance))
        return element.unsqueeze(-1).flatten(1).sum(1)

    def sample(self, num: int, generator: torch.Generator | None = None) -> Float[Tensor, "batch *event"]:
        """Draw clean data, float64 if mean and std are plain numbers."""
        mean = self._mean + 0 * self._std
        noise: Tensor = torch.randn(num, *mean.shape, generator=generator, dtype=mean.dtype)
        return mean + self._std * noise

    @property
    def _mean(self) -> Tensor:
        return _as_tensor(self.mean)

    @property
    def _std(self) -> Tensor:
        return _as_tensor(self.std)

    def _variance(self, level: Tensor) -> Tensor:
        return (1 - level) ** 2 * self._std**2 + level**2


@dataclass(frozen=True)
class MixtureWorld:
    """Data from a mixture of isotropic Gaussians.

    Attributes:
        means: ``[k, d]``.
        std: Positive; number for all components, or ``[k]``.
        weights: ``[k]``, positive; they are normalised. Default: equal.

    Raises:
        ValueError: If shapes do not fit, or a std or weight is not positive.
    """

    means: Float[Tensor, "k d"]
    std: float | Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        """Check shapes and signs."""
        if self.means.ndim != 2:
            raise ValueError(f"MixtureWorld.means: got shape {list(self.means.shape)}; need [components, dimensions]")
        _check_stds("MixtureWorld", torch.as_tensor(self.std))
        count = self.means.shape[0]
        for name, value in (("std", torch.as_tensor(self.std)), ("weights", self._weights)):
            if value.ndim and value.shape != (count,):
                raise ValueError(f"MixtureWorld.{name}: got shape {list(value.shape)}; need one per component, [{count}]")
        if not bool((self._weights > 0).all()):
            raise ValueError("MixtureWorld.weights: need positive numbers (leave out a component of weight 0)")

    def marginal(self, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std ``[d]`` of ``x`` at a noise level given as a float or a 0-dim tensor."""
        level = torch.as_tensor(sigma, dtype=self.means.dtype)
        share = (self._weights / self._weights.sum())[:, None]
        mean = (share * self.means).sum(0)
        variance = (share * ((self.means - mean) ** 2 + self._component_std**2)).sum(0)
        return (1 - level) * mean, torch.sqrt((1 - level) ** 2 * variance + level**2)

    def responsibilities(self, x: Float[Tensor, "batch d"], sigma: Level) -> Float[Tensor, "batch k"]:
        """Return the probability that each component produced ``x``."""
        return torch.softmax(self._joint_log_prob(x, sigma), 1)

    def velocity(self, x: Float[Tensor, "batch d"], sigma: Level) -> Float[Tensor, "batch d"]:
        """Return ``E[noise - x0 | x]``.

        Raises:
            ValueError: If ``sigma`` is outside [0, 1].
        """
        level, deviation, variance = self._components(x, sigma)
        slope = (level - (1 - level) * self._component_std**2) / variance
        return self._average(slope * deviation - self.means, x, sigma)

    def posterior_mean(self, x: Float[Tensor, "batch d"], sigma: Level) -> Float[Tensor, "batch d"]:
        """Return ``E[x0 | x]``.

        Raises:
            ValueError: If ``sigma`` is outside [0, 1].
        """
        level, deviation, variance = self._components(x, sigma)
        gain = (1 - level) * self._component_std**2 / variance
        return self._average(self.means + gain * deviation, x, sigma)

    def score(self, x: Float[Tensor, "batch d"], sigma: Level) -> Float[Tensor, "batch d"]:
        """Return the gradient of `log_prob` in ``x``.

        Raises:
            ValueError: If ``sigma`` is outside [0, 1].
        """
        _, deviation, variance = self._components(x, sigma)
        return self._average(-deviation / variance, x, sigma)

    def log_prob(self, x: Float[Tensor, "batch d"], sigma: Level) -> Float[Tensor, " batch"]:
        """Return the log density of ``x`` at a noise level.

        Raises:
            ValueError: If ``sigma`` is outside [0, 1].
        """
        return torch.logsumexp(self._joint_log_prob(x, sigma), 1)

    def sample(self, num: int, generator: torch.Generator | None = None) -> Float[Tensor, "batch d"]:
        """Draw clean data."""
        component = torch.multinomial(self._weights, num, replacement=True, generator=generator)
        noise = torch.randn(num, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[component] + self._component_std[component] * noise

    @property
    def _weights(self) -> Tensor:
        return self.weights if self.weights is not None else torch.ones_like(self.means[:, 0])

    @property
    def _component_std(self) -> Tensor:
        return torch.as_tensor(self.std, dtype=self.means.dtype).expand(self.means.shape[0])[:, None]

    def _components(self, x: Tensor, sigma: Level) -> tuple[Tensor, Tensor, Tensor]:
        """Return sigma, ``x`` minus each component's mean ``[batch, k, d]``, and the variance of each."""
        level = expand_level(sigma, x)
        level = level[..., None] if level.ndim else level
        deviation = at_least_float32(x)[:, None] - (1 - level) * self.means
        return level, deviation, (1 - level) ** 2 * self._component_std**2 + level**2

    def _joint_log_prob(self, x: Tensor, sigma: Level) -> Tensor:
        _, deviation, variance = self._components(x, sigma)
        element = -0.5 * (deviation**2 / variance + torch.log(2 * math.pi * variance))
        return element.sum(-1) + torch.log(self._weights / self._weights.sum())

    def _average(self, values: Tensor, x: Tensor, sigma: Level) -> Tensor:
        return (self.responsibilities(x, sigma)[..., None] * values).sum(1)


def _as_tensor(value: float | Tensor) -> Tensor:
    # A 0-dim float64 tensor is exact and does not widen a float32 x.
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _check_stds(where: str, std: Tensor) -> None:
    if not bool(((std > 0) & torch.isfinite(std)).all()):
        raise ValueError(f"{where}.std: got {std.min().item()}; need positive numbers (a point mass has no density)")
