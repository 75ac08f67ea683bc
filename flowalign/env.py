"""What a bug report needs to say of the machine: versions, threads and devices; no host names and no paths."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

MADE = "made.jsonl"
PACKAGES = (
    "flowalign-diffusion",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "open_clip_torch",
    "torchmetrics",
    "numpy",
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware() -> dict[str, str]:
    """Return processor, threads and accelerators."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("Apple GPU (mps)")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "devices": ", ".join(devices) or "none (CPU)",
    }


def how_made(*program: str) -> dict[str, Any]:
    """Return what a report says of its making: the command after the program's name, versions and hardware."""
    return {"command": shlex.join([*(program or ("flowalign",)), *sys.argv[1:]]), "versions": versions(), "hardware": hardware()}


def note_made(folder: Path) -> None:
    """Add this process's command, versions and hardware to what a run's folder knows of its starts."""
    with (folder / MADE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(how_made()) + "\n")


def read_made(folder: Path) -> list[dict[str, Any]]:
    """Read what ``note_made`` wrote, the first start first; nothing where nothing was noted, or a line was cut off."""
    path = folder / MADE
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def table() -> str:
    """Return both as a text table."""
    rows = {**versions(), **hardware()}
    width = max(map(len, rows))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows.items())
