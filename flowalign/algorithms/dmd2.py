"""DMD2: distribution matching with the reverse Kullback-Leibler divergence, whose weight is constant."""

from __future__ import annotations

from dataclasses import dataclass

from flowalign.core.distillation import Settings
from flowalign.core.distiller import Distiller


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Distil the pipeline into a student of one or a few steps; see the settings that all distillations share.

    With ``adversarial_weight: 0`` there is no discriminator.
    """

    def build(self) -> DMD2:
        """Make the algorithm."""
        return DMD2(self)


@dataclass(frozen=True)
class DMD2(Distiller):
    """See ``Config``.

    References:
        Yin et al., "Improved Distribution Matching Distillation for Fast Image Synthesis" (DMD2), 2024, https://arxiv.org/abs/2405.14867. Deviations:
        the discriminator reads the frozen teacher's blocks and compares with its samples; critics and student begin as adapters on one base.
    """

    config: Config
