"""Stable Diffusion XL: a larger UNet, two text encoders, sizes among its conditions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

from flowalign.pipelines import stable_diffusion


@dataclass(frozen=True, kw_only=True)
class Config(stable_diffusion.Config):
    """A ``StableDiffusionXLPipeline``, with the settings of `stable_diffusion`; what is more here can be read off.

    Attributes:
        model: Folder, or hub id.
    """

    model: str = "stabilityai/stable-diffusion-xl-base-1.0"

    def kind(self) -> type[DiffusionPipeline]:
        """Return the pipeline's class."""
        return StableDiffusionXLPipeline

    def without(self) -> dict[str, Any]:
        """Leave out the parts of image prompts, and the watermark, which changes pixels."""
        return {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}
