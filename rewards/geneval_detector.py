"""GenEval's detector without mmdet: Mask2Former through transformers, with mmdet's own treatment of images, masks and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transform

from flowalign.rewards import pixels, weights

SHORT, LONG, DIVISOR = 800, 1333, 32  # mmdet's test pipeline
PADDING = 128  # of 255, below and to the right
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, RGB
NUM_CLASSES = 80
TOP = 100  # (query, class) pairs of an image that mmdet looks at
# Weights that transformers' backbone holds and never uses, and the training loss's: published files may lack them.
UNNEEDED = ("model.pixel_level_module.encoder.swin.layernorm.", "criterion.")


@dataclass(frozen=True, kw_only=True)
class Detection:
    """An instance in an image: class number in COCO's order, score, box (left, top, right, bottom) and mask ``[h, w]`` bool."""

    label: int
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor


@dataclass(frozen=True, kw_only=True)
class Detector:
    """Finds COCO's objects.

    Attributes:
        model: ``transformers.Mask2FormerForUniversalSegmentation``, frozen.
        batch_size: Images of one forward.
        short, long: Images are scaled to fit these sides.
    """

    model: Any
    batch_size: int = 4
    short: int = SHORT
    long: int = LONG

    def __call__(self, images: Tensor, labels: Sequence[Sequence[int]], thresholds: Sequence[float]) -> list[list[Detection]]:
        """Find the objects of some classes in images of one size.

        Args:
            images: ``[batch, 3, h, w]`` in [0, 1], RGB.
            labels: The classes of interest of each image; only their masks are computed.
            thresholds: Of each image; lower scores are left out.

        Returns:
            The detections of each image, highest score first.
        """
        found: list[list[Detection]] = []
        parameter = next(self.model.parameters())
        size = (images.shape[2], images.shape[3])
        for start in range(0, len(images), self.batch_size):
            seen, inner = prepare(images[start : start + self.batch_size].to(parameter.device), self.short, self.long)
            with torch.no_grad():
                output = self.model(pixel_values=seen.to(parameter.dtype))
            logits, masks = output.class_queries_logits.float(), output.masks_queries_logits.float()
            padded = (seen.shape[2], seen.shape[3])
            for row in range(len(seen)):
                wanted, least = labels[start + row], thresholds[start + row]
                found.append(instances(logits[row], masks[row], wanted, least, padded=padded, inner=inner, size=size))
        return found


def load(name: str, *, dtype: str, device: str | None, batch_size: int) -> Detector:
    """Load a detector.

    Raises:
        FileNotFoundError: If its files are not there, with what to do.
        ValueError: If it does not know exactly 80 classes.
    """
    from transformers import Mask2FormerForUniversalSegmentation as Mask2Former

    try:
        model = weights.network(
            Mask2Former.from_pretrained, name, "geneval: detector", dtype=dtype, device=weights.device_of(device), unneeded=UNNEEDED
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. The original GenEval detector is mmdet's mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco checkpoint: turn it into a folder "
            "with `flowalign geneval convert FILE.pth --output FOLDER` and give that folder as detector"
        ) from error
    if model.config.num_labels != NUM_CLASSES:
        raise ValueError(f"geneval: detector: {name} knows {model.config.num_labels} classes, needed the {NUM_CLASSES} of COCO instances")
    return Detector(model=model, batch_size=batch_size)


def prepare(images: Tensor, short: int = SHORT, long: int = LONG) -> tuple[Tensor, tuple[int, int]]:
    """Scale, pad and normalise images as mmdet's test pipeline does.

    Returns:
        float32 ``[batch, 3, H, W]``, H and W multiples of 32, and the height and width that are not padding.

    References:
        mmdet 2's ``mask2former_r50_lsj_8x2_50e_coco.py``, which the Swin-S configuration inherits: grey 128 is padded before normalisation. Its panoptic
        namesake, and Meta's own code when it tests, pad zeros after it; square images of GenEval need no padding at all.
    """
    height, width = images.shape[2:]
    scale = min(long / max(height, width), short / min(height, width))
    inner = (int(height * scale + 0.5), int(width * scale + 0.5))
    resized = transform.resize(pixels.to_bytes(images), list(inner), interpolation=InterpolationMode.BILINEAR, antialias=False)
    padded = functional.pad(resized, (0, -inner[1] % DIVISOR, 0, -inner[0] % DIVISOR), value=PADDING)
    return transform.normalize(padded.float() / 255, list(MEAN), list(STD)), inner


def instances(
    logits: Tensor,
    masks: Tensor,
    labels: Sequence[int],
    least: float,
    *,
    padded: tuple[int, int],
    inner: tuple[int, int],
    size: tuple[int, int],
) -> list[Detection]:
    """Turn one image's outputs into instances.

    Class probabilities without "no object" are ranked over all queries and classes together, so a query may appear with several classes;
    mask logits are enlarged to the padded input, cut to what is not padding and brought to the image's own size; a mask's score is its mean
    probability, and the box its extent, right and bottom one past the last pixel. Masks are computed only of the wanted classes and where
    the class alone already exceeds ``least``: a mask's score cannot raise it.

    Args:
        logits: ``[query, 81]``, "no object" last.
        masks: ``[query, h, w]`` logits at a quarter of the padded size.
        labels: Wanted classes.
        least: Scores must exceed this.
        padded: Height and width of the network's input.
        inner: Height and width in there that are not padding.
        size: Height and width of the image.

    References:
        mmdet's ``MaskFormerFusionHead.instance_postprocess``; transformers' own post-processing keeps the padding and masks of 384 x 384.
    """
    flat = logits.softmax(-1)[:, :-1].flatten()
    top = flat.topk(min(TOP, len(flat)))
    label, query = top.indices % NUM_CLASSES, top.indices // NUM_CLASSES
    chosen = torch.isin(label, torch.tensor(list(labels), device=label.device)) & (top.values > least)
    if not bool(chosen.any()):
        return []
    used, where = query[chosen].unique(return_inverse=True)
    large = functional.interpolate(masks[used][None], padded, mode="bilinear", align_corners=False)[..., : inner[0], : inner[1]]
    full = functional.interpolate(large, size, mode="bilinear", align_corners=False)[0]
    binary = full > 0
    mask_score = (full.sigmoid() * binary).flatten(1).sum(1) / (binary.flatten(1).sum(1) + 1e-6)
    scores = top.values[chosen] * mask_score[where]
    boxes = [_box(mask) for mask in binary]
    order = scores.argsort(descending=True, stable=True).tolist()
    kind = label[chosen].tolist()
    return [
        Detection(label=kind[i], score=float(scores[i]), box=boxes[where[i]], mask=binary[where[i]])
        for i in order
        if float(scores[i]) > least
    ]


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    if not rows:
        return (0.0, 0.0, 0.0, 0.0)
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
