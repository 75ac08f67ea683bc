"""Tensors to pictures: single images, grids and PNG files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_GAP = 4  # pixels between the images of a grid
_LINE = 14  # height of a line of caption in pixels
_TEXT_SIZE = 11
PNG = b"\x89PNG"  # what a PNG file begins with
_TOLERANCE = 1e-3  # decoders may leave [0, 1] by rounding, not by more


def floats(images: Tensor) -> Tensor:
    """Return images in [0, 1] as floats, whether they are held as floats or as bytes.

    Examples:
        >>> floats(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([0., 1.])
    """
    return images.float() / 255 if images.dtype == torch.uint8 else images


class NotFiniteError(FloatingPointError):
    """Images hold values that are not finite."""


def finite(images: Tensor) -> Tensor:
    """Return images as they are.

    Raises:
        NotFiniteError: If a value is not finite: weights that are finite may make such images.
    """
    if not bool(torch.isfinite(images).all()):
        raise NotFiniteError(
            "images: hold values that are not finite; the model has diverged, or the decoder's precision is too narrow. Lower train.learning_rate and "
            "go on from the last checkpoint (--from RUN), or take pipeline.dtype bfloat16 or float32"
        )
    return images


def to_pil(image: Tensor) -> Image.Image:
    """Turn one image ``[3, h, w]``, floats in [0, 1] or bytes, into a picture.

    Raises:
        ValueError: If the shape is another one, a value is not finite, or values leave [0, 1] by more than rounding.

    Examples:
        >>> to_pil(torch.tensor([1.0, 0.0, 0.5])[:, None, None]).getpixel((0, 0))
        (255, 0, 128)
    """
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image: got shape {tuple(image.shape)}, needed (3, height, width)")
    if image.dtype == torch.uint8:
        return Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())
    pixels = image.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(pixels).all()):
        raise ValueError("image: holds values that are not finite; the sampler or the decoder has diverged")
    low, high = float(pixels.min()), float(pixels.max())
    if low < -_TOLERANCE or high > 1 + _TOLERANCE:
        raise ValueError(f"image: values from {low:.3g} to {high:.3g}, needed [0, 1] (divide bytes by 255; map [-1, 1] with (x + 1) / 2)")
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array)


def grid(images: Tensor, columns: int, *, captions: Sequence[str] | None = None, scale: int = 1) -> Image.Image:
    """Lay images out in rows of a picture.

    Args:
        images: ``[batch, 3, h, w]``, floats in [0, 1] or bytes.
        columns: Images in a row.
        captions: One text below each image, cut where it does not fit.
        scale: Whole factor by which small images are enlarged, each pixel into a block.

    Raises:
        ValueError: As in :func:`to_pil`, and if there are no images, or ``columns``, ``scale`` or the captions do not fit them.
    """
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images: got shape {tuple(images.shape)}, needed (batch, 3, height, width) and at least one image")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale: must be at least 1, got {columns} and {scale}")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"captions: got {len(captions)} for {len(images)} images, needed one each")
    height, width = images.shape[2] * scale, images.shape[3] * scale
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    step_x, step_y = width + _GAP, height + _GAP + (_LINE if captions is not None else 0)
    picture = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + _GAP), "white")
    draw = ImageDraw.Draw(picture)
    for index, image in enumerate(images):
        left, top = index % columns * step_x + _GAP, index // columns * step_y + _GAP
        picture.paste(to_pil(image).resize((width, height), Image.Resampling.NEAREST), (left, top))
        if captions is not None:
            draw.text((left, top + height + 1), _fitted(captions[index], width), fill="black", font=_font())
    return picture


def save_png(image: Tensor | Image.Image, path: str | Path) -> None:
    """Write one image ``[3, h, w]`` or a picture as a PNG file, making its folder where needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(image))


def png_bytes(image: Tensor | Image.Image) -> bytes:
    """Return one image ``[3, h, w]`` or a picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    (to_pil(image) if isinstance(image, Tensor) else image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def picture_bytes(image: Tensor, *, most: int = 512) -> bytes:
    """Return one image ``[3, h, w]`` for a page: the bytes of a PNG where it is small, else of a JPEG at most so many pixels wide."""
    if max(image.shape[1:]) <= _SMALL:
        return png_bytes(image)
    return jpeg_bytes(to_pil(image), most)


def jpeg_bytes(picture: Image.Image, most: int) -> bytes:
    """Return a picture as the bytes of a JPEG file, at most so many pixels wide."""
    small = picture.convert("RGB")
    small.thumbnail((most, small.height))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


_SMALL = 128


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=_TEXT_SIZE)


def _fitted(text: str, width: int) -> str:
    font = _font()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
