"""Heads of linear layers without anything between them, folded into the one affine map that they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LAYERS = (0, 2, 4, 6, 7)  # of the published heads; dropout stands between, which does nothing in evaluation


@dataclass(frozen=True)
class Affine:
    """``x @ weight + bias`` for ``x [batch, d]``, computed in float32 from a map folded in float64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``[batch]``."""
        return x.float() @ self.weight.to(x.device, torch.float32) + self.bias.to(x.device, torch.float32)


def fold(state: Mapping[str, Tensor], prefix: str, where: str) -> Affine:
    """Fold the layers ``{prefix}{number}.weight`` and ``.bias`` into one map.

    Raises:
        ValueError: If a layer is missing or does not fit the one before.
    """
    names = [f"{prefix}{number}" for number in LAYERS]
    missing = next((f"{name}.{part}" for name in names for part in ("weight", "bias") if f"{name}.{part}" not in state), None)
    if missing is not None:
        raise ValueError(
            f"{where}: the weights lack {missing!r}; it is another kind of file (it holds {', '.join(sorted(state)[:3])}, ...)"
        )
    weight = torch.eye(state[f"{names[0]}.weight"].shape[1], dtype=torch.float64)
    bias = torch.zeros(len(weight), dtype=torch.float64)
    for name in names:
        layer = state[f"{name}.weight"].double().cpu()
        if layer.shape[1] != weight.shape[0]:
            raise ValueError(f"{where}: layer {name!r} takes {layer.shape[1]} values, but the one before gives {weight.shape[0]}")
        weight, bias = layer @ weight, layer @ bias + state[f"{name}.bias"].double().cpu()
    if len(weight) != 1:
        raise ValueError(f"{where}: the head gives {len(weight)} values, needed 1")
    return Affine(weight=weight[0], bias=bias[0])
