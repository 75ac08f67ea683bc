"""Grids of noise levels: decreasing, ``steps + 1`` values, from 1 to 0."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def shift_sigmas(sigmas: Float[Tensor, " levels"], shift: float) -> Float[Tensor, " levels"]:
    """Move noise levels towards 1, as if the latents had more elements.

    Args:
        sigmas: Noise levels in [0, 1].
        shift: Positive; 1 changes nothing, 3 is the choice of SD3.

    Returns:
        ``shift * s / (1 + (shift - 1) * s)``; 0 and 1 stay where they are.

    Raises:
        ValueError: If ``shift`` is not positive or a level is outside [0, 1].

    References:
        Esser et al., "Scaling Rectified Flow Transformers", 2024, https://arxiv.org/abs/2403.03206, equation 23
        (``shift = sqrt(m / n)``).

    Examples:
        >>> shift_sigmas(torch.tensor([1.0, 0.5, 0.0]), 3.0)
        tensor([1.0000, 0.7500, 0.0000])
    """
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift: got {shift}; need a positive number (1 leaves the grid as it is)")
    if not bool(((sigmas >= 0) & (sigmas <= 1)).all()):
        raise ValueError("sigmas: need noise levels in [0, 1]; divide timesteps by num_train_timesteps first")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def linear_sigmas(num_steps: int, *, dtype: torch.dtype = torch.float32) -> Float[Tensor, " levels"]:
    """Return the even grid ``1, 1 - 1/n, ..., 0``.

    Raises:
        ValueError: If ``num_steps`` is not positive.

    Examples:
        >>> linear_sigmas(4)
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000])
    """
    _check_steps(num_steps)
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).to(dtype)


def flow_sigmas(
    num_steps: int, *, shift: float = 3.0, num_train_timesteps: int = 1000, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " levels"]:
    """Return the grid that diffusers gives SD3: spaced evenly between shifted ends, then shifted again.

    Args:
        num_steps: Number of steps.
        shift: The scheduler's ``shift``.
        num_train_timesteps: The scheduler's; the last level before 0 is ``1 / num_train_timesteps``, shifted twice.
        dtype: Of the result; the arithmetic is float64.

    Returns:
        ``[num_steps + 1]`` decreasing levels from exactly 1 to exactly 0.

    Raises:
        ValueError: If ``num_steps`` or ``shift`` is not positive, or ``num_train_timesteps`` is below 2.

    References:
        ``FlowMatchEulerDiscreteScheduler`` of diffusers, with its double shift. Deviation: float64 inside, so values
        agree with the scheduler's to 1e-6, not to the last bit; a pipeline uses its scheduler's own grid.
    """
    _check_steps(num_steps)
    if num_train_timesteps < 2:
        raise ValueError(f"num_train_timesteps: got {num_train_timesteps}; need at least 2 (usually 1000)")
    smallest = torch.tensor([1 / num_train_timesteps], dtype=torch.float64)
    lowest = shift_sigmas(smallest, shift).item()
    even = torch.linspace(1, lowest, num_steps, dtype=torch.float64)
    return _close_with_zero(shift_sigmas(even, shift)).to(dtype)


def flux_mu(num_tokens: int) -> float:
    """Return FLUX's time shift for an image of ``num_tokens`` latent tokens (1024 for 512 x 512 pixels).

    References:
        The line through (256, 0.5) and (4096, 1.15) of the FLUX pipeline's ``calculate_shift``.

    Examples:
        >>> round(flux_mu(1024), 6)
        0.63
    """
    return 0.5 + (num_tokens - 256) * (1.15 - 0.5) / (4096 - 256)


def flux_sigmas(num_steps: int, *, mu: float, dtype: torch.dtype = torch.float32) -> Float[Tensor, " levels"]:
    """Return the grid that diffusers gives FLUX: even from 1 to ``1 / num_steps``, then shifted by ``exp(mu)``.

    Args:
        num_steps: Number of steps.
        mu: Logarithm of the shift; see `flux_mu`.
        dtype: Of the result; the arithmetic is float64.

    Returns:
        ``[num_steps + 1]`` decreasing levels from exactly 1 to exactly 0.

    Raises:
        ValueError: If ``num_steps`` is not positive or ``mu`` is not finite.

    References:
        The exponential ``time_shift`` of diffusers: ``exp(mu) / (exp(mu) + 1/s - 1)``, which is `shift_sigmas` with
        ``shift = exp(mu)``.
    """
    _check_steps(num_steps)
    if not math.isfinite(mu):
        raise ValueError(f"mu: got {mu}; need a finite number, such as flux_mu(1024)")
    even = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
    return _close_with_zero(shift_sigmas(even, math.exp(mu))).to(dtype)


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}; need at least 1")


def _close_with_zero(levels: Tensor) -> Tensor:
    return torch.cat([levels, levels.new_zeros(1)])
