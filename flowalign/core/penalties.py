"""Penalties: distances between two roles, each in one stated unit."""

from jaxtyping import Float
from torch import Tensor

from flowalign.core.kernels import Reduction, gaussian_kl, reduce_event
from flowalign.core.paths import Level, at_least_float32


def velocity_mse(velocity: Float[Tensor, "batch *event"], other: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
    """Return the mean squared difference of two velocities, one number per row.

    Raises:
        ValueError: If the shapes differ.
    """
    if velocity.shape != other.shape:
        raise ValueError(f"velocity_mse: got shapes {list(velocity.shape)} and {list(other.shape)}, needed equal ones")
    return reduce_event((at_least_float32(velocity) - at_least_float32(other)).square(), "mean")


def scaled_kernel_kl(
    mean: Float[Tensor, "batch *event"],
    mean_other: Float[Tensor, "batch *event"],
    std: Level,
    sigma: Level,
    sigma_next: Level,
    *,
    reduction: Reduction,
) -> Float[Tensor, " batch"]:
    """Return the Gaussian KL times ``sigma - sigma_next``, the unit of Flow-GRPO's released code.

    Its published coefficients 0.04 and 0.01 belong to this unit; for the true KL (`flowalign.core.gaussians.gaussian_kl`) use a tenth.

    Args:
        mean: Mean of the transition of the model that is trained.
        mean_other: Mean of the reference's transition by the same kernel.
        std: Std of both, positive.
        sigma: Noise level before the step.
        sigma_next: Noise level after it.
        reduction: ``"mean"`` is per latent element, the unit of those coefficients.

    Returns:
        One number per row, at least 0.

    Raises:
        ValueError: If ``std`` is 0 or the shapes differ.

    References:
        Liu et al., "Flow-GRPO", 2025, https://arxiv.org/abs/2505.05470, equation 10.
        Deviation: that is the true KL; the factor comes from the released code, whose std leaves out ``sqrt(sigma - sigma_next)``.
    """
    return gaussian_kl(mean, mean_other, std, reduction=reduction) * (sigma - sigma_next)
