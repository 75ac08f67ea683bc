"""Weights of f-divergences: how strongly each sample of a student is pushed towards its teacher."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

WEIGHTS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "reverse_kl": torch.ones_like,
        "softened_reverse_kl": lambda log_ratio: torch.sigmoid(-log_ratio),
        "jensen_shannon": torch.sigmoid,
        "squared_hellinger": lambda log_ratio: torch.exp(log_ratio / 2) / 4,
        "forward_kl": torch.exp,
        "jeffreys": lambda log_ratio: torch.exp(log_ratio) + 1,
    }
)
"""``h`` as a function of ``log r``, by name."""


def weight(name: str, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return ``h(r) = r**2 * f''(r)``, the factor of a sample in the gradient of an f-divergence.

    | name | f(r) | h(r) |
    |---|---|---|
    | reverse_kl | -log r | 1 |
    | softened_reverse_kl | (r + 1) log(1/2 + 1/(2r)) | 1 / (r + 1) |
    | jensen_shannon (twice the usual) | r log r - (r + 1) log((r + 1)/2) | r / (r + 1) |
    | squared_hellinger | 1 - sqrt(r) | sqrt(r) / 4 |
    | forward_kl | r log r | r |
    | jeffreys | (r - 1) log r | r + 1 |

    Args:
        name: A name from the table.
        log_ratio: ``log r = log p_teacher - log q_student`` at the student's samples.

    Returns:
        Non-negative weights, neither clipped nor normalised: large ratios give large weights, and past
        ``log r = 88`` the unbounded ones overflow float32.

    Raises:
        ValueError: If the name is unknown or a ratio is nan.

    References:
        Xu et al., "One-step Diffusion Models with f-Divergence Distribution Matching", 2025,
        https://arxiv.org/abs/2502.15681, table 1. Deviation: none (the released code leaves out constant factors).

    Examples:
        >>> weight("jensen_shannon", torch.tensor([0.0]))
        tensor([0.5000])
    """
    if name not in WEIGHTS:
        raise ValueError(f"divergence: got {name!r}; need one of {', '.join(WEIGHTS)}")
    if bool(torch.isnan(log_ratio).any()):
        raise ValueError("log_ratio: got nan; need numbers (check the discriminator that estimates the ratio)")
    return WEIGHTS[name](log_ratio)
