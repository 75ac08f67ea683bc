"""Which family a model belongs to, by what its own index says; `auto` where no file names it."""

from __future__ import annotations

import importlib
from typing import Any

from flowalign.pipelines.loading import index_of

FAMILIES = {
    "FluxPipeline": "flux",
    "QwenImagePipeline": "qwen_image",
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "sdxl",
    "ZImagePipeline": "z_image",
}


def family_of(model: str) -> str:
    """Name the family of a model.

    Args:
        model: Folder, hub id, or "shapes".

    Raises:
        FileNotFoundError: If the model is nowhere; what to do is said.
    """
    if model == "shapes":
        return "sd3"
    return FAMILIES.get(index_of(model).get("_class_name", ""), "auto")


def settings_of(model: str) -> Any:
    """Return the default settings of a model's family, for this model."""
    family = importlib.import_module(f"flowalign.pipelines.{family_of(model)}")
    return family.Config(model=model)
