"""How far an image is from the others of its prompt; 0 is collapse, higher is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from flowalign.rewards import clip, pixels, weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PIXELS = 8  # coarse layout and colour; finer pixels would pay for noise


@dataclass(frozen=True, kw_only=True)
class Config:
    """Mean distance of an image to the others with its prompt in the call, so that the mean over a group is its mean pairwise distance.

    Of a run on several processes each compares the images that it made itself.

    Attributes:
        model: Null for the root mean square difference of 8 x 8 pixels, in [0, 1]; or folder or hub id of an image encoder of
            transformers (DINOv2), for ``1 - cos`` of its class tokens, in [0, 2], differentiable. Not verified with published weights.
        size: Side of the encoder's input in pixels; the image is cropped to a square.
        batch_size: Images of one forward.
        dtype: What the encoder computes in.
        device: Null for the accelerator, where there is one.
    """

    model: str | None = None
    size: int = 224
    batch_size: int = 32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None

    def build(self) -> Diversity:
        """Load the encoder, if there is one."""
        if self.model is None:
            return Diversity(self)
        from transformers import AutoModel

        device = weights.device_of(self.device)
        return Diversity(self, weights.network(AutoModel.from_pretrained, self.model, "diversity", dtype=self.dtype, device=device))


@dataclass(frozen=True)
class Diversity:
    """See ``Config``."""

    config: Config
    encoder: Any = None
    scores_alone: ClassVar[bool] = False

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Score images ``[batch, 3, h, w]`` in [0, 1].

        Raises:
            ValueError: If a prompt has one image only.
        """
        pixels.check(images, prompts, "diversity")
        single = next((prompt for prompt in prompts if prompts.count(prompt) == 1), None)
        if single is not None:
            raise ValueError(f"diversity: one image of {single!r}; needed at least 2 images of each prompt to compare (train.group_size)")
        number = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        group = torch.tensor([number[prompt] for prompt in prompts], device=images.device)
        others = (group[:, None] == group) & ~torch.eye(len(group), dtype=torch.bool, device=images.device)
        distances = self._distances(images)
        return (distances * others.to(distances)).sum(1) / others.sum(1).to(distances)

    def _distances(self, images: Tensor) -> Tensor:
        if self.encoder is None:
            flat = functional.adaptive_avg_pool2d(images.detach().float(), _PIXELS).flatten(1)
            # Squares of differences, and not cdist: its fast form loses what nearly equal images differ by.
            return torch.stack([(flat - row).square().mean(1) for row in flat]).sqrt()
        parameter = next(self.encoder.parameters())

        def encode(part: Tensor) -> Tensor:
            seen = pixels.prepare(part.to(parameter.device), size=self.config.size, mean=IMAGENET_MEAN, std=IMAGENET_STD)
            return clip.unit(self.encoder(pixel_values=seen.to(parameter.dtype)).last_hidden_state[:, 0])

        unit = clip.in_batches(encode, images, self.config.batch_size).to(images.device)
        return 1 - unit @ unit.T
