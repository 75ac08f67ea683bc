"""Files that load anywhere: written by the pipeline's own methods, loaded back and compared before they count."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from flowalign.pipelines.base import FlowPipeline

LORA_FILE = "pytorch_lora_weights.safetensors"
_CHECK = "loaded_back"
_TOLERANCE = 1e-4  # relative; a reloaded float32 adapter agrees to rounding


def save(pipeline: FlowPipeline, folder: Path, role: str) -> None:
    """Write a role next to its final place, load it back, compare, then rename; see ``FlowPipeline.save``."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        if pipeline.roles.lora is None:
            _save_full(pipeline, partial, role)
        else:
            _save_lora(pipeline, partial, role)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _probe_velocity(pipeline: FlowPipeline, role: str | None) -> Tensor:
    """Velocity of a role, or of the network as it is, on a fixed input."""
    x = torch.randn(2, *pipeline.event_shape, generator=torch.Generator().manual_seed(1)).to(pipeline.device)
    cond = pipeline.encode([""]).take(torch.zeros(2, dtype=torch.int64, device=pipeline.device))
    module, pipeline.module = pipeline.module, pipeline.denoiser
    try:
        with torch.no_grad():
            return pipeline.velocity(x, torch.tensor(0.5), cond, role or "current")
    finally:
        pipeline.module = module


def _compare(written: Tensor, trained: Tensor, folder: Path) -> None:
    difference = float((written - trained).norm() / trained.norm())
    if not difference <= _TOLERANCE:
        raise RuntimeError(
            f"{folder}: the file that was written does not behave like the trained weights (relative difference {difference:.2g})"
        )


def _save_lora(pipeline: FlowPipeline, folder: Path, role: str) -> None:
    roles, pipe, name = pipeline.roles, pipeline.pipe, pipeline.family.denoiser
    pipe.save_lora_weights(
        folder,
        **{f"{name}_lora_layers": roles.lora_state_dict(role), f"{name}_lora_adapter_metadata": roles.lora_metadata()},
        safe_serialization=True,
    )
    trained = _probe_velocity(pipeline, role)
    pipe.load_lora_weights(folder, adapter_name=_CHECK)
    try:
        pipeline.denoiser.set_adapter(_CHECK)
        written = _probe_velocity(pipeline, None)
    finally:
        pipeline.denoiser.delete_adapters([_CHECK])
        with roles.use("reference" if "reference" in roles.names else "current"):
            pass
        roles._select("current")
    _compare(written, trained, folder)


def _save_full(pipeline: FlowPipeline, folder: Path, role: str) -> None:
    pipe, name = pipeline.pipe, pipeline.family.denoiser
    trained = _probe_velocity(pipeline, role)
    with pipeline.roles.use(role) as other:
        chosen = pipeline.denoiser if other is None else other
        held = vars(pipe).get(name, None), chosen
        object.__setattr__(pipe, name, chosen)
        try:
            pipe.save_pretrained(folder, safe_serialization=True)
        finally:
            object.__setattr__(pipe, name, held[0] if held[0] is not None else pipeline.denoiser)
    loaded = type(pipeline.denoiser).from_pretrained(folder, subfolder=name, use_safetensors=True, torch_dtype=pipeline.dtype)
    module, pipeline.module = pipeline.module, loaded.to(pipeline.device).eval()
    denoiser, pipeline.denoiser = pipeline.denoiser, pipeline.module
    try:
        written = _probe_velocity(pipeline, None)
    finally:
        pipeline.module, pipeline.denoiser = module, denoiser
    _compare(written, trained, folder)


def load(pipeline: FlowPipeline, folder: Path) -> None:
    """Load a LoRA file into ``current``; see ``FlowPipeline.load_lora``.

    Raises:
        FileNotFoundError: If there is no LoRA file.
        ValueError: If it is not a LoRA of this model, or the pipeline was built with another rank or other targets.
    """
    path = folder if folder.is_file() else folder / LORA_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no LoRA there ({LORA_FILE} is missing); give the folder that `train` named, for example RUN/weights"
        )
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or truncated ({error})") from error
    prefix = f"{pipeline.family.denoiser}."
    tensors = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    mine = pipeline.roles.parameters("current")
    if tensors.keys() != mine.keys():
        extra = sorted(set(tensors) ^ set(mine))[:2]
        raise ValueError(f"{path}: not a LoRA of these layers and this base (for example {', '.join(extra) or 'no tensors at all'})")
    pipeline.roles.load_state_dict({"current": tensors})


def settings(folder: Path) -> tuple[int, float, tuple[str, ...]]:
    """Read rank, alpha and targets of a LoRA file from its metadata.

    Raises:
        FileNotFoundError: If there is no LoRA file.
        ValueError: If the file has no metadata of an adapter.
    """
    import json

    from safetensors import safe_open

    path = folder if folder.is_file() else folder / LORA_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no LoRA there ({LORA_FILE} is missing); give the folder that `train` named, for example RUN/weights"
        )
    with safe_open(path, framework="pt") as file:
        metadata = (file.metadata() or {}).get("lora_adapter_metadata")
    if metadata is None:
        raise ValueError(f"{path}: has no adapter metadata (rank, alpha, targets); load it with diffusers' load_lora_weights instead")
    flat = json.loads(metadata)
    found = {key.rpartition(".")[2]: value for key, value in flat.items()}
    return int(found["r"]), float(found["lora_alpha"]), tuple(found["target_modules"])
