"""Qwen-Image: true guidance with each token's norm kept, texts of any length padded to one and masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, QwenImagePipeline
from torch.nn.functional import pad

from flowalign.pipelines.combine import SameNorm
from flowalign.pipelines.family import JOINT_ATTENTION, Family, ModelConfig


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """A ``QwenImagePipeline``; its latents are packed, ``[tokens, channels]`` a sample.

    Attributes:
        guidance_scale: Classifier-free guidance against the negative prompt (the pipeline's ``true_cfg_scale``); 1 for none.
        negative_prompt: Used under guidance.
        max_sequence_length: Every text is padded to this many tokens and masked, so that texts of different lengths share a batch.
    """

    model: str = "Qwen/Qwen-Image"
    guidance_scale: float = 4.0
    negative_prompt: str = " "
    max_sequence_length: int = 256

    def kind(self) -> type[DiffusionPipeline]:
        """Return the pipeline's class."""
        return QwenImagePipeline

    def family(self, pipe: Any) -> Family:
        """Say what cannot be read off."""
        factor = pipe.vae_scale_factor
        height, width = self.size(pipe, unit=2 * factor, default=pipe.default_sample_size * factor)
        last = f"transformer_blocks.{pipe.transformer.config.num_layers - 1}"
        return Family(
            denoiser="transformer",
            arguments={
                "height": height,
                "width": width,
                "true_cfg_scale": self.guidance_scale,
                "max_sequence_length": self.max_sequence_length,
            },
            targets=JOINT_ATTENTION,
            unused=(f"{last}.attn.to_add_out", f"{last}.txt_mlp"),  # the last block's text is thrown away
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt if self.guidance_scale > 1 else None,
            afters=(SameNorm(),),
            fix=self._padded,
        )

    def _padded(self, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Pad the texts of each call and say which tokens are real."""
        fixed = []
        for told in calls:
            embeds, mask = told["encoder_hidden_states"], told["encoder_hidden_states_mask"]
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
            room = self.max_sequence_length - embeds.shape[1]
            padded = {"encoder_hidden_states": pad(embeds, (0, 0, 0, room)), "encoder_hidden_states_mask": pad(mask, (0, room))}
            fixed.append(told | padded)
        return fixed
