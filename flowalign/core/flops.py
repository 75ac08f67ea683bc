"""Floating-point operations of networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

DIFFERENTIATED = 3.0  # forwards that one with its backward is worth: the backward costs one for the inputs and one for the weights


def flops_of(work: Callable[[], Any]) -> float:
    """Count the operations of matrix products, convolutions and attention; compiled blocks run uncompiled meanwhile.

    Args:
        work: What to count, which is done.

    Returns:
        Operations; a multiplication and an addition are two.

    Examples:
        >>> layer = torch.nn.Linear(3, 5)
        >>> flops_of(lambda: layer(torch.zeros(2, 3)))
        60.0
    """
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())
