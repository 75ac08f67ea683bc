"""Files that load anywhere: written by the pipeline's own methods, loaded back and compared before they count."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from flowalign.pipelines.loading import quiet
from flowalign.pipelines.roles import CURRENT

if TYPE_CHECKING:
    from flowalign.pipelines.base import FlowPipeline

LORA_FILE = "pytorch_lora_weights.safetensors"
_CHECK = "loaded_back"
_TOLERANCE = 1e-5  # relative, in float32; diffusers loads an adapter in the base's precision, so in half precision it is 5e-2


def save(pipeline: FlowPipeline, folder: Path, role: str) -> None:
    """Write a role next to its final place, load it back, compare, then rename; see ``FlowPipeline.save``."""
    folder = Path(folder)
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        if pipeline.roles.lora is None:
            _save_full(pipeline, partial, role)
        else:
            _save_lora(pipeline, partial, role)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _save_lora(pipeline: FlowPipeline, folder: Path, role: str) -> None:
    roles, name = pipeline.roles, pipeline.family.denoiser
    if role == "reference":
        raise ValueError("save: the role 'reference' is the base itself and has no adapter to save")
    trained = roles.lora_state_dict(role)
    pipeline.pipe.save_lora_weights(
        folder,
        **{f"{name}_lora_layers": trained, f"{name}_lora_adapter_metadata": roles.lora_metadata()},
        safe_serialization=True,
    )
    # A pipeline object of its own with a copy of the bare base: what a stranger would load the file into.
    fresh = copy.deepcopy(pipeline.denoiser)
    fresh.unload_lora()
    vars(fresh).pop("forward", None)  # accelerate patches the method of the instance; a copy of the patch calls the original
    stranger = copy.copy(pipeline.pipe)
    object.__setattr__(stranger, name, fresh)
    with quiet(level=logging.ERROR):  # diffusers warns that the text encoders get no adapters
        stranger.load_lora_weights(folder, adapter_name=_CHECK)
    loaded = get_peft_model_state_dict(fresh, adapter_name=_CHECK)
    _compare_tensors(loaded, trained, folder)
    _compare_velocities(pipeline, fresh, role, folder)


def _save_full(pipeline: FlowPipeline, folder: Path, role: str) -> None:
    pipe, name = pipeline.pipe, pipeline.family.denoiser
    with pipeline.roles.use(role) as network:
        saved = copy.copy(pipe)
        object.__setattr__(saved, name, network)
        kind: Any = type(network)
        dtype = next(network.parameters()).dtype
        with quiet(level=logging.ERROR):  # diffusers warns of parts that the pipeline does without
            saved.save_pretrained(folder, safe_serialization=True)
            _forget_paths(folder)
            fresh = kind.from_pretrained(folder, subfolder=name, use_safetensors=True, dtype=dtype).to(pipeline.device).eval()
        _compare_tensors(dict(fresh.named_parameters()), dict(network.named_parameters()), folder)
    _compare_velocities(pipeline, fresh, role, folder)


def _forget_paths(folder: Path) -> None:
    """Take the base's place on this machine out of the configurations that are handed on."""
    for path in folder.rglob("*.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and settings.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _compare_tensors(written: Mapping[str, Tensor], trained: Mapping[str, Tensor], folder: Path) -> None:
    if written.keys() != trained.keys():
        raise RuntimeError(f"{folder}: loaded back, the file has other tensors, for example {sorted(set(written) ^ set(trained))[0]}")
    for key, tensor in trained.items():
        if not torch.equal(written[key], tensor.to(written[key].dtype)):
            raise RuntimeError(f"{folder}: loaded back, {key} is not what was trained")


def _compare_velocities(pipeline: FlowPipeline, fresh: nn.Module, role: str, folder: Path) -> None:
    x = torch.randn(2, *pipeline.event_shape, generator=torch.Generator().manual_seed(1)).to(pipeline.device)
    cond = pipeline.encode(["", "a"])
    sigma = torch.tensor(0.5)
    with torch.no_grad():  # and so never through the wrapped module, which would wait for other ranks
        trained = pipeline.velocity(x, sigma, cond, role)
        written = pipeline.replayed(fresh, x, sigma, cond)
    difference = float((written - trained).norm() / trained.norm())
    if not difference <= (_TOLERANCE if pipeline.dtype == torch.float32 else 5e-2):
        raise RuntimeError(
            f"{folder}: the file that was written does not behave like the trained weights (relative difference {difference:.2g})"
        )


def _path(folder: Path) -> Path:
    path = Path(folder) if Path(folder).is_file() else Path(folder) / LORA_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no LoRA there ({LORA_FILE} is missing); give the folder that `train` named, for example RUN/weights"
        )
    return path


def load(pipeline: FlowPipeline, folder: Path) -> None:
    """Load a LoRA file into ``current``; see ``FlowPipeline.load_lora``.

    Raises:
        FileNotFoundError: If there is no LoRA file.
        ValueError: If it is not a LoRA of this model, or the pipeline was built with another rank, alpha or other targets.
    """
    path = _path(folder)
    lora = pipeline.roles.lora
    if lora is None:
        raise ValueError(f"{path}: the pipeline was built without adapters; build it with lora=LoRA(...) of the file's settings")
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or truncated ({error})") from error
    rank, alpha, _ = settings(path)
    if rank != lora.rank or alpha != lora.alpha:
        raise ValueError(f"{path}: has rank {rank} and alpha {alpha:g}, the pipeline was built with {lora.rank} and {lora.alpha:g}")
    prefix = f"{pipeline.family.denoiser}."
    try:
        pipeline.roles.load(CURRENT, {key.removeprefix(prefix): value for key, value in stored.items()})
    except ValueError as error:
        raise ValueError(f"{path}: not a LoRA of these layers and this base: {error}") from error


def settings(folder: Path) -> tuple[int, float, tuple[str, ...]]:
    """Read rank, alpha and targets of a LoRA file from its metadata.

    Raises:
        FileNotFoundError: If there is no LoRA file.
        ValueError: If the file has no metadata of an adapter.
    """
    path = _path(folder)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get("lora_adapter_metadata")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or truncated ({error})") from error
    if metadata is None:
        raise ValueError(f"{path}: has no adapter metadata (rank, alpha, targets); load it with diffusers' load_lora_weights instead")
    flat = json.loads(metadata)
    found = {key.rpartition(".")[2]: value for key, value in flat.items()}
    return int(found["r"]), float(found["lora_alpha"]), tuple(found["target_modules"])
