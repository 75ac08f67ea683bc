"""Where the weights of reward models come from: a folder, a file, or the hub's cache; never a pickle that runs code."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

WEIGHT_FILES = ("*.safetensors", "*.bin")  # what transformers loads out of a folder


def device_of(name: str | None) -> torch.device:
    """Return the device of a configuration: the named one, else the current accelerator, else the CPU."""
    if name is not None:
        return torch.device(name)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found


def pretrained(load: Callable[..., Any], name: str, where: str, *, unneeded: tuple[str, ...] = (), **options: Any) -> Any:
    """Load a model, tokenizer or processor through its ``from_pretrained``.

    A network is refused when weights of it are missing in the files: transformers would fill them with random numbers, and so would
    the scores be. ``unneeded`` names beginnings of weights that play no part in a score.

    Raises:
        FileNotFoundError: If the files are not there, with the command that gets them.
        ValueError: If weights are missing in them.
    """
    try:
        loaded = load(name, **options)
    except OSError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"{where}: {name!r} is neither a folder with the needed files nor in the hub's cache ({reason}); run: hf download {name}"
        ) from error
    except RuntimeError as error:  # sizes that do not fit the configuration beside them
        raise ValueError(
            f"{where}: {name!r} holds weights of other sizes than its config.json says ({str(error).splitlines()[0]})"
        ) from error
    if isinstance(loaded, tuple):
        model, info = loaded
        missing = sorted(key for key in info["missing_keys"] if not key.startswith(unneeded))
        if missing:
            raise ValueError(
                f"{where}: {name!r} lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]!r}; it is another kind of model"
            )
        return model
    return loaded


def network(load: Callable[..., Any], name: str, where: str, *, dtype: str, device: torch.device, unneeded: tuple[str, ...] = ()) -> Any:
    """Load a network for scoring: evaluation mode, frozen, on its device; see :func:`pretrained`."""
    model = pretrained(load, name, where, unneeded=unneeded, dtype=getattr(torch, dtype), output_loading_info=True)
    return model.eval().requires_grad_(False).to(device)


def weights_name(name: str) -> str:
    """Name weights so that others are named otherwise: a hub id with its revision in the cache, a folder with the first digits of its weights' SHA-256.

    Raises:
        FileNotFoundError: If a folder holds no weights.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        files = sorted(file for kind in WEIGHT_FILES for file in folder.glob(kind))
        if not files:
            raise FileNotFoundError(f"{folder}: holds no weights to name it by, needed {' or '.join(WEIGHT_FILES)}")
        return f"{folder.resolve().name}@{_digest(tuple((file, file.stat().st_mtime_ns) for file in files))}"
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    return f"{name}@{Path(cached).parent.name[:8]}" if isinstance(cached, str) else name


@functools.cache
def _digest(files: tuple[tuple[Path, int], ...]) -> str:
    digest = hashlib.sha256()
    for file, _ in files:
        with file.open("rb") as stream:
            while part := stream.read(2**20):
                digest.update(part)
    return digest.hexdigest()[:8]


def file(name: str, where: str, *, get: str = "") -> Path:
    """Return the path of a weight file: a path of this machine, or ``owner/repository/file`` in the hub's cache.

    ``get`` is the command that gets a published file which is not on the hub.

    Raises:
        FileNotFoundError: If it is neither, with the command that gets it.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    parts = name.split("/")
    if path.is_absolute() or len(parts) < 3:
        raise FileNotFoundError(
            f"{where}: {name}: no such file; give a file, or owner/repository/file of the hub{f', or run: {get}' if get else ''}"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        return Path(hf_hub_download(repository, inside))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(f"{where}: {name} is not on this machine; run: hf download {repository} {inside}") from error


def read(path: Path) -> dict[str, Tensor]:
    """Read a state dict from ``.safetensors``, or from torch's own format with nothing but tensors allowed.

    Raises:
        ValueError: If the file holds something else.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what the unpickler raises depends on the file
        raise ValueError(f"{path}: not a file of plain tensors ({str(error).splitlines()[0]}); convert it to safetensors") from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path}: holds no state dict (names to tensors)")
    return dict(found)
