"""Small networks on features of a frozen denoiser: what a critic is made of."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn

from flowalign.core.randomness import generator


@dataclass(frozen=True, kw_only=True)
class Head:
    """A perceptron from features to one number; its last layer starts at 0, and so does what it says.

    Attributes:
        width: Units of each hidden layer.
        depth: Number of hidden layers.
        learning_rate: Of its AdamW, constant.
        weight_decay: Of its AdamW.
    """

    width: int = 128
    depth: int = 2
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        """Refuse sizes and rates that cannot be meant."""
        if self.width < 1 or self.depth < 1:
            raise ValueError(f"head: got width {self.width} and depth {self.depth}, needed at least 1")
        if not 0 < self.learning_rate < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ValueError("head: learning_rate must be positive and weight_decay not negative")

    def build(self, num_features: int, *, seed: int, name: str) -> nn.Module:
        """Make the network; its weights depend on the seed and the name alone.

        Examples:
            >>> head = Head(width=4).build(3, seed=0, name="critic")
            >>> head(torch.ones(2, 3)).tolist()
            [0.0, 0.0]
        """
        sizes = [num_features, *[self.width] * self.depth]
        layers: list[nn.Module] = [nn.LayerNorm(num_features)]
        for size_in, size_out in itertools.pairwise(sizes):
            layers += [nn.Linear(size_in, size_out), nn.SiLU()]
        layers += [nn.Linear(self.width, 1), nn.Flatten(0)]
        with torch.no_grad():
            for number, layer in enumerate(layer for layer in layers if isinstance(layer, nn.Linear)):
                drawn = torch.randn(layer.weight.shape, generator=generator(seed, name, number))
                last = number == self.depth
                layer.weight.copy_(torch.zeros_like(drawn) if last else drawn * layer.in_features**-0.5)
                layer.bias.zero_()
        return nn.Sequential(*layers)


def explained_variance(error: float, variance: float) -> float:
    """Return the share of a variance that a prediction explains: ``1 - error / variance``; nothing to explain gives 0.

    Args:
        error: Mean squared error of the prediction.
        variance: Mean squared error of the constant that is there without it.

    Examples:
        >>> explained_variance(0.5, 2.0), explained_variance(3.0, 2.0), explained_variance(0.0, 0.0)
        (0.75, -0.5, 0.0)
    """
    return 1 - error / variance if variance > 0 else 0.0
