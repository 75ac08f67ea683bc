"""The size of an image as a JPEG file in kilobytes, wanted small (the default) or large; needs no weights and learns in minutes."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor

from flowalign.rewards import pixels


@dataclass(frozen=True, kw_only=True)
class Config:
    """JPEG (in)compressibility: minus or plus the file's size in kB (1000 bytes), higher is better; about 5 to 310 kB at 512 pixels.

    Attributes:
        want: "small" gives minus the size, "large" the size.
        quality: JPEG quality, with Pillow's usual subsampling.
        unit: The size is divided by this; Flow-GRPO uses 500.

    References:
        Black et al., "Training Diffusion Models with Reinforcement Learning", 2023, https://arxiv.org/abs/2305.13301, section 5.1.
    """

    want: Literal["small", "large"] = "small"
    quality: int = 95
    unit: float = 1.0

    def __post_init__(self) -> None:
        """Refuse qualities and units that are none."""
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality: got {self.quality}, needed 1 to 100")
        if not self.unit > 0:
            raise ValueError(f"unit: got {self.unit}, needed a positive number (want: large turns the sign)")

    def build(self) -> JpegSize:
        """Make the reward."""
        return JpegSize(self)


@dataclass(frozen=True)
class JpegSize:
    """See ``Config``."""

    config: Config
    scores_alone: ClassVar[bool] = True

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Score images ``[batch, 3, h, w]`` in [0, 1]; prompts play no part."""
        pixels.check(images, prompts, "jpeg_size")
        sign = -1 if self.config.want == "small" else 1
        sizes = [num_bytes(picture, self.config.quality) for picture in pixels.pictures(images)]
        return sign * torch.tensor(sizes, dtype=torch.float64) / 1000 / self.config.unit


def num_bytes(picture: Image.Image, quality: int) -> int:
    """Return the size of a picture as a JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality)
    return buffer.tell()
