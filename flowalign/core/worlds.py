"""Worlds with exact answers: Gaussian data and mixtures of Gaussians, whose velocity, score and posterior are closed forms."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.core.paths import Level, expand_level


@dataclass(frozen=True)
class GaussianWorld:
    """Data ``x0 ~ N(mean, std**2)``, independent in every element.

    Attributes:
        mean: Mean of every element.
        std: Standard deviation of every element, not negative.

    Examples:
        >>> world = GaussianWorld(0.0, 1.0)
        >>> world.velocity(torch.tensor([[1.0]], dtype=torch.float64), 1.0)
        tensor([[1.]], dtype=torch.float64)
    """

    mean: float
    std: float

    def _moments(self, sigma: Level, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        level = expand_level(sigma, x)
        return level, (1 - level) * self.mean, (1 - level) ** 2 * self.std**2 + level**2

    def marginal(self, sigma: float) -> tuple[float, float]:
        """Return mean and std of ``x`` at a noise level."""
        return (1 - sigma) * self.mean, ((1 - sigma) ** 2 * self.std**2 + sigma**2) ** 0.5

    def score(self, x: Float[Tensor, "batch *event"], sigma: Level) -> Float[Tensor, "batch *event"]:
        """Return the gradient of the log density of ``x``."""
        _, mean, variance = self._moments(sigma, x)
        return -(x - mean) / variance

    def posterior_mean(self, x: Float[Tensor, "batch *event"], sigma: Level) -> Float[Tensor, "batch *event"]:
        """Return ``E[x0 | x]``."""
        level, mean, variance = self._moments(sigma, x)
        return self.mean + (1 - level) * self.std**2 / variance * (x - mean)

    def velocity(self, x: Float[Tensor, "batch *event"], sigma: Level) -> Float[Tensor, "batch *event"]:
        """Return ``E[noise - x0 | x]``."""
        level, mean, variance = self._moments(sigma, x)
        return -self.mean + (level - (1 - level) * self.std**2) / variance * (x - mean)

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw data, float64."""
        return self.mean + self.std * torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class MixtureWorld:
    """Data from a mixture of isotropic Gaussians of one width.

    Shapes:
        means: ``[component, dim]``.
        weights: ``[component]``, positive, summing to 1.
    """

    means: Tensor
    std: float
    weights: Tensor

    def _components(self, x: Tensor, sigma: Level) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noise level, scaled means, variance and responsibilities ``[batch, component]``."""
        level = expand_level(sigma, x)
        means = (1 - level)[..., None] * self.means.to(x) if level.ndim else (1 - level) * self.means.to(x)
        variance = (1 - level) ** 2 * self.std**2 + level**2
        distance = (x[:, None] - means).square().sum(-1)
        share = torch.softmax(self.weights.to(x).log() - distance / (2 * variance), dim=1)
        return level, means, variance, share

    def score(self, x: Float[Tensor, "batch dim"], sigma: Level) -> Float[Tensor, "batch dim"]:
        """Return the gradient of the log density of ``x``."""
        _, means, variance, share = self._components(x, sigma)
        return -(share[..., None] * (x[:, None] - means)).sum(1) / variance

    def log_density(self, x: Float[Tensor, "batch dim"], sigma: Level) -> Float[Tensor, " batch"]:
        """Return the log density of ``x``, up to the constant of the dimension."""
        level, means, variance, _ = self._components(x, sigma)
        distance = (x[:, None] - means).square().sum(-1)
        logits = self.weights.to(x).log() - distance / (2 * variance)
        return torch.logsumexp(logits, dim=1) - 0.5 * x.shape[1] * variance.flatten().log()

    def posterior_mean(self, x: Float[Tensor, "batch dim"], sigma: Level) -> Float[Tensor, "batch dim"]:
        """Return ``E[x0 | x]``."""
        level, means, variance, share = self._components(x, sigma)
        gain = (1 - level) * self.std**2 / variance
        centre = (share[..., None] * self.means.to(x)).sum(1)
        return centre + gain * (share[..., None] * (x[:, None] - means)).sum(1)

    def velocity(self, x: Float[Tensor, "batch dim"], sigma: Level) -> Float[Tensor, "batch dim"]:
        """Return ``E[noise - x0 | x]``, from the posterior mean and the score (``noise = -sigma * score``)."""
        level = expand_level(sigma, x)
        return -level * self.score(x, sigma) - self.posterior_mean(x, sigma)

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw data ``[num, dim]``, float64."""
        chosen = torch.multinomial(self.weights.double(), num, replacement=True, generator=generator)
        noise = torch.randn(num, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means.double()[chosen] + self.std * noise
