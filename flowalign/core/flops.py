"""Floating-point operations of a network's forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

DIFFERENTIATED = 3.0  # forwards that one with its backward is worth: the backward costs one for the inputs and one for the weights


def forward_flops(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """Count the operations of one forward pass by making it, past the module's own hooks and without gradient.

    Args:
        module: The network.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        Operations of matrix products, convolutions and attention; a multiplication and an addition are two.

    Examples:
        >>> forward_flops(nn.Linear(3, 5), [torch.zeros(2, 3)], {})
        60.0
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.forward(*map(_detached, args), **{name: _detached(value) for name, value in kwargs.items()})
    return float(counter.get_total_flops())


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
