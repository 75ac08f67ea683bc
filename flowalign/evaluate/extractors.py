"""From images to features: the fixed random network, an image encoder of transformers, or a network of the user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transform

from flowalign.evaluate.fidelity import RandomFeatures
from flowalign.images import floats
from flowalign.rewards import clip, pixels, weights
from flowalign.rewards.diversity import IMAGENET_MEAN, IMAGENET_STD

RANDOM = "random"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A feature extractor with what a value that is made with it depends on.

    Attributes:
        name: The network and its weights.
        resize: How images are brought to its size.
        network: From images ``[batch, 3, h, w]`` in [0, 1] to features ``[batch, d]``.
        takes: "one size" if features of images of different sizes mean nothing beside each other, "any size" if it resizes them itself.
    """

    name: str
    resize: str
    network: nn.Module = field(repr=False)
    takes: Literal["one size", "any size"] = "any size"

    @torch.no_grad()
    def features(self, images: Iterable[Tensor]) -> Tensor:
        """Return the features of images ``[3, h, w]``, floats in [0, 1] or bytes, which come one by one and need not fit into memory together.

        Returns:
            ``[image, d]`` float64 on the CPU.

        Raises:
            ValueError: If there are none, or the network returns something else than finite features ``[batch, d]``.
        """
        found = [self._batch(part) for _, same in groupby(images, key=lambda image: image.shape) for part in _batches(same)]
        if not found:
            raise ValueError("images: got none")
        return torch.cat(found)

    def _batch(self, images: Sequence[Tensor]) -> Tensor:
        found = self.network(floats(torch.stack(list(images))))
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"extractor {self.name!r}: returned {got} for {len(images)} images, needed features [{len(images)}, d]")
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"extractor {self.name!r}: returned features that are not finite")
        return found.to("cpu", torch.float64)


def _batches(images: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    held: list[Tensor] = []
    for image in images:
        held.append(image)
        if len(held) == _BATCH:
            yield held
            held = []
    if held:
        yield held


def random_features() -> Extractor:
    """Return the fixed random network: nothing is downloaded; see :class:`flowalign.evaluate.fidelity.RandomFeatures` for what it sees."""
    return Extractor(name="random network, seed 0", resize="none", network=RandomFeatures(seed=0), takes="one size")


def of_network(name: str, network: nn.Module) -> Extractor:
    """Take a network of the user's own; the hash of its weights becomes a part of the name."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return Extractor(name=f"{name}@{digest.hexdigest()[:8]}", resize="its own", network=network.eval().requires_grad_(False))


def encoder(name: str, *, size: int = 224, device: str | None = None) -> Extractor:
    """Load an image encoder of transformers, such as DINOv2; an image's features are its class token after the last norm.

    Images are rounded to bytes, their short side is scaled to ``size`` (bicubic, antialiased) and the middle is cut out.

    Args:
        name: Folder, or hub id in the cache.
        size: Side of its input in pixels.
        device: Null for the accelerator, where there is one.

    Raises:
        FileNotFoundError: If its files are not there, with the command that gets them.
        ValueError: If it is no image encoder.

    References:
        Stein et al., "Exposing flaws of generative model evaluation metrics", 2023, https://arxiv.org/abs/2306.04675 (DINOv2 as the extractor).
    """
    from transformers import AutoModel

    model = weights.network(AutoModel.from_pretrained, name, "extractor", dtype="float32", device=weights.device_of(device))
    found = _Encoder(model, size)
    try:
        found(torch.zeros(1, 3, size, size))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"extractor: {name!r} is a {type(model).__name__}, needed an image encoder whose last_hidden_state begins with a class token, such as "
            f"DINOv2 ({error})"
        ) from error
    return Extractor(name=weights.weights_name(name), resize=f"short side to {size} px, bicubic, antialiased, middle", network=found)


class _Encoder(nn.Module):
    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, images: Tensor) -> Tensor:
        parameter = next(self.model.parameters())

        def encode(part: Tensor) -> Tensor:
            seen = pixels.prepare(part.to(parameter.device), size=self.size, mean=IMAGENET_MEAN, std=IMAGENET_STD)
            return self.model(pixel_values=seen.to(parameter.dtype)).last_hidden_state[:, 0]

        return clip.in_batches(encode, images, 32)


@dataclass(frozen=True)
class Folder:
    """The images of a folder and of those in it, in the order of their names."""

    paths: tuple[Path, ...]

    @staticmethod
    def of(folder: Path) -> Folder:
        """Look for images.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it holds none.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give one with images ({', '.join(SUFFIXES)})")
        paths = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES))
        if not paths:
            raise ValueError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
        return Folder(paths)

    def sizes(self) -> dict[tuple[int, int], Path]:
        """Return the sizes (height, width) that there are, each with its first file; only the files' heads are read.

        Raises:
            ValueError: If a file is no image.
        """
        found: dict[tuple[int, int], Path] = {}
        for path in self.paths:
            with _opened(path) as picture:
                width, height = (picture.height, picture.width) if _turn(picture) > 4 else picture.size  # 5 to 8 lie on their side
                found.setdefault((height, width), path)
        return found

    def images(self) -> Iterable[Tensor]:
        """Read the images one by one, ``[3, h, w]`` in [0, 1], upright as a camera's note says; what is transparent stands on white.

        Raises:
            ValueError: If a file cannot be read to its end, or its pixels have 32 bits.
        """
        for path in self.paths:
            with _opened(path) as picture:
                try:
                    seen = _bytes(ImageOps.exif_transpose(picture) if _turn(picture) > 1 else picture).convert("RGBA")
                except (OSError, SyntaxError, ValueError) as error:
                    raise ValueError(f"{path}: cannot be read ({error}); remove it from the folder") from error
                ground = Image.new("RGBA", seen.size, "white")
                yield transform.pil_to_tensor(Image.alpha_composite(ground, seen).convert("RGB")).float() / 255


def _turn(picture: Image.Image) -> int:
    """Return how a camera was held, 1 to 8 by EXIF; 1 is upright."""
    # Without the first check Pillow would read all of a PNG to look for the note behind its pixels.
    return picture.getexif().get(ExifTags.Base.Orientation, 1) if "exif" in picture.info else 1


def _bytes(picture: Image.Image) -> Image.Image:
    """Bring pixels of 16 bits, which Pillow would cut off at 255, to 8."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray(((np.asarray(picture).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels are of kind {picture.mode!r}, whose white is unknown; needed 8 or 16 bits each")
    return picture


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: is no image that can be read; remove it from the folder") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}); remove it from the folder") from error
