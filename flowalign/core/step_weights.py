"""Step weights: how much the transitions of each trained step count, as a positive factor on their advantages."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

StepWeight: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From std, sigma and sigma_next of the trained steps, ``[steps]`` each, to a weight for each of them."""


def uniform(std: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Count all steps alike."""
    return torch.ones_like(std)


def noise_aware(std: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Weigh a step by its noise, divided by the mean over the trained steps: the weights have mean 1.

    The score function's gradient grows as 1 / std, so late steps outweigh early ones by far; times the std it is the response of the step's
    mean to the velocity.

    References:
        He et al., "TempFlow-GRPO", 2025, https://arxiv.org/abs/2508.04324, equations 7 and 8. Deviation: none; the released code's constants
        2.25 (SD3, noise level 0.7, 10 steps) and 1.73 (FLUX) are 1 over this mean on their grids.

    Examples:
        >>> noise_aware(torch.tensor([0.2, 0.6]), torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.0]))
        tensor([0.5000, 1.5000])
    """
    return std / std.mean()


def inverse_step(std: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Weigh a step by 1 / (sigma - sigma_next).

    References:
        Wang et al., "GRPO-Guard", 2025, https://arxiv.org/abs/2510.22319, and its released code, which divides the loss by the step size.
    """
    return 1 / (sigma - sigma_next)
