"""Training beside a float16 network: losses are scaled, so that gradients on their way through it do not vanish."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flowalign.core.algorithm import Algorithm, HasHeads
from flowalign.core.distillation import Distillation

FIRST, GROWTH_INTERVAL = 2.0**16, 2000  # as in torch.amp.GradScaler


@dataclass(kw_only=True)
class LossScale:
    """A factor on the loss, halved where gradients overflow and doubled after many that did not.

    Whether they overflow is read off their norm, which is the same on every process, also where weights are shared.

    Attributes:
        value: The factor.
        kept: Updates since it last changed.

    References:
        Micikevicius et al., "Mixed Precision Training", 2018, https://arxiv.org/abs/1710.03740, section 3.2.

    Examples:
        >>> scale = LossScale(value=8.0)
        >>> scale.overflows(loss=1.0, norm=float("inf")), scale.value
        (True, 4.0)
        >>> scale.overflows(loss=1.0, norm=2.0), scale.value
        (False, 4.0)
    """

    value: float = FIRST
    kept: int = 0

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide gradients by the factor."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self.value)

    def overflows(self, *, loss: float, norm: float) -> bool:
        """Tell whether an update must be left out, because the factor was too large for its gradients; adapts the factor.

        A loss that is not finite, and a gradient that is not finite at a factor of 1, is no question of the factor: False.
        """
        if math.isfinite(norm):
            self.kept += 1
            if self.kept == GROWTH_INTERVAL:
                self.value, self.kept = 2 * self.value, 0
            return False
        if not math.isfinite(loss) or self.value <= 1:
            return False
        self.value, self.kept = self.value / 2, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Factor and count."""
        return {"value": self.value, "kept": self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.value, self.kept = state["value"], state["kept"]


def scale_for(dtype: torch.dtype, algorithm: Algorithm) -> LossScale | None:
    """Return the scale that training beside a network of a precision needs; None for none.

    Raises:
        ValueError: If the algorithm trains several networks in float16.
    """
    if dtype != torch.float16:
        return None
    if isinstance(algorithm, HasHeads | Distillation):
        raise ValueError(
            "pipeline.dtype: got float16, but this algorithm trains several networks by each other's gradients, which have no common scale; take "
            "bfloat16 or float32"
        )
    return LossScale()
