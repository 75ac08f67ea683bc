"""FLUX.1: dev (guidance embedded) and schnell (none), with true guidance where asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from diffusers import DiffusionPipeline, FluxPipeline

from flowalign.pipelines.family import JOINT_ATTENTION, Family, ModelConfig

# The default of diffusers' own training script: attention and feed-forward of the double blocks, attention of the single ones.
TARGETS = (*JOINT_ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """A ``FluxPipeline``; its latents are packed, ``[tokens, channels]`` a sample.

    Attributes:
        guidance_scale: What the denoiser is told (dev); models without guidance embedding (schnell) ignore it.
        true_cfg_scale: Classifier-free guidance against the empty prompt, by a second call; 1 for none.
        max_sequence_length: Tokens of the T5 encoder; schnell takes at most 256.
    """

    model: str = "black-forest-labs/FLUX.1-dev"
    guidance_scale: float = 3.5
    true_cfg_scale: float = 1.0
    max_sequence_length: int = 512

    def guided(self, scale: float, pipe: Any) -> Self:
        """Return the settings with true guidance, for a model that is told of none."""
        if pipe.transformer.config.guidance_embeds and self.guidance_scale > 1:
            raise ValueError(
                f"got {scale}, but this model is told of guidance already (pipeline.guidance_scale: {self.guidance_scale}), as teacher, student and fake score "
                "alike; set algorithm.guidance_scale to 1, or pipeline.guidance_scale to 1 for guidance by a second pass alone"
            )
        return replace(self, true_cfg_scale=scale)

    def kind(self) -> type[DiffusionPipeline]:
        """Return the pipeline's class."""
        return FluxPipeline

    def family(self, pipe: Any) -> Family:
        """Say what cannot be read off."""
        if self.true_cfg_scale < 1:
            raise ValueError(f"pipeline.true_cfg_scale: got {self.true_cfg_scale}, needed at least 1 (1 is none)")
        factor = pipe.vae_scale_factor
        height, width = self.size(pipe, unit=2 * factor, default=pipe.default_sample_size * factor)
        return Family(
            denoiser="transformer",
            arguments={
                "height": height,
                "width": width,
                "guidance_scale": self.guidance_scale,
                "true_cfg_scale": self.true_cfg_scale,
                "max_sequence_length": self.max_sequence_length,
            },
            targets=TARGETS,
            guidance_scale=self.true_cfg_scale,
            negative_prompt="" if self.true_cfg_scale > 1 else None,
        )
