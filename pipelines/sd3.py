"""Stable Diffusion 3 and 3.5, and the shipped shapes pipeline, which is one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor

from flowalign.pipelines.base import Family, FlowPipeline
from flowalign.pipelines.conditioning import Conditioning
from flowalign.pipelines.loading import check_device, load
from flowalign.pipelines.roles import LoRA

# Flow-GRPO's targets for SD3.5 (config/grpo.py).
TARGETS = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A ``StableDiffusion3Pipeline``.

    Attributes:
        model: Folder, hub id, or "shapes" for the pipeline that ships with flowalign.
        num_steps: Denoising steps of rollouts.
        guidance_scale: Classifier-free guidance in rollout and training; 1 for none.
        height: Pixels; None for the model's own size.
        width: Pixels; None for the model's own size.
        max_sequence_length: Tokens of the T5 encoder.
        dtype: What the networks compute in; latents, log-probs and adapters stay float32.
        lora: Adapters to train; null trains all weights of the denoiser.
        gradient_checkpointing: Trade compute for memory in training.
    """

    model: str = "shapes"
    num_steps: int = 10
    guidance_scale: float = 1.0
    height: int | None = None
    width: int | None = None
    max_sequence_length: int = 256
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    lora: LoRA | None = field(default_factory=LoRA)
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no pipeline takes."""
        if self.num_steps < 1:
            raise ValueError(f"num_steps: got {self.num_steps}, needed at least 1")
        if self.guidance_scale < 1:
            raise ValueError(f"guidance_scale: got {self.guidance_scale}, needed at least 1 (1 is no guidance)")

    def build(self, *, device: str | torch.device = "cpu", seed: int = 0) -> FlowPipeline:
        """Load the model and put adapters on it.

        Args:
            device: Where to put it.
            seed: Seed of the adapters' first weights.

        Raises:
            FileNotFoundError: If the model is nowhere.
            ValueError: If it is not an SD3 pipeline, or cannot make this size, or the device cannot compute in this precision.
        """
        check_device(self.dtype, device)
        pipe = load(StableDiffusion3Pipeline, self.model, dtype=getattr(torch, self.dtype)).to(device)
        if self.gradient_checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
        return FlowPipeline(pipe, self._family(pipe), self.lora, num_steps=self.num_steps, seed=seed)

    def _family(self, pipe: DiffusionPipeline) -> Family:
        config = pipe.transformer.config
        factor = pipe.vae_scale_factor
        default = pipe.default_sample_size * factor
        height, width = self.height or default, self.width or default
        unit, most = factor * config.patch_size, factor * config.patch_size * config.pos_embed_max_size
        for name, size in (("height", height), ("width", width)):
            if size % unit or not unit <= size <= most:
                raise ValueError(f"pipeline.{name}: this model makes multiples of {unit} pixels up to {most}, got {size}")
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
            targets=TARGETS,
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
