"""Load a diffusers pipeline from a folder, the hub or the package, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError


def shapes_folder() -> Path:
    """Return the folder of the pipeline that ships with flowalign, seen from the package or from the repository's top level."""
    here = Path(__file__)
    candidates = [here.parent.parent / "shapes" / "pipeline", here.resolve().parent.parent / "flowalign" / "shapes" / "pipeline"]
    return next((folder for folder in candidates if (folder / "model_index.json").is_file()), candidates[0])


def check_device(dtype: str, device: str | torch.device) -> None:
    """Refuse float16 on a CPU.

    Raises:
        ValueError: With what to use instead.
    """
    if dtype == "float16" and torch.device(device).type == "cpu":
        raise ValueError("pipeline.dtype: float16 is not usable on a CPU (slow and inaccurate); use float32")


def load(kind: type[DiffusionPipeline], model: str, *, dtype: torch.dtype) -> DiffusionPipeline:
    """Load a pipeline in safetensors only.

    Args:
        kind: The pipeline class.
        model: A folder, a hub id, or "shapes".
        dtype: Precision of all networks.

    Raises:
        FileNotFoundError: If there is no such folder and the hub does not give it.
        ValueError: If the folder holds another kind of pipeline or no safetensors.
    """
    folder = shapes_folder() if model == "shapes" else Path(model)
    local = folder.is_dir()
    if local and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"pipeline.model: {folder} has no model_index.json, so it is no diffusers pipeline")
    if local and not list(folder.rglob("*.safetensors")):
        raise ValueError(f"pipeline.model: {folder} has no safetensors; convert it with save_pretrained(safe_serialization=True)")
    if not local and (model == "shapes" or model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise FileNotFoundError(f"pipeline.model: {model!r} is neither a folder nor a hub id such as 'owner/name'")
    try:
        pipe = kind.from_pretrained(str(folder) if local else model, dtype=dtype, use_safetensors=True)
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"pipeline.model: {model!r} could not be loaded: {error}. For a hub model check its name, accept its licence on its page and log in "
            f"with `hf auth login`, or download it once and give the folder"
        ) from error
    if not isinstance(pipe, kind):
        raise ValueError(f"pipeline.model: {model!r} is a {type(pipe).__name__}, needed a {kind.__name__}")
    return pipe
