"""Files that load anywhere: written by the pipeline's own methods, loaded back and compared before they count."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowalign.core.plans import ode
from flowalign.pipelines.loading import quiet, shapes_folder
from flowalign.pipelines.roles import CURRENT
from flowalign.pipelines.watch import own_images

if TYPE_CHECKING:
    from flowalign.pipelines.base import FlowPipeline

LORA_FILE = "pytorch_lora_weights.safetensors"
NOTES = "flowalign"  # what our entries of the metadata begin with
_CHECK = "loaded_back"
_STEPS = 4  # of the picture that is compared; every schedule has a grid of four
_TOLERANCE = 1e-5  # relative, in float32; diffusers loads an adapter in the base's precision, so in half precision it is 5e-2


def save(pipeline: FlowPipeline, folder: Path, role: str, notes: Mapping[str, str] | None = None) -> None:
    """Write a role next to its final place, load it back, compare, then rename; see ``FlowPipeline.save``."""
    with _atomically(folder) as partial:
        if pipeline.roles.lora is None:
            _save_full(pipeline, partial, role)
        else:
            _save_lora(pipeline, partial, role, notes or {})


@contextmanager
def _atomically(folder: Path) -> Iterator[Path]:
    """Give a place next to a folder to write to, which takes its name if nothing fails."""
    folder = Path(folder)
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _save_lora(pipeline: FlowPipeline, folder: Path, role: str, notes: Mapping[str, str]) -> None:
    roles, name = pipeline.roles, pipeline.family.denoiser
    if role == "reference":
        raise ValueError("save: the role 'reference' is the base itself and has no adapter to save")
    trained = roles.lora_state_dict(role)
    pipeline.pipe.save_lora_weights(
        folder,
        **{f"{name}_lora_layers": trained, f"{name}_lora_adapter_metadata": roles.lora_metadata()},
        safe_serialization=True,
    )
    _annotate(folder / LORA_FILE, notes)
    stranger, fresh = _stranger(pipeline)
    with quiet(level=logging.ERROR):  # diffusers warns that the text encoders get no adapters
        stranger.load_lora_weights(folder, adapter_name=_CHECK)
    loaded = get_peft_model_state_dict(fresh, adapter_name=_CHECK)
    _compare_tensors(loaded, trained, folder)
    _compare_velocities(pipeline, fresh, role, folder)
    _compare_pixels(pipeline, stranger, role, folder)


def _stranger(pipeline: FlowPipeline) -> tuple[Any, nn.Module]:
    """Make a pipeline object of its own with a copy of the bare base: what a stranger would load the file into."""
    fresh = copy.deepcopy(pipeline.denoiser)
    fresh.unload_lora()
    vars(fresh).pop("forward", None)  # accelerate patches the method of the instance; a copy of the patch calls the original
    return _with(pipeline, fresh), fresh


def _with(pipeline: FlowPipeline, denoiser: nn.Module) -> Any:
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
    """Read what a LoRA file says of itself: base model, recipe, seed, scores, as far as it does.

    Raises:
        FileNotFoundError: If there is no LoRA file.
    """
    with safe_open(_path(folder), framework="pt") as file:
        metadata = file.metadata() or {}
    return {name.removeprefix(f"{NOTES}."): value for name, value in metadata.items() if name.startswith(f"{NOTES}.")}


def merge(pipeline: FlowPipeline, folder: Path, role: str = CURRENT) -> None:
    """Add a role's adapter to the base's weights and write the whole pipeline, which then needs no LoRA.

    The result is loaded back and compared with the role, by velocities and pixels, before it takes its name. It is rounded to the base's
    precision, so it equals the role within rounding, not to the bit.

    Raises:
        ValueError: If the pipeline has no adapters.
        RuntimeError: If what was written does not behave like the role.
    """
    if pipeline.roles.lora is None:
        raise ValueError("merge: the pipeline has no adapters; its weights are whole already (save it)")
    with tempfile.TemporaryDirectory() as place:
        save(pipeline, Path(place) / "lora", role)
        stranger, fresh = _stranger(pipeline)
        with quiet(level=logging.ERROR):
            stranger.load_lora_weights(Path(place) / "lora", adapter_name=_CHECK)
            fresh.fuse_lora(safe_fusing=True, adapter_names=[_CHECK])
            fresh.unload_lora()
    with _atomically(folder) as partial:
        loaded = _write_pipeline(pipeline, fresh, partial)
        _compare_tensors(dict(loaded.named_parameters()), dict(fresh.named_parameters()), partial)
        _compare_velocities(pipeline, loaded, role, partial, tolerance=1e-4)
        _compare_pixels(pipeline, _with(pipeline, loaded), role, partial)


def _write_pipeline(pipeline: FlowPipeline, network: nn.Module, folder: Path) -> nn.Module:
    """Write the pipeline with another denoiser, and load that one back."""
    name, kind = pipeline.family.denoiser, type(network)
    dtype = next(network.parameters()).dtype
    with quiet(level=logging.ERROR):  # diffusers warns of parts that the pipeline does without
        _with(pipeline, network).save_pretrained(folder, safe_serialization=True)
        _forget_paths(folder)
        loader: Any = kind
        return loader.from_pretrained(folder, subfolder=name, use_safetensors=True, dtype=dtype).to(pipeline.device).eval()


def _save_full(pipeline: FlowPipeline, folder: Path, role: str) -> None:
    with pipeline.roles.use(role) as network:
        fresh = _write_pipeline(pipeline, network, folder)
        _compare_tensors(dict(fresh.named_parameters()), dict(network.named_parameters()), folder)
    _compare_velocities(pipeline, fresh, role, folder)
    _compare_pixels(pipeline, _with(pipeline, fresh), role, folder)


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


def _compare_pixels(pipeline: FlowPipeline, stranger: Any, role: str, folder: Path) -> None:
    """Let the pipeline that the file was loaded into make a picture by its own ``__call__``, and make the same by a rollout of the role."""
    x = torch.randn(1, *pipeline.event_shape, generator=torch.Generator().manual_seed(1)).to(pipeline.device)
    stranger.set_progress_bar_config(disable=True)
    with quiet(level=logging.ERROR):
        written = own_images(pipeline, stranger, "a", x, _STEPS).float()
    trained = pipeline.decode(pipeline.rollout(pipeline.encode(["a"]), ode(_STEPS), x_init=x, noise=lambda step: x, role=role).x0)
    difference = float((written - trained).abs().max())
    if not difference <= (1e-2 if pipeline.dtype == torch.float32 else 0.25):
        raise RuntimeError(
            f"{folder}: the file that was written makes another picture than the trained weights (pixels differ by {difference:.2g})"
        )


def _compare_velocities(pipeline: FlowPipeline, fresh: nn.Module, role: str, folder: Path, *, tolerance: float = _TOLERANCE) -> None:
    x = torch.randn(2, *pipeline.event_shape, generator=torch.Generator().manual_seed(1)).to(pipeline.device)
    cond = pipeline.encode(["", "a"])
    sigma = torch.tensor(0.5)
    with torch.no_grad():  # and so never through the wrapped module, which would wait for other ranks
        trained = pipeline.velocity(x, sigma, cond, role)
        written = pipeline.replayed(fresh, x, sigma, cond)
    difference = float((written - trained).norm() / trained.norm())
    if not difference <= (tolerance if pipeline.dtype == torch.float32 else 5e-2):
        raise RuntimeError(
            f"{folder}: the file that was written does not behave like the trained weights (relative difference {difference:.2g})"
        )


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
    base = notes_of(path).get("base_model")
    here = _name_of(str(pipeline.pipe.config.get("_name_or_path") or ""))
    if base and here and base.rpartition("/")[2] != here:
        warnings.warn(
            f"{path}: was trained on {base}, and is loaded into {here}; if that is another model, train on it or load {base}", stacklevel=3
        )
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
