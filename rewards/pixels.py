"""Images as reward models see them: checked, rounded to bytes like the files they were trained on, resized and normalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transform

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_TOLERANCE = 1e-3  # decoders may leave [0, 1] by rounding, not by more
_IN_CACHE = 2**16  # numbers

Fit = Literal["crop", "pad"]


def check(images: Tensor, prompts: Sequence[object], where: str) -> None:
    """Refuse images that no reward model was made for.

    Raises:
        ValueError: If they are not ``[batch, 3, h, w]`` floats in [0, 1], one for each prompt and at least one.
    """
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
        raise ValueError(
            f"{where}: got images of shape {tuple(images.shape)} and dtype {images.dtype}, needed floats (batch, 3, height, width), at least one"
        )
    if len(images) != len(prompts):
        raise ValueError(f"{where}: got {len(images)} images for {len(prompts)} prompts, needed one each")
    if not bool(torch.isfinite(images).all()):
        raise ValueError(f"{where}: the images hold values that are not finite; the sampler or the decoder has diverged")
    low, high = (float(bound) for bound in images.detach().aminmax())
    if low < -_TOLERANCE or high > 1 + _TOLERANCE:
        raise ValueError(
            f"{where}: image values from {low:.3g} to {high:.3g}, needed [0, 1] (divide bytes by 255; map [-1, 1] with (x + 1) / 2)"
        )


def to_bytes(images: Tensor) -> Tensor:
    """Round images in [0, 1] to bytes, ``[batch, 3, h, w]`` uint8: what a saved file would hold.

    Rounded, not truncated: truncation darkens by half a grey level on average.
    """
    return _rounded(images, clip=True)


def to_bytes_checked(images: Tensor) -> Tensor:
    """Round images that passed :func:`check` to bytes, as :func:`to_bytes`: what they exceed [0, 1] by is less than half a grey level."""
    return _rounded(images, clip=False)


def _rounded(images: Tensor, *, clip: bool) -> Tensor:
    if images.device.type != "cpu":
        values = images.detach().float()
        return ((values.clamp(0, 1) if clip else values) * 255).round().to(torch.uint8)
    values = images.detach().contiguous().view(-1)
    rounded = np.empty(len(values), dtype=np.uint8)
    held = np.empty(min(_IN_CACHE, len(values)), dtype=np.float32)
    # In parts that stay in the CPU's cache: several times as fast as the whole at once.
    for start in range(0, len(values), _IN_CACHE):
        part = values[start : start + _IN_CACHE].float().numpy()
        if clip:
            part = np.clip(part, 0, 1, out=held[: len(part)])
        scaled = np.multiply(part, np.float32(255), out=held[: len(part)])
        np.copyto(rounded[start : start + len(part)], np.rint(scaled, out=scaled), casting="unsafe")
    return torch.from_numpy(rounded).view(images.shape)


def arrays(images: Tensor) -> list[np.ndarray]:
    """Return images in [0, 1] as RGB byte arrays ``[h, w, 3]``."""
    return [image.permute(1, 2, 0).contiguous().numpy() for image in to_bytes(images).cpu()]


def pictures(images: Tensor) -> list[Image.Image]:
    """Return images in [0, 1] as pictures."""
    return [Image.fromarray(array) for array in arrays(images)]


def prepare(images: Tensor, *, size: int, fit: Fit = "crop", mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """Resize and normalise images for an image encoder.

    Images are rounded to bytes first and resized as bytes, as the published processors do. Images that require a gradient are resized as
    floats instead, without any rounding; the two differ by rounding (mean 0.004 after normalisation on noise).

    Args:
        images: ``[batch, 3, h, w]`` in [0, 1].
        size: Side of the result in pixels.
        fit: "crop" scales the short side to ``size`` and cuts the middle out (CLIP); "pad" scales the long side to ``size`` and fills up
            with black (HPS v2).
        mean: Of each channel.
        std: Of each channel.

    Returns:
        float32 ``[batch, 3, size, size]``, bicubic with antialiasing.
    """
    pixels = images.float().clamp(0, 1) if images.requires_grad else to_bytes(images)
    height, width = pixels.shape[2:]
    if fit == "crop":
        short, long = min(height, width), max(height, width)
        other = int(size * long / short)
        target = [size, other] if height <= width else [other, size]
    else:
        scale = size / max(height, width)
        target = [max(1, round(height * scale)), max(1, round(width * scale))]
    pixels = transform.resize(pixels, target, interpolation=InterpolationMode.BICUBIC, antialias=True)
    if fit == "crop":
        pixels = transform.center_crop(pixels, [size, size])
    else:
        left, top = (size - target[1]) // 2, (size - target[0]) // 2
        pixels = transform.pad(pixels, [left, top, size - target[1] - left, size - target[0] - top])
    pixels = pixels.float().clamp(0, 1) if images.requires_grad else pixels.float() / 255
    return transform.normalize(pixels, list(mean), list(std))
