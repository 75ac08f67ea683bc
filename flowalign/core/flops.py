"""Floating-point operations of networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    plain, named = [_detached(value) for value in args], {name: _detached(value) for name, value in kwargs.items()}
    with torch.no_grad():
        return flops_of(lambda: module.forward(*plain, **named))


def flops_of(work: Callable[[], Any]) -> float:
    """Count the operations of matrix products, convolutions and attention; compiled blocks run uncompiled meanwhile."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
