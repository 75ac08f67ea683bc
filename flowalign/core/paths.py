"""Where ``x`` comes from: the straight path between data and noise, and every change of parameterisation.

``sigma`` is a float, a 0-dim tensor or one value per row. Arithmetic happens in the dtype of the inputs, and
never in less than float32, because half precision loses the small differences that all of these formulas take.
A variance-preserving process ``x_t = alpha * x0 + beta * noise`` is the same straight path seen through a change of
scale, so every model is brought here at the border and nothing downstream knows where it came from.
"""

from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Level: TypeAlias = float | Float[Tensor, ""] | Float[Tensor, " batch"]
"""One number for all rows, or one per row."""

ROUNDING = 1e-6
"""Schedules are built in float32, so a noise level may miss 1 by this much."""


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` itself if it is float32 or wider, else a float32 copy."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def widest(x: Tensor) -> Tensor:
    """Return ``x`` in float64; on devices without float64 (Apple GPUs) the copy lives on the CPU."""
    if x.device.type == "mps":
        return x.cpu().to(torch.float64)
    return x.to(torch.float64)


def expand_like(sigma: Level, x: Float[Tensor, "batch *event"]) -> Tensor:
    """Shape one number, or one number per row, so that it broadcasts over the event axes of ``x``.

    A float becomes a 0-dim float64 tensor: it keeps its precision and does not widen ``x``.

    Args:
        sigma: Float, 0-dim tensor or ``[batch]`` tensor; any range.
        x: The tensor to broadcast against; only its shape is used.

    Returns:
        A 0-dim tensor, or ``[batch, 1, ..., 1]``.

    Raises:
        ValueError: If ``sigma`` has another shape.

    Examples:
        >>> expand_like(torch.tensor([0.25, 0.5]), torch.zeros(2, 3, 4)).shape
        torch.Size([2, 1, 1])
    """
    value = sigma if isinstance(sigma, Tensor) else torch.tensor(sigma, dtype=torch.float64)
    value = at_least_float32(value)
    if value.ndim == 0:
        return value
    if value.ndim != 1 or x.ndim == 0 or value.shape[0] != x.shape[0]:
        raise ValueError(
            f"sigma: got shape {list(value.shape)} beside x of shape {list(x.shape)}; need a float, a 0-dim "
            f"tensor or one value per row (for several levels per row, repeat the rows)"
        )
    return value.reshape(-1, *[1] * (x.ndim - 1))


def expand_level(sigma: Level, x: Float[Tensor, "batch *event"], *, name: str = "sigma", positive: bool = False) -> Tensor:
    """Do what `expand_like` does for a noise level, after checking its range.

    Args:
        sigma: Noise level in [0, 1].
        x: The tensor to broadcast against.
        name: What the error message calls the level.
        positive: Refuse 0 as well, for formulas that divide by the level.

    Returns:
        A 0-dim tensor, or ``[batch, 1, ..., 1]``.

    Raises:
        ValueError: If a level is nan, below 0 or above 1, or is 0 where it must be positive.
    """
    level = expand_like(sigma, x)
    is_inside = (level >= 0) & (level <= 1 + ROUNDING)
    if positive:
        is_inside = is_inside & (level > 0)
    if not bool(is_inside.all()):
        wrong = level[~is_inside].flatten()[0].item()
        low = "above 0" if positive else "at least 0"
        raise ValueError(
            f"{name}: got {wrong}; need a noise level {low} and at most 1, where 1 is pure noise and 0 is data "
            f"(a timestep is converted first; see CONVENTIONS, section 1)"
        )
    return level


def interpolate(x0: Float[Tensor, "batch *event"], noise: Float[Tensor, "batch *event"], sigma: Level) -> Float[Tensor, "batch *event"]:
    """Mix data and noise on the straight path between them.

    Args:
        x0: Clean data.
        noise: Standard normal, same shape.
        sigma: Noise level in [0, 1].

    Returns:
        ``(1 - sigma) * x0 + sigma * noise``.

    Raises:
        ValueError: If ``sigma`` is outside [0, 1] or has a shape other than none or ``[batch]``.

    References:
        Liu et al., "Flow Straight and Fast", 2022, https://arxiv.org/abs/2209.03003, equation 1, with time reversed.

    Examples:
        >>> interpolate(torch.tensor([4.0]), torch.tensor([8.0]), 0.25)
        tensor([5.])
    """
    level = expand_level(sigma, x0)
    return (1 - level) * at_least_float32(x0) + level * at_least_float32(noise)


def velocity_to_x0(
    velocity: Float[Tensor, "batch *event"], x: Float[Tensor, "batch *event"], sigma: Level
) -> Float[Tensor, "batch *event"]:
    """Predict the clean data: ``x - sigma * velocity``.

    Raises:
        ValueError: If ``sigma`` is outside [0, 1].
    """
    return at_least_float32(x) - expand_level(sigma, x) * at_least_float32(velocity)


def velocity_to_noise(
    velocity: Float[Tensor, "batch *event"], x: Float[Tensor, "batch *event"], sigma: Level
) -> Float[Tensor, "batch *event"]:
    """Predict the noise: ``x + (1 - sigma) * velocity``.

    Raises:
        ValueError: If ``sigma`` is outside [0, 1].
    """
    return at_least_float32(x) + (1 - expand_level(sigma, x)) * at_least_float32(velocity)


def velocity_to_score(
    velocity: Float[Tensor, "batch *event"], x: Float[Tensor, "batch *event"], sigma: Level
) -> Float[Tensor, "batch *event"]:
    """Convert to the gradient of the log density of ``x`` at this noise level: ``-noise / sigma``.

    Raises:
        ValueError: If ``sigma`` is not in (0, 1]; at 0 the velocity does not determine the score.

    References:
        Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2020,
        https://arxiv.org/abs/2011.13456; Tweedie's formula in the coordinates of the straight path.
    """
    return -velocity_to_noise(velocity, x, sigma) / expand_level(sigma, x, positive=True)


def x0_to_velocity(x0: Float[Tensor, "batch *event"], x: Float[Tensor, "batch *event"], sigma: Level) -> Float[Tensor, "batch *event"]:
    """Invert `velocity_to_x0`: ``(x - x0) / sigma``.

    Raises:
        ValueError: If ``sigma`` is not in (0, 1].
    """
    return (at_least_float32(x) - at_least_float32(x0)) / expand_level(sigma, x, positive=True)


def noise_to_velocity(
    noise: Float[Tensor, "batch *event"], x: Float[Tensor, "batch *event"], sigma: Level
) -> Float[Tensor, "batch *event"]:
    """Invert `velocity_to_noise`: ``(noise - x) / (1 - sigma)``.

    Raises:
        ValueError: If ``sigma`` is not in [0, 1); at 1 the noise is ``x`` whatever the velocity.
    """
    level = expand_level(sigma, x)
    if bool((level >= 1).any()):
        raise ValueError(
            "sigma: got 1 (pure noise); need less than 1, because there the noise does not determine the velocity "
            "(start the schedule below 1, or use x0_to_velocity)"
        )
    return (at_least_float32(noise) - at_least_float32(x)) / (1 - level)


def score_to_velocity(
    score: Float[Tensor, "batch *event"], x: Float[Tensor, "batch *event"], sigma: Level
) -> Float[Tensor, "batch *event"]:
    """Invert `velocity_to_score`: ``-(sigma * score + x) / (1 - sigma)``.

    Raises:
        ValueError: If ``sigma`` is not in [0, 1).
    """
    return noise_to_velocity(-expand_level(sigma, x) * at_least_float32(score), x, sigma)


def vp_sigma(alpha: Level, beta: Level) -> Tensor:
    """Return the noise level of ``x_t = alpha * x0 + beta * noise``: ``beta / (alpha + beta)``.

    Args:
        alpha: Factor of the data, at least 0; for diffusers ``sqrt(alphas_cumprod)``.
        beta: Factor of the noise, at least 0; for diffusers ``sqrt(1 - alphas_cumprod)``.

    Returns:
        Noise level in [0, 1], 0-dim or ``[batch]``.

    Raises:
        ValueError: If a factor is negative or both are 0.

    Examples:
        >>> vp_sigma(0.8, 0.6).item()  # doctest: +ELLIPSIS
        0.428571...
    """
    data, noise = torch.as_tensor(alpha), torch.as_tensor(beta)
    if not isinstance(alpha, Tensor) and not isinstance(beta, Tensor):
        data, noise = torch.tensor([alpha, beta], dtype=torch.float64).unbind()
    if not bool(((data >= 0) & (noise >= 0) & (data + noise > 0)).all()):
        raise ValueError(
            f"alpha, beta: got {alpha}, {beta}; need both at least 0 and one of them positive (they are the factors "
            f"of data and noise, square roots of alphas_cumprod and 1 - alphas_cumprod)"
        )
    return noise / (data + noise)


def vp_to_flow(x_t: Float[Tensor, "batch *event"], alpha: Level, beta: Level) -> Float[Tensor, "batch *event"]:
    """Bring a variance-preserving state to the straight path: ``x_t / (alpha + beta)``, at `vp_sigma`."""
    return at_least_float32(x_t) / (expand_like(alpha, x_t) + expand_like(beta, x_t))


def flow_to_vp(x: Float[Tensor, "batch *event"], alpha: Level, beta: Level) -> Float[Tensor, "batch *event"]:
    """Invert `vp_to_flow`: ``(alpha + beta) * x``."""
    return at_least_float32(x) * (expand_like(alpha, x) + expand_like(beta, x))


def epsilon_to_velocity(
    epsilon: Float[Tensor, "batch *event"], x_t: Float[Tensor, "batch *event"], alpha: Level, beta: Level
) -> Float[Tensor, "batch *event"]:
    """Convert a noise prediction at ``x_t`` to a velocity: ``((alpha + beta) * epsilon - x_t) / alpha``.

    Args:
        epsilon: Predicted noise.
        x_t: Variance-preserving state, in its own scale (not divided by ``alpha + beta``).
        alpha: Factor of the data, positive.
        beta: Factor of the noise.

    Returns:
        ``noise - x0``.

    Raises:
        ValueError: If ``alpha`` is 0: pure noise says nothing about the data.
    """
    data = expand_like(alpha, x_t)
    if not bool((data > 0).all()):
        raise ValueError(
            "alpha: got 0 or less; need a positive factor of the data, because a noise prediction at pure noise does "
            "not determine x0 (use v-prediction, or start the schedule later)"
        )
    return ((data + expand_like(beta, x_t)) * at_least_float32(epsilon) - at_least_float32(x_t)) / data


def v_prediction_to_velocity(
    v: Float[Tensor, "batch *event"], x_t: Float[Tensor, "batch *event"], alpha: Level, beta: Level
) -> Float[Tensor, "batch *event"]:
    """Convert a v-prediction ``v = alpha * noise - beta * x0`` at ``x_t`` to a velocity.

    Args:
        v: Predicted v.
        x_t: Variance-preserving state, in its own scale.
        alpha: Factor of the data; ``alpha**2 + beta**2`` must be 1.
        beta: Factor of the noise.

    Returns:
        ``noise - x0 = (alpha + beta) * v + (beta - alpha) * x_t``.

    Raises:
        ValueError: If ``alpha**2 + beta**2`` is not 1 (to 1e-3, so that float16 tables pass).

    References:
        Salimans and Ho, "Progressive Distillation", 2022, https://arxiv.org/abs/2202.00512, section 4.
    """
    data, noise = expand_like(alpha, x_t), expand_like(beta, x_t)
    if not bool(((data * data + noise * noise - 1).abs() < 1e-3).all()):
        raise ValueError(
            f"alpha, beta: got {alpha}, {beta}; need alpha**2 + beta**2 = 1, which v-prediction assumes "
            f"(divide both by sqrt(alpha**2 + beta**2))"
        )
    return (data + noise) * at_least_float32(v) + (noise - data) * at_least_float32(x_t)


def velocity_to_epsilon(
    velocity: Float[Tensor, "batch *event"], x_t: Float[Tensor, "batch *event"], alpha: Level, beta: Level
) -> Float[Tensor, "batch *event"]:
    """Convert a velocity to the noise prediction at ``x_t``: ``(alpha * velocity + x_t) / (alpha + beta)``; inverts `epsilon_to_velocity`.

    Args:
        velocity: ``noise - x0``.
        x_t: Variance-preserving state, in its own scale.
        alpha: Factor of the data.
        beta: Factor of the noise.
    """
    data, noise = expand_like(alpha, x_t), expand_like(beta, x_t)
    return (data * at_least_float32(velocity) + at_least_float32(x_t)) / (data + noise)


def velocity_to_v_prediction(
    velocity: Float[Tensor, "batch *event"], x_t: Float[Tensor, "batch *event"], alpha: Level, beta: Level
) -> Float[Tensor, "batch *event"]:
    """Convert a velocity to the v-prediction at ``x_t``: ``(velocity + (alpha - beta) * x_t) / (alpha + beta)``.

    It inverts `v_prediction_to_velocity`, where ``alpha**2 + beta**2 = 1``.

    Args:
        velocity: ``noise - x0``.
        x_t: Variance-preserving state, in its own scale.
        alpha: Factor of the data.
        beta: Factor of the noise.
    """
    data, noise = expand_like(alpha, x_t), expand_like(beta, x_t)
    return (at_least_float32(velocity) + (data - noise) * at_least_float32(x_t)) / (data + noise)


def epsilon_to_score(epsilon: Float[Tensor, "batch *event"], beta: Level) -> Float[Tensor, "batch *event"]:
    """Convert a noise prediction to the score of the variance-preserving marginal: ``-epsilon / beta``.

    The score of the straight path's state ``x = x_t / (alpha + beta)`` is ``alpha + beta`` times it (`velocity_to_score`).

    Raises:
        ValueError: If ``beta`` is 0: clean data has no score.
    """
    noise = expand_like(beta, epsilon)
    if not bool((noise > 0).all()):
        raise ValueError("beta: got 0 or less; need a positive factor of the noise, because clean data has no score")
    return -at_least_float32(epsilon) / noise
