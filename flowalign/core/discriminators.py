"""A discriminator on the blocks of a frozen denoiser: one small head for each tapped block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowalign.core.adamw import AdamW
from flowalign.core.randomness import generator


@dataclass(frozen=True, kw_only=True)
class Discriminator(AdamW):
    """What judges samples, and how it is trained.

    Attributes:
        taps: Blocks of the denoiser that are read: a share of its depth, or a module's name. Published for transformers: 0.5, 0.75 and 0.99; for
            U-Nets the middle block alone ("mid_block").
        width: Units of each head's hidden layers.
        r1: Weight of the approximate R1 penalty; 0 for none, which saves a pass.
        r1_noise: Size of the disturbance that the penalty compares with.
    """

    taps: tuple[float | str, ...] = (0.5, 0.75, 0.99)
    width: int = 64
    r1: float = 0.0
    r1_noise: float = 0.1

    def __post_init__(self) -> None:
        """Refuse sizes and rates that cannot be meant."""
        super().__post_init__()
        if not self.taps or any(not isinstance(tap, str) and not 0 <= tap < 1 for tap in self.taps):
            raise ValueError(
                f"discriminator: taps: got {list(self.taps)}, needed shares of the depth in [0, 1) or names of modules, at least one"
            )
        if self.width < 1:
            raise ValueError(f"discriminator: width: got {self.width}, needed at least 1")
        if self.r1 < 0 or self.r1_noise <= 0:
            raise ValueError(f"discriminator: got r1 {self.r1} and r1_noise {self.r1_noise}, needed at least 0 and a positive size")

    def build(self, channels: Sequence[int], *, seed: int) -> nn.Module:
        """Make the network for taps of so many channels each; its weights depend on the seed alone, and at first it says 0 of everything.

        Examples:
            >>> judge = Discriminator(width=4).build([3, 5], seed=0)
            >>> judge([torch.ones(2, 7, 3), torch.ones(2, 7, 5)]).tolist()
            [[0.0, 0.0], [0.0, 0.0]]
        """
        heads = Heads(channels, self.width)
        with torch.no_grad():
            for number, layer in enumerate(layer for layer in heads.modules() if isinstance(layer, nn.Linear)):
                drawn = torch.randn(layer.weight.shape, generator=generator(seed, "discriminator", number))
                layer.weight.copy_(torch.zeros_like(drawn) if layer.out_features == 1 else drawn * layer.in_features**-0.5)
                layer.bias.zero_()
        return heads


class Heads(nn.Module):
    """Look at every token of a tap alike, pool, and give one logit for each tap."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.tokens = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(size), nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()) for size in channels
        )
        self.pooled = nn.ModuleList(nn.Linear(2 * width, 1) for _ in channels)

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        """Judge.

        Args:
            taps: ``[rows, tokens, channels]`` float32 each.

        Returns:
            Logits ``[rows, taps]``, positive for what looks real.
        """
        logits = []
        for tap, tokens, pooled in zip(taps, self.tokens, self.pooled, strict=True):
            seen = tokens(tap)
            logits.append(pooled(torch.cat([seen.mean(1), seen.amax(1)], 1)))
        return torch.cat(logits, 1)
