"""Files that load anywhere: written by the pipeline's own methods, loaded back and compared before they count."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from flowalign.pipelines.economy import parts_beside
from flowalign.pipelines.fingerprint import fingerprint
from flowalign.pipelines.loaded_back import Loaded, NotAsTrained, compare_behaviour, compare_tensors
from flowalign.pipelines.loading import quiet, shapes_folder
from flowalign.pipelines.roles import CURRENT, is_within

if TYPE_CHECKING:
    from flowalign.pipelines.base import FlowPipeline

LORA_FILE = "pytorch_lora_weights.safetensors"
NOTES = "flowalign"  # what our entries of the metadata begin with
_CHECK = "loaded_back"
_BASE, _BASE_DTYPE = "base_fingerprint", "base_dtype"
_WEIGHTS = "diffusion_pytorch_model*.safetensors"  # as diffusers names them


def save(pipeline: FlowPipeline, folder: Path, role: str, notes: Mapping[str, str] | None = None) -> None:
    """Write a role next to its final place, load it back, compare, then rename; see ``FlowPipeline.save``."""
    with atomically(folder) as written:
        is_full = pipeline.roles.lora is None
        check = (_save_full if is_full else _save_lora)(pipeline, written, role, notes or {})
        checked(folder, check)


@contextmanager
def atomically(folder: Path) -> Iterator[Path]:
    """Give a place next to a folder to write to, which takes its name if nothing fails.

    What was written whole and is not as trained is kept under another name: it may be all that is left of a long run.
    """
    folder = Path(folder)
    written, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    rejected = folder.with_name(f"{folder.name}.rejected")
    for leftover in (written, old):
        shutil.rmtree(leftover, ignore_errors=True)
    written.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield written
    except NotAsTrained as error:
        shutil.rmtree(rejected, ignore_errors=True)
        os.replace(written, rejected)
        raise NotAsTrained(
            f"{folder}: loaded back, {error}; what was written is kept as {rejected}, look at its pictures before you use it"
        ) from error
    except BaseException:
        shutil.rmtree(written, ignore_errors=True)
        raise
    if folder.exists():
        os.replace(folder, old)
    os.replace(written, folder)
    shutil.rmtree(old, ignore_errors=True)


def checked(folder: Path, check: Callable[[], None]) -> None:
    """Check what was written; where there is no memory for it, keep it and say that it is unchecked."""
    try:
        check()
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"{folder}: written, but not checked, because loading it back ran out of memory ({reason}); look at its pictures "
            "(`flowalign sample MODEL PROMPT --lora FOLDER`) before you use it",
            stacklevel=2,
        )


def _save_lora(pipeline: FlowPipeline, folder: Path, role: str, notes: Mapping[str, str]) -> Callable[[], None]:
    """Write a LoRA; returns how it is checked."""
    roles, name = pipeline.roles, pipeline.family.denoiser
    if role == "reference":
        raise ValueError("save: the role 'reference' is the base itself and has no adapter to save")
    trained = roles.lora_state_dict(role)
    pipeline.pipe.save_lora_weights(
        folder,
        **{f"{name}_lora_layers": trained, f"{name}_lora_adapter_metadata": roles.lora_metadata()},
        safe_serialization=True,
    )
    _annotate(folder / LORA_FILE, {**notes, _BASE: fingerprint(roles), _BASE_DTYPE: str(pipeline.dtype).removeprefix("torch.")})
    stored = {key.removeprefix(f"{name}."): value for key, value in load_file(folder / LORA_FILE).items()}
    compare_tensors(stored, trained)  # first, so that what is loaded below has no layers but those that there are
    return partial(_check_lora, pipeline, folder, role)


def _check_lora(pipeline: FlowPipeline, folder: Path, role: str) -> None:
    """Load the file as a further adapter of the live network, as a stranger would: a second network may be too much for the device."""
    roles, pipe = pipeline.roles, with_denoiser(pipeline, pipeline.denoiser)

    def load() -> None:
        with quiet(level=logging.ERROR):  # diffusers warns that the text encoders get no adapters
            pipe.load_lora_weights(folder, adapter_name=_CHECK)

    with roles.guest(_CHECK, load):
        compare_tensors(get_peft_model_state_dict(roles.module, adapter_name=_CHECK), roles.lora_state_dict(role))
        compare_behaviour(pipeline, role, Loaded(network=roles.module, pipe=pipe, acting=lambda: roles.use(_CHECK)))


def with_denoiser(pipeline: FlowPipeline, denoiser: nn.Module) -> Any:
    """Return the pipeline with another denoiser; the parts beside it are shared."""
    other = copy.copy(pipeline.pipe)
    object.__setattr__(other, pipeline.family.denoiser, denoiser)
    return other


def _annotate(path: Path, notes: Mapping[str, str]) -> None:
    """Write notes into the file's own metadata, beside what the pipeline wrote there; loaders skip names that they do not know."""
    with safe_open(path, framework="pt") as file:
        before = file.metadata() or {}
    named = {f"{NOTES}.{name}": value for name, value in notes.items()}
    save_file(load_file(path), path, metadata={**before, **named})


def notes_of(folder: Path) -> dict[str, str]:
    """Read what a LoRA, or a pipeline whose weights were all trained, says of itself: base model, recipe, seed, scores, as far as it does.

    Raises:
        FileNotFoundError: If there is neither.
    """
    parts = sorted(Path(folder).glob(f"*/{_WEIGHTS}"))
    for path in parts if parts and not holds_lora(Path(folder)) else [_path(folder)]:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        found = {name.removeprefix(f"{NOTES}."): value for name, value in metadata.items() if name.startswith(f"{NOTES}.")}
        if found:
            return found
    return {}


def write_pipeline(pipeline: FlowPipeline, network: nn.Module, folder: Path, notes: Mapping[str, str]) -> None:
    """Write the pipeline with another denoiser, and notes into the first file of its weights."""
    with quiet(level=logging.ERROR):  # diffusers warns of parts that the pipeline does without
        with_denoiser(pipeline, network).save_pretrained(folder, safe_serialization=True)
    _forget_paths(folder)
    _annotate(min((folder / pipeline.family.denoiser).glob(_WEIGHTS)), notes)


def read_back(pipeline: FlowPipeline, network: nn.Module, folder: Path) -> nn.Module:
    """Load a written denoiser into main memory."""
    with quiet(level=logging.ERROR):
        loader: Any = type(network)
        dtype = next(network.parameters()).dtype
        found: nn.Module = loader.from_pretrained(folder, subfolder=pipeline.family.denoiser, use_safetensors=True, dtype=dtype)
    return found.eval()


def _check_full(pipeline: FlowPipeline, network: nn.Module, role: str, folder: Path) -> None:
    """Compare a written pipeline with the role that it was written from."""
    fresh = read_back(pipeline, network, folder).to(pipeline.device)
    compare_tensors(dict(fresh.named_parameters()), dict(network.named_parameters()))
    compare_parts_beside(pipeline, folder)
    compare_behaviour(pipeline, role, Loaded(network=fresh, pipe=with_denoiser(pipeline, fresh)))


def compare_parts_beside(pipeline: FlowPipeline, folder: Path) -> None:
    """Load the written parts beside the denoiser into main memory, one after the other, and compare their weights.

    Raises:
        NotAsTrained: If one differs.
    """
    for name, part in parts_beside(pipeline.pipe, pipeline.family.denoiser).items():
        with quiet(level=logging.ERROR):
            loader: Any = type(part)
            dtype = next(part.parameters()).dtype
            found = loader.from_pretrained(folder, subfolder=name, use_safetensors=True, dtype=dtype)
        try:
            compare_tensors(found.state_dict(), part.state_dict())
        except NotAsTrained as error:
            raise NotAsTrained(f"{name}: {error}") from error


def _save_full(pipeline: FlowPipeline, folder: Path, role: str, notes: Mapping[str, str]) -> Callable[[], None]:
    """Write all weights; returns how they are checked."""
    network = pipeline.roles.network(role)
    write_pipeline(pipeline, network, folder, notes)
    return partial(_check_full, pipeline, network, role, folder)


def _forget_paths(folder: Path) -> None:
    """Take the base's place on this machine out of the configurations that are handed on."""
    for path in folder.rglob("*.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and settings.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def weights_of(place: Path) -> Path:
    """Return where a run keeps its weights; of anything else the place itself."""
    return place / "weights" if (place / "weights").is_dir() else place


def holds_lora(place: Path) -> bool:
    """Tell whether there is a LoRA: a file, or a folder with one."""
    return place.suffix == ".safetensors" if place.is_file() else (place / LORA_FILE).is_file()


def _path(folder: Path) -> Path:
    path = Path(folder) if Path(folder).is_file() else Path(folder) / LORA_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no LoRA there ({LORA_FILE} is missing); give the folder that `train` named, for example RUN/weights"
        )
    return path


def _name_of(path: str) -> str:
    """Return the name by which a configuration calls a model that was loaded from a folder or the hub."""
    shipped = path and Path(path).is_dir() and Path(path).resolve() == shapes_folder().resolve()
    return "shapes" if shipped else path.rstrip("/").rpartition("/")[2]


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
    _check_base(pipeline, path)
    prefix = f"{pipeline.family.denoiser}."
    try:
        named = {key.removeprefix(prefix): value for key, value in stored.items()}
        # Other trainers write adapters of layers whose output nothing reads.
        pipeline.roles.load(CURRENT, {key: value for key, value in named.items() if not is_within(key, pipeline.roles.unused)})
    except ValueError as error:
        raise ValueError(f"{path}: not a LoRA of these layers and this base: {error}") from error


def _check_base(pipeline: FlowPipeline, path: Path) -> None:
    """Refuse a LoRA of another base, told by weights; where the file or the precision does not allow that, warn of another name."""
    notes = notes_of(path)
    trained_on, base = notes.get("base_model"), notes.get(_BASE)
    here = _name_of(str(pipeline.pipe.config.get("_name_or_path") or ""))
    if base == fingerprint(pipeline.roles):
        return
    is_half = pipeline.dtype == torch.float16 or notes.get(_BASE_DTYPE) == "float16"
    if base and not is_half:  # float16 rounds the same base to another fingerprint
        raise ValueError(
            f"{path}: is a LoRA of another base{f' ({trained_on})' if trained_on else ''} than {here or 'this model'}, whose weights differ; load the "
            "base that it was trained on, or train on this one"
        )
    if trained_on and here and trained_on.rpartition("/")[2] != here:
        warnings.warn(
            f"{path}: was trained on {trained_on}, and is loaded into {here}; if that is another model, train on it or load {trained_on}",
            stacklevel=4,
        )


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
