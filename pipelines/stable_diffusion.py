"""Stable Diffusion 1.x and 2.x: a UNet that predicts noise or v on a variance-preserving schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from flowalign.pipelines.combine import Rescale
from flowalign.pipelines.family import Family, ModelConfig

# The default of diffusers' training script for UNets: every self- and cross-attention.
TARGETS = ("to_k", "to_out.0", "to_q", "to_v")


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """A ``StableDiffusionPipeline``; whatever its scheduler, it is sampled by DDIM on the same training schedule.

    Attributes:
        guidance_scale: Classifier-free guidance in rollout and training; 1 for none.
        guidance_rescale: Share by which guided predictions get the spread of conditional ones back (2.x with zero terminal SNR: 0.7).
        timestep_spacing: Where the schedule's steps lie, as diffusers' schedulers have it; null for the model's own. A student of few steps needs
            "trailing", which begins at noise also for one step.
    """

    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    num_steps: int = 20
    guidance_scale: float = 5.0
    guidance_rescale: float = 0.0
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None

    def kind(self) -> type[DiffusionPipeline]:
        """Return the pipeline's class."""
        return StableDiffusionPipeline

    def without(self) -> dict[str, Any]:
        """Leave the safety checker out: it would replace images by black ones, which rewards cannot tell from bad ones."""
        return {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False}

    def load(self, *, device: str | torch.device = "cpu") -> Any:
        """Load the bare pipeline, its schedule spaced as the settings say."""
        return self.spaced(super().load(device=device))

    def spaced(self, pipe: Any) -> Any:
        """Space a pipeline's schedule as the settings say."""
        if self.timestep_spacing is not None:
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing=self.timestep_spacing)
        return pipe

    def family(self, pipe: Any) -> Family:
        """Say what cannot be read off."""
        height, width = self.size(pipe, unit=8, default=pipe.unet.config.sample_size * pipe.vae_scale_factor)
        return Family(
            denoiser="unet",
            arguments={
                "height": height,
                "width": width,
                "guidance_scale": self.guidance_scale,
                "guidance_rescale": self.guidance_rescale,
            },
            targets=TARGETS,
            guidance_scale=self.guidance_scale,
            afters=(Rescale(self.guidance_rescale),) if self.guidance_rescale > 0 else (),
        )
