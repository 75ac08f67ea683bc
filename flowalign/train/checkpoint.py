"""Checkpoints: everything with a state, written atomically as safetensors and JSON, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_TENSORS, _REST, _SEPARATOR = "state.safetensors", "state.json", "/"


def flatten(state: Any, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split nested dicts and lists into named tensors and a flat table of JSON values.

    Raises:
        TypeError: If a leaf is neither a tensor, a number, a string, a boolean nor None.
        ValueError: If a key could not be told from two.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    if isinstance(state, Tensor):
        tensors[prefix] = state.detach()
    elif isinstance(state, Mapping | list | tuple):
        pairs = list(state.items()) if isinstance(state, Mapping) else list(enumerate(state))
        # The kind of the container, and whether keys were integers, must survive the way through text.
        kind = "sequence" if not isinstance(state, Mapping) else "int" if any(isinstance(k, int) for k, _ in pairs) else "str"
        rest[prefix] = {"container": kind}
        for key, value in pairs:
            if _SEPARATOR in str(key):
                raise ValueError(f"state {prefix!r}: the key {key!r} holds {_SEPARATOR!r}, by which keys are told apart; name it otherwise")
            inner_tensors, inner_rest = flatten(value, f"{prefix}{_SEPARATOR}{key}")
            tensors |= inner_tensors
            rest |= inner_rest
    elif state is None or isinstance(state, bool | int | float | str):
        rest[prefix] = state
    else:
        raise TypeError(f"state {prefix!r}: cannot store a {type(state).__name__} without pickling")
    return tensors, rest


def unflatten(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> Any:
    """Undo ``flatten`` (tuples come back as lists).

    Examples:
        >>> unflatten(*flatten({"a": {0: [1, None]}}))
        {'a': {0: [1, None]}}
    """
    children: dict[str, list[str]] = {}
    for path in (*rest, *tensors):
        if path:
            children.setdefault(path.rpartition(_SEPARATOR)[0], []).append(path)

    def build(path: str) -> Any:
        if path in tensors:
            return tensors[path]
        value = rest[path]
        if not isinstance(value, dict):
            return value
        inner = [(child.rpartition(_SEPARATOR)[2], build(child)) for child in children.get(path, [])]
        if value["container"] == "sequence":
            return [item for _, item in sorted(inner, key=lambda pair: int(pair[0]))]
        return {int(key) if value["container"] == "int" else key: item for key, item in inner}

    return build("")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(folder: Path, step: int, state: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write a checkpoint: to a temporary folder first, then renamed, so that no reader ever sees half of one.

    Args:
        folder: The run's ``checkpoints`` folder.
        step: Number of finished steps; names the checkpoint.
        state: Nested dicts and lists of tensors, numbers and strings.
        keep: How many of the newest checkpoints stay; older ones are removed after the new one is safe.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: If it cannot be written (full disk); earlier checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, partial = folder / f"step_{step:06d}", folder / f"step_{step:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        tensors, rest = flatten(state)
        # One copy for each name: safetensors refuses tensors that share memory.
        save_file({name: value.cpu().clone().contiguous() for name, value in tensors.items()}, partial / _TENSORS)
        digest = hashlib.sha256((partial / _TENSORS).read_bytes()).hexdigest()
        (partial / _REST).write_text(json.dumps({"step": step, "sha256": digest, "values": rest}))
        for name in (_TENSORS, _REST):
            _sync(partial / name)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{final}: the checkpoint could not be written ({error}); the previous one is untouched") from error
    found = present(folder).values()
    # Later ones are broken, or this run would have gone on from them.
    for stale in [path for path in found if path > final] + [path for path in found if path <= final][:-keep]:
        shutil.rmtree(stale, ignore_errors=True)
    return final


def present(folder: Path) -> dict[int, Path]:
    """Return the checkpoints of a folder by their number of finished steps, the oldest first."""
    return {int(path.name.removeprefix("step_")): path for path in sorted(folder.glob("step_*[0-9]"))}


def load(path: Path) -> tuple[int, Any]:
    """Read one checkpoint and check it against its digest.

    Returns:
        Number of finished steps and the state, tensors on the CPU.

    Raises:
        ValueError: If a file is missing, truncated or altered.
    """
    try:
        about = json.loads((path / _REST).read_text())
        data = (path / _TENSORS).read_bytes()
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a whole checkpoint ({error})") from error
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        raise ValueError(f"{path}: {_TENSORS} is truncated or altered ({len(data)} bytes do not match its digest)")
    return about["step"], unflatten(load_file(path / _TENSORS), about["values"])


def load_newest(folder: Path) -> tuple[int, Any] | None:
    """Read the newest checkpoint that is whole; say on standard error which ones were passed over and why.

    Returns:
        As ``load``, or None where there is no checkpoint.

    Raises:
        ValueError: If there are checkpoints and none is whole.
    """
    found = list(present(folder).values())[::-1]
    for path in found:
        try:
            return load(path)
        except ValueError as error:
            print(f"warning: {error}; trying the previous checkpoint", file=sys.stderr)
    if found:
        raise ValueError(f"{folder}: none of its {len(found)} checkpoints is whole; remove the folder to start again")
    return None


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state with JSON-friendly groups."""
    state = optimizer.state_dict()
    return {"state": state["state"], "param_groups": [dict(group) for group in state["param_groups"]]}


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give an optimizer the moments of another; its rates and betas stay those of the configuration, which a run that goes on may have changed."""
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
