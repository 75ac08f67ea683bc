"""Load a diffusers pipeline from a folder, the hub or the package, with errors that say what to do."""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers.utils.logging as diffusers_logging
import torch
import transformers.utils.logging as transformers_logging
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

INDEX = "model_index.json"
# As in model.fp16.safetensors, model.fp16-00001-of-00002.safetensors and model-00001-of-00002.fp16.safetensors.
_VARIANT = re.compile(r"\.([A-Za-z0-9_]+)(?:-\d+-of-\d+)?\.safetensors$")


def index_of(model: str) -> dict[str, Any]:
    """Read which class and parts a model names.

    Args:
        model: Folder, hub id, or "shapes".

    Raises:
        FileNotFoundError: If the model is nowhere; what to do is said.
    """
    index = (shapes_folder() if model == "shapes" else Path(model).expanduser()) / INDEX
    if index.parent.is_dir() and not index.is_file():
        raise FileNotFoundError(f"{model}: has no {INDEX}, so it is no diffusers pipeline")
    try:
        found: dict[str, Any] = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else DiffusionPipeline.load_config(model)
    except (OSError, HFValidationError) as error:
        near = difflib.get_close_matches(model, ["shapes"], cutoff=0.5)
        raise FileNotFoundError(
            f"{model}: no such folder, and not to be had from the hub ({str(error).splitlines()[0]}). Check the name, accept its licence on "
            f"its page and log in with `hf auth login`, or download it once and give the folder{'; did you mean shapes?' if near else ''}"
        ) from error
    return found


def shapes_folder() -> Path:
    """Return the folder of the pipeline that ships with flowalign, seen from the package or from the repository's top level."""
    here = Path(__file__)
    candidates = [here.parent.parent / "shapes" / "pipeline", here.resolve().parent.parent / "flowalign" / "shapes" / "pipeline"]
    return next((folder for folder in candidates if (folder / INDEX).is_file()), candidates[0])


def check_device(dtype: str, device: str | torch.device) -> None:
    """Refuse float16 on a CPU.

    Raises:
        ValueError: With what to use instead.
    """
    if dtype == "float16" and torch.device(device).type == "cpu":
        raise ValueError("pipeline.dtype: float16 is not usable on a CPU (slow and inaccurate); use float32")


def load(kind: type[DiffusionPipeline], model: str, *, dtype: torch.dtype, variant: str | None = None, **options: Any) -> DiffusionPipeline:
    """Load a pipeline in safetensors only.

    Args:
        kind: The pipeline class.
        model: A folder, a hub id, or "shapes".
        dtype: Precision of all networks.
        variant: Files ``*.VARIANT.safetensors`` are read where a part has them.
        options: Parts to leave out (None) and settings of the pipeline's constructor.

    Raises:
        FileNotFoundError: If there is no such folder and the hub does not give it.
        ValueError: If the folder holds another kind of pipeline, no safetensors or broken ones.
    """
    folder = shapes_folder() if model == "shapes" else Path(model).expanduser()
    if model == "shapes" and not folder.is_dir():
        raise FileNotFoundError(
            f"pipeline.model: 'shapes' is {folder}, which is missing; reinstall flowalign or run `flowalign shapes pretrain`"
        )
    local = folder.is_dir()
    if not local and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise FileNotFoundError(f"pipeline.model: {model!r} is neither a folder nor a hub id such as 'owner/name'")
    absent = _absent(kind, folder) if local else {}
    if local:
        _check_variant(folder, variant)
    told = {} if variant is None else {"variant": variant}
    try:
        with quiet():
            pipe = kind.from_pretrained(str(folder) if local else model, dtype=dtype, use_safetensors=True, **told, **(absent | options))
    except (OSError, HFValidationError, SafetensorError) as error:
        broken = _broken(folder) if local else []
        if broken or isinstance(error, SafetensorError):
            raise ValueError(
                f"pipeline.model: {', '.join(map(str, broken)) or model}: not a safetensors file, or truncated ({error}); download it again (in a git "
                "clone, `git lfs pull`)"
            ) from error
        raise FileNotFoundError(
            f"pipeline.model: {'' if local else 'no such folder, and as a hub model '}{model!r} could not be loaded: {error}. For a hub "
            "model check its name, accept its licence on its page and log in with `hf auth login`, or download it once and give the folder. "
            "One that has only files such as *.fp16.safetensors needs pipeline.variant: fp16"
        ) from error
    if not isinstance(pipe, kind):
        raise ValueError(f"pipeline.model: {model!r} is a {type(pipe).__name__}, needed a {kind.__name__}")
    return pipe


def _absent(kind: type[DiffusionPipeline], folder: Path) -> dict[str, None]:
    """Check a folder; name the parts that it was saved without, which ``from_pretrained`` wants to be told (a missing third encoder)."""
    index = folder / INDEX
    if not index.is_file():
        raise FileNotFoundError(f"pipeline.model: {folder} has no {INDEX}, so it is no diffusers pipeline")
    if not list(folder.rglob("*.safetensors")):
        raise ValueError(f"pipeline.model: {folder} has no safetensors; convert it with save_pretrained(safe_serialization=True)")
    parts = json.loads(index.read_text(encoding="utf-8"))
    if parts.get("_class_name") != kind.__name__:
        raise ValueError(f"pipeline.model: {folder} is a {parts.get('_class_name')}, needed a {kind.__name__}")
    needed = [name for name, parameter in inspect.signature(kind).parameters.items() if parameter.default is inspect.Parameter.empty]
    return {name: None for name in needed if parts.get(name, [None, None])[0] is None}


def _broken(folder: Path) -> list[Path]:
    """Name the files of weights that cannot be opened."""
    found = []
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            found.append(path)
    return found


def _check_variant(folder: Path, variant: str | None) -> None:
    """Refuse a folder with a part that has no files of the wanted variant and none without one."""
    parts: dict[Path, set[str | None]] = {}
    for path in folder.rglob("*.safetensors"):
        found = _VARIANT.search(path.name)
        parts.setdefault(path.parent, set()).add(found[1] if found else None)
    known = sorted({name for names in parts.values() for name in names if name is not None})
    if variant is not None and variant not in known:
        raise ValueError(
            f"pipeline.variant: got {variant!r}, but {folder} has no *.{variant}.safetensors (variants there: {', '.join(known) or 'none'}); set another, "
            "or variant: null"
        )
    for part, names in sorted(parts.items()):
        if not names & {None, variant}:
            have = ", ".join(sorted(str(name) for name in names))
            raise ValueError(
                f"pipeline.variant: {part} has only weights of the variant {have}, got variant: {variant or 'null'}; set pipeline.variant: {min(map(str, names))}"
            )


@contextmanager
def quiet(*, level: int | None = None) -> Iterator[None]:
    """Switch the libraries' progress bars off for a moment.

    Args:
        level: Also raise their log levels to this meanwhile.
    """
    before = [(log, log.is_progress_bar_enabled()) for log in (diffusers_logging, transformers_logging)]
    levels = [(log, log.get_verbosity()) for log in (diffusers_logging, transformers_logging)]
    for log, _ in before:
        log.disable_progress_bar()
    for log, _ in levels if level is not None else ():
        log.set_verbosity(level)
    try:
        yield
    finally:
        for log, verbosity in levels:
            log.set_verbosity(verbosity)
        for log, enabled in before:
            if enabled:
                log.enable_progress_bar()
