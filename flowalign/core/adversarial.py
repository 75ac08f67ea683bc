"""Losses of a discriminator that estimates the density ratio: its logit of a noised sample tends to ``log p - log q``."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from flowalign.core.paths import at_least_float32


def discriminator_loss(
    real: Float[Tensor, "real heads"], generated: Float[Tensor, "generated heads"]
) -> tuple[Float[Tensor, " real"], Float[Tensor, " generated"]]:
    """Return the logistic loss of each real and each generated row, a mean over heads.

    The sum of both means is least at ``log p_real - log p_generated`` at every noise level, if both are noised to levels of one distribution.

    Args:
        real: Logits of noised data, or of samples of the teacher.
        generated: Logits of noised samples of the student.

    Returns:
        ``softplus(-real)`` and ``softplus(generated)``, at least float32.

    References:
        Yin et al., "Improved Distribution Matching Distillation" (DMD2), 2024, https://arxiv.org/abs/2405.14867, section 4.3.
    """
    return softplus(-at_least_float32(real)).mean(1), softplus(at_least_float32(generated)).mean(1)


def generator_loss(generated: Float[Tensor, "generated heads"]) -> Float[Tensor, " generated"]:
    """Return what the student adds to its loss to look real: ``softplus(-generated)``, a mean over heads; gradient flows through the logits."""
    return softplus(-at_least_float32(generated)).mean(1)


def approximate_r1(real: Float[Tensor, "real heads"], disturbed: Float[Tensor, "real heads"]) -> Float[Tensor, " real"]:
    """Return the squared change of the logits when their input is disturbed a little, a mean over heads.

    Args:
        real: Logits of noised data ``x`` at a noise level.
        disturbed: Logits of ``x`` plus a small normal disturbance, at the same noise level.

    Raises:
        ValueError: If the shapes differ.

    References:
        Lin et al., "Diffusion Adversarial Post-Training", 2025, https://arxiv.org/abs/2501.08316, section 3: the penalty without second derivatives.
        Deviation from the released code of f-distill: that disturbs clean data and compares across noise levels.
    """
    if real.shape != disturbed.shape:
        raise ValueError(f"approximate_r1: got logits of shapes {list(real.shape)} and {list(disturbed.shape)}, needed equal ones")
    return (at_least_float32(real) - at_least_float32(disturbed)).square().mean(1)


def accuracy(real: Float[Tensor, "real heads"], generated: Float[Tensor, "generated heads"]) -> Float[Tensor, ""]:
    """Return the share of logits with the right sign, real and generated rows in equal parts; 1/2 where the two cannot be told apart.

    Examples:
        >>> import torch
        >>> accuracy(torch.tensor([[1.0], [2.0]]), torch.tensor([[-1.0], [1.0]]))
        tensor(0.7500)
    """
    return ((real > 0).float().mean() + (generated < 0).float().mean()) / 2
