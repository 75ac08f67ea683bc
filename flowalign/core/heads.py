"""Small networks on features of a frozen denoiser: what a critic is made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import nn

from flowalign.core.adamw import AdamW
from flowalign.core.randomness import generator


@dataclass(frozen=True, kw_only=True)
class Head(AdamW):
    """A perceptron from features to one number; its last layer starts at 0, and so does what it says.

    Attributes:
        width: Units of each hidden layer.
        depth: Number of hidden layers.
    """

    width: int = 128
    depth: int = 2

    def __post_init__(self) -> None:
        """Refuse sizes and rates that cannot be meant."""
        super().__post_init__()
        if self.width < 1 or self.depth < 1:
            raise ValueError(f"head: got width {self.width} and depth {self.depth}, needed at least 1")

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


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a head's predictions were worth on samples that it had not learnt from, step by step.

    Attributes:
        error: Mean squared error of each step.
        target: Mean of what was to be predicted.
        square: Mean of its square.
    """

    error: tuple[float, ...] = ()
    target: tuple[float, ...] = ()
    square: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.error)

    def after(self, line: Mapping[str, float], name: str, *, window: int) -> Evidence:
        """Add a step's means ``NAME/error``, ``NAME/target`` and ``NAME/square``; the last ``window`` steps stay."""
        return Evidence(**{key: (*values, line[f"{name}/{key}"])[-window:] for key, values in vars(self).items()})

    def explained(self) -> float:
        """Return the share of the variance that the predictions explain: that about the mean of all steps; nothing to explain gives 0.

        Examples:
            >>> Evidence(error=(0.5, 0.5), target=(1.0, 1.0), square=(2.0, 2.0)).explained()
            0.5
            >>> Evidence(error=(1.0,), target=(1.0,), square=(2.0,)).explained()  # no better than the best constant
            0.0
        """
        variance = sum(self._variances())
        return 1 - sum(self.error) / variance if variance > 0 else 0.0

    def is_better_than(self, share: float, *, margin: float = 3.0) -> bool:
        """Tell whether more than a share of the variance is explained, beyond doubt: by ``margin`` standard errors over the steps.

        Examples:
            >>> steps = Evidence(error=(0.5, 0.7, 0.6), target=(0.0,) * 3, square=(1.0,) * 3)
            >>> steps.is_better_than(0.0), steps.is_better_than(0.3)
            (True, False)
        """
        gains = [(1 - share) * variance - error for variance, error in zip(self._variances(), self.error, strict=True)]
        if len(gains) < 2:
            return False
        return fmean(gains) > margin * stdev(gains) / math.sqrt(len(gains))

    def _variances(self) -> list[float]:
        mean = fmean(self.target) if self.target else 0.0
        return [square - 2 * mean * target + mean**2 for square, target in zip(self.square, self.target, strict=True)]
