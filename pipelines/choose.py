"""Which family a model belongs to, by what its own index says; `auto` where no file names it."""

from __future__ import annotations

import difflib
import importlib
import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError

from flowalign.pipelines.loading import INDEX

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
    index = Path(model).expanduser() / INDEX
    if index.parent.is_dir() and not index.is_file():
        raise FileNotFoundError(f"{model}: has no {INDEX}, so it is no diffusers pipeline")
    try:
        settings = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else DiffusionPipeline.load_config(model)
    except (OSError, HFValidationError) as error:
        near = difflib.get_close_matches(model, ["shapes"], cutoff=0.5)
        raise FileNotFoundError(
            f"{model}: no such folder, and not to be had from the hub ({str(error).splitlines()[0]}). Check the name, accept its licence on "
            f"its page and log in with `hf auth login`, or download it once and give the folder{'; did you mean shapes?' if near else ''}"
        ) from error
    return FAMILIES.get(settings.get("_class_name", ""), "auto")


def settings_of(model: str) -> Any:
    """Return the default settings of a model's family, for this model."""
    family = importlib.import_module(f"flowalign.pipelines.{family_of(model)}")
    return family.Config(model=model)
