"""The coordinates in which a pipeline keeps its states; everything downstream is a flow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from flowalign.core.paths import (
    epsilon_to_velocity,
    flow_to_vp,
    v_prediction_to_velocity,
    vp_to_flow,
    widest,
    x0_to_velocity,
)


class Frame(Protocol):
    """From a pipeline's own coordinates to those of the straight path, and back."""

    def state(self, shown: Tensor, sigma: Tensor) -> Tensor:
        """Bring the pipeline's latents to the straight path."""
        ...

    def shown(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Invert ``state``, up to rounding."""
        ...

    def velocity(self, output: Tensor, shown: Tensor, sigma: Tensor) -> Tensor:
        """Convert what the pipeline predicts at its latents to a velocity, float32."""
        ...

    def clock(self, sigma: Tensor) -> Tensor:
        """Return the number in which the denoiser's timestep is affine."""
        ...

    @property
    def known(self) -> tuple[float, float]:
        """The least noisy and the noisiest level that the denoiser was trained at."""
        ...


@dataclass(frozen=True)
class Flow:
    """A flow-matching pipeline: its latents are the states, its prediction is the velocity."""

    def state(self, shown: Tensor, sigma: Tensor) -> Tensor:
        """Return the latents."""
        return shown

    def shown(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the state."""
        return x

    def velocity(self, output: Tensor, shown: Tensor, sigma: Tensor) -> Tensor:
        """Return the prediction."""
        return output.float()

    def clock(self, sigma: Tensor) -> Tensor:
        """Return the noise level."""
        return sigma

    @property
    def known(self) -> tuple[float, float]:
        """All of them."""
        return 0.0, 1.0


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """A pipeline whose latents are ``alpha * x0 + beta * noise`` with ``alpha**2 + beta**2 = 1``.

    Attributes:
        prediction: What its denoiser predicts.
        levels: Noise level ``beta / (alpha + beta)`` of each training timestep, ``[timesteps]`` float32, increasing.
    """

    prediction: Literal["epsilon", "v_prediction", "sample"]
    levels: Tensor = field(repr=False)

    def state(self, shown: Tensor, sigma: Tensor) -> Tensor:
        """Divide by ``alpha + beta``."""
        return vp_to_flow(shown, *factors(sigma))

    def shown(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Multiply by ``alpha + beta``."""
        return flow_to_vp(x, *factors(sigma))

    def velocity(self, output: Tensor, shown: Tensor, sigma: Tensor) -> Tensor:
        """Convert the prediction; see `flowalign.core.paths`.

        Raises:
            ValueError: If noise is predicted at pure noise, which says nothing about the data.
        """
        alpha, beta = factors(sigma)
        if self.prediction == "epsilon":
            return epsilon_to_velocity(output, shown, alpha, beta)
        if self.prediction == "v_prediction":
            return v_prediction_to_velocity(output, shown, alpha, beta)
        return x0_to_velocity(output, vp_to_flow(shown, alpha, beta), sigma)

    def clock(self, sigma: Tensor) -> Tensor:
        """Return the timestep of a noise level; between two training timesteps it is a fraction, linear in the level."""
        levels = self.levels.to(sigma.device)
        low = (torch.searchsorted(levels, sigma.float().contiguous(), right=True) - 1).clamp(0, len(levels) - 2)
        share = (sigma.float() - levels[low]) / (levels[low + 1] - levels[low])
        return low + share.clamp(0, 1)

    @property
    def known(self) -> tuple[float, float]:
        """Those of the first and the last training timestep."""
        return float(self.levels[0]), float(self.levels[-1])


def factors(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``alpha`` and ``beta`` of a noise level on the variance-preserving path, float32.

    In float64 inside, so that a level alone and the same level in a batch give the same bits.
    """
    noise = widest(sigma)
    data = 1 - noise
    norm = torch.sqrt(data * data + noise * noise)
    return (data / norm).to(sigma.device, torch.float32), (noise / norm).to(sigma.device, torch.float32)


def enter(frame: Frame, x: Tensor, sigma: Tensor, *, start: int, is_trained: bool) -> tuple[Tensor, Tensor]:
    """Begin a rollout: from what it is given to the state and to the latents that the pipeline sees.

    Args:
        frame: The pipeline's coordinates.
        x: At ``start`` 0 the noise that a pipeline takes as its first latents, else the state.
        sigma: Noise level there, 0-dim.
        start: First step.
        is_trained: Whether a replay will begin from this state: then the pipeline is shown what the replay will show. Else it keeps its
            own bits, which going to the straight path and back may change in the last place.

    Returns:
        State, and latents.
    """
    state = frame.state(x, sigma) if start == 0 else x
    return state, (frame.shown(state, sigma) if is_trained or start else x)
