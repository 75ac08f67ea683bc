"""How a helper network is optimised: the settings that critics, fake scores and discriminators share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Rates of a player's own AdamW.

    Attributes:
        learning_rate: After the warm-up of the run (``train.warmup``).
        betas: Decays of its moments.
        weight_decay: Decoupled weight decay.
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        """Refuse rates that cannot be meant."""
        if not 0 < self.learning_rate < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"got learning_rate {self.learning_rate} and weight_decay {self.weight_decay}, needed a positive number and one of at least 0"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {list(self.betas)}, needed two values in [0, 1)")

    def over(self, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        """Make the optimizer of some parameters."""
        return torch.optim.AdamW(parameters, lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay)
