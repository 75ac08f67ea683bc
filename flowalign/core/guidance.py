"""Classifier-free guidance."""

from torch import Tensor


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Return ``unconditional + scale * (conditional - unconditional)``, in this order of operations (diffusers' own, to the last bit).

    References:
        Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, https://arxiv.org/abs/2207.12598, equation 6 with scale = 1 + w.
    """
    return unconditional + scale * (conditional - unconditional)
