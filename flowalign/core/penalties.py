"""Penalties: distances between two roles, each in one stated unit."""

from jaxtyping import Float
from torch import Tensor

from flowalign.core.kernels import Reduction, gaussian_kl, reduce_event
from flowalign.core.paths import Level, at_least_float32


def velocity_mse(velocity: Float[Tensor, "batch *event"], other: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
    """Return the mean squared difference of two velocities, one number per row."""
    return reduce_event((at_least_float32(velocity) - at_least_float32(other)).square(), "mean")


def scaled_kernel_kl(
    mean: Float[Tensor, "batch *event"],
    mean_other: Float[Tensor, "batch *event"],
    std: Level,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    reduction: Reduction,
) -> Float[Tensor, " batch"]:
    """Return the Gaussian KL times ``sigma - sigma_next``, the unit of Flow-GRPO's released code.

    Its published coefficients 0.04 and 0.01 belong to this unit; for the true KL (`flowalign.core.kernels.gaussian_kl`) use 0.004 and 0.001.
    """
    return gaussian_kl(mean, mean_other, std, reduction=reduction) * (sigma - sigma_next)
