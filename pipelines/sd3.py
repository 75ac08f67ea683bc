"""Stable Diffusion 3 and 3.5, and the shipped shapes pipeline, which is one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor

from flowalign.pipelines.conditioning import Conditioning
from flowalign.pipelines.family import JOINT_ATTENTION, Family, ModelConfig


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """A ``StableDiffusion3Pipeline``; LoRA targets are Flow-GRPO's for SD3.5 (its config/grpo.py).

    Attributes:
        model: Folder, hub id, or "shapes" for the pipeline that ships with flowalign.
        guidance_scale: Classifier-free guidance in rollout and training; 1 for none.
        max_sequence_length: Tokens of the T5 encoder.
    """

    model: str = "shapes"
    max_sequence_length: int = 256

    def __post_init__(self) -> None:
        """Refuse values that no pipeline takes."""
        super().__post_init__()
        if self.guidance_scale < 1:
            raise ValueError(f"guidance_scale: got {self.guidance_scale}, needed at least 1 (1 is no guidance)")

    def kind(self) -> type[DiffusionPipeline]:
        """Return the pipeline's class."""
        return StableDiffusion3Pipeline

    def family(self, pipe: Any) -> Family:
        """Say what cannot be read off."""
        config, factor = pipe.transformer.config, pipe.vae_scale_factor
        unit = factor * config.patch_size
        height, width = self.size(pipe, unit=unit, default=pipe.default_sample_size * factor, most=unit * config.pos_embed_max_size)
        guided = self.guidance_scale > 1
        return Family(
            denoiser="transformer",
            arguments={
                "height": height,
                "width": width,
                "guidance_scale": self.guidance_scale,
                "max_sequence_length": self.max_sequence_length,
            },
            guidance_scale=self.guidance_scale,
            event_shape=(config.in_channels, height // factor, width // factor),
            embeds=lambda cond: _embeds(cond, guided),
            decode=_decode,
            targets=JOINT_ATTENTION,
            untargeted=("attn2",),  # of SD 3.5 Medium's first blocks, as published
        )


def _embeds(cond: Conditioning, guided: bool) -> Mapping[str, Any]:
    embeds, pooled = cond.halves("encoder_hidden_states"), cond.halves("pooled_projections")
    given = {"prompt_embeds": embeds[-1], "pooled_prompt_embeds": pooled[-1]}
    if guided:
        given |= {"negative_prompt_embeds": embeds[0], "negative_pooled_prompt_embeds": pooled[0]}
    return given


def _decode(pipe: DiffusionPipeline, x: Tensor) -> Tensor:
    latents = (x / pipe.vae.config.scaling_factor) + pipe.vae.config.shift_factor
    images: Tensor = pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0], output_type="pt")
    return images
