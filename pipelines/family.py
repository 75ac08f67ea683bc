"""What a family of pipelines must say about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from flowalign.pipelines.conditioning import Conditioning


@dataclass(frozen=True, kw_only=True)
class Family:
    """What cannot be read off a recording.

    Attributes:
        denoiser: The pipeline's attribute that holds the denoiser.
        arguments: What every call of the pipeline gets: sizes, guidance, text length.
        guidance_scale: The guidance among them.
        event_shape: Shape of the latents of one sample.
        embeds: From conditioning to the arguments of ``__call__`` that carry prompt embeddings.
        decode: From pipeline and latents to images in [0, 1].
        targets: Default LoRA targets.
    """

    denoiser: str
    arguments: Mapping[str, Any]
    guidance_scale: float
    event_shape: tuple[int, ...]
    embeds: Callable[[Conditioning], Mapping[str, Any]]
    decode: Callable[[DiffusionPipeline, Tensor], Tensor]
    targets: tuple[str, ...]
