"""What a pipeline saves memory and time by: switches of diffusers, parts that rest in main memory, blocks that are compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn

VAE = "vae"
RECOMPILES = 64


class Resting:
    """Parts that rest in main memory and come to the device for as long as they work: text encoders, and the autoencoder.

    Attributes:
        parts: By the pipeline's name for them; none where everything stays on the device.
        device: Where they work.
    """

    def __init__(self, parts: Mapping[str, nn.Module], device: torch.device) -> None:
        self.parts, self.device = dict(parts), device
        self._awake: set[str] = set()
        for part in self.parts.values():
            part.to("cpu")

    @contextmanager
    def awake(self, *, text: bool = False, images: bool = False) -> Iterator[None]:
        """Bring the text encoders, the autoencoder, or both to the device, and back; inside another such block the outer one rules.

        Args:
            text: Everything but the autoencoder.
            images: The autoencoder.
        """
        woken = [name for name in self.parts if name not in self._awake and (images if name == VAE else text)]
        for name in woken:
            self.parts[name].to(self.device)
        self._awake.update(woken)
        try:
            yield
        finally:
            for name in woken:
                self.parts[name].to("cpu")
            self._awake.difference_update(woken)


def parts_beside(pipe: Any, denoiser: str) -> dict[str, nn.Module]:
    """Return the networks of a pipeline other than its denoiser."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module) and name != denoiser}


def blocks(denoiser: nn.Module) -> list[nn.Module]:
    """Return the blocks that a denoiser repeats: those of the classes that diffusers names, else the members of its lists of blocks.

    Raises:
        ValueError: If it repeats none.
    """
    kinds = set(getattr(denoiser, "_repeated_blocks", None) or ())
    found = [module for module in denoiser.modules() if type(module).__name__ in kinds]
    if not found:
        found = [block for child in denoiser.children() if isinstance(child, nn.ModuleList) for block in child]
    if not found:
        raise ValueError(f"pipeline.compile: {type(denoiser).__name__} repeats no block that could be compiled; set compile: false")
    return found


def compile_blocks(denoiser: nn.Module, **options: Any) -> None:
    """Compile each repeated block by itself: minutes less than the whole, and blocks of one class share their code.

    Args:
        denoiser: The denoiser.
        options: Of ``torch.compile``.
    """
    for block in blocks(denoiser):
        # Blocks of one class share a limit, and each role, kind of block and pass with or without gradient is compiled for itself: torch's own 8 are too few.
        block.compile(**{"recompile_limit": RECOMPILES} | options)


def set_attention(denoiser: Any, backend: str) -> None:
    """Choose diffusers' backend of attention.

    Raises:
        ValueError: If there is no such backend, it is not installed, or no layer of this denoiser takes one.
    """
    known = [name.value for name in AttentionBackendName]
    if backend not in known:
        raise ValueError(f"pipeline.attention: got {backend!r}, needed one of {', '.join(known)}, or null for torch's own")
    takers = Counter(hasattr(getattr(layer, "processor", None), "_attention_backend") for layer in denoiser.modules())
    if not takers[True]:
        raise ValueError(
            f"pipeline.attention: no layer of {type(denoiser).__name__} takes a backend (it always calls torch's own); set attention: null"
        )
    try:
        denoiser.set_attention_backend(backend)
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"pipeline.attention: {backend!r} is not to be had here: {error}") from error


def spare_autoencoder(pipe: Any, *, slicing: bool, tiling: bool) -> None:
    """Let the autoencoder decode image by image, and large images tile by tile.

    Raises:
        ValueError: If it cannot.
    """
    for name, wanted in (("slicing", slicing), ("tiling", tiling)):
        switch = getattr(pipe.vae, f"enable_{name}", None)
        if wanted and switch is None:
            raise ValueError(f"pipeline.vae_{name}: {type(pipe.vae).__name__} cannot do this; set vae_{name}: false")
        if wanted and switch is not None:
            switch()
