"""Z-Image and Z-Image-Turbo: lists of samples, reversed time, guidance added to the conditional prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline, ZImagePipeline

from flowalign.pipelines.combine import LimitedNorm
from flowalign.pipelines.family import Family, ModelConfig

TARGETS = ("attention.to_k", "attention.to_out.0", "attention.to_q", "attention.to_v")


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """A ``ZImagePipeline``.

    Attributes:
        guidance_scale: What is added of (conditional - unconditional); none up to 1, which Turbo takes.
        cfg_normalization: Largest norm of a guided prediction, in norms of the conditional one; 0 for no limit.
        max_sequence_length: Tokens of the text encoder; shorter texts stay shorter.
    """

    model: str = "Tongyi-MAI/Z-Image-Turbo"
    num_steps: int = 9
    guidance_scale: float = 0.0
    cfg_normalization: float = 0.0
    max_sequence_length: int = 512

    def kind(self) -> type[DiffusionPipeline]:
        """Return the pipeline's class."""
        return ZImagePipeline

    def family(self, pipe: Any) -> Family:
        """Say what cannot be read off."""
        height, width = self.size(pipe, unit=2 * pipe.vae_scale_factor, default=1024)
        return Family(
            denoiser="transformer",
            arguments={
                "height": height,
                "width": width,
                "guidance_scale": self.guidance_scale,
                "cfg_normalization": self.cfg_normalization,
                "max_sequence_length": self.max_sequence_length,
            },
            targets=TARGETS,
            guidance_scale=self.guidance_scale,
            afters=(LimitedNorm(self.cfg_normalization),) if self.cfg_normalization > 0 else (),
        )
