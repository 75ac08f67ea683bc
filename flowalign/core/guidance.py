"""Classifier-free guidance."""

from jaxtyping import Float
from torch import Tensor


def guide(
    unconditional: Float[Tensor, "batch *event"], conditional: Float[Tensor, "batch *event"], scale: float
) -> Float[Tensor, "batch *event"]:
    """Return ``unconditional + scale * (conditional - unconditional)``, in this order of operations (diffusers' own, to the last bit).

    Args:
        unconditional: Prediction for the empty or negative prompt.
        conditional: Prediction for the prompt.
        scale: 0 is unconditional, 1 conditional; more exaggerates the prompt.

    Returns:
        The guided prediction; gradient flows through both.

    References:
        Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, https://arxiv.org/abs/2207.12598, equation 6 with scale = 1 + w.
    """
    return unconditional + scale * (conditional - unconditional)
