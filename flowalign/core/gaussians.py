"""Densities and divergences of the Gaussians that kernels return, one number per row."""

import math
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.core.paths import Level, at_least_float32, expand_like

Reduction: TypeAlias = Literal["sum", "mean"]
"""How a quantity per latent element becomes one per row. There is no default: published constants depend on it."""


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
        ValueError: If ``std`` is 0 (a deterministic step has no density), negative or nan, or the shapes differ.
        FloatingPointError: If a result is not finite; names the row.

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
        ValueError: If ``std`` is 0, negative or nan, or the shapes differ.
        FloatingPointError: If a result is not finite; names the row.

    References:
        Liu et al., "Flow-GRPO", 2025, https://arxiv.org/abs/2505.05470, equation 10.
        Deviation: the released code leaves ``sqrt(sigma - sigma_next)`` out of the std, so its KL is this one times
        ``sigma - sigma_next``; see `flowalign.core.penalties.scaled_kernel_kl`.

    Examples:
        >>> gaussian_kl(torch.ones(1, 4), torch.zeros(1, 4), 0.5, reduction="mean")
        tensor([2.])
    """
    _check_std(std, "gaussian_kl")
    _check_same_shape(mean, mean_other, "gaussian_kl")
    deviation = (at_least_float32(mean) - at_least_float32(mean_other)) / expand_like(std, mean)
    return _finite_rows(0.5 * reduce_event(deviation * deviation, reduction), "gaussian_kl")


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
        raise FloatingPointError(
            f"{where}: row {first} is {rows[first].item()}; need finite states (look for nan or inf in the velocity, "
            f"and keep latents in float32)"
        )
    return rows
