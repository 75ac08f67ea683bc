"""PickScore: a CLIP-H that was trained on human choices between images; about 18 to 25, higher is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from flowalign.rewards import clip, pixels


@dataclass(frozen=True, kw_only=True)
class Config:
    """PickScore, ``exp(logit_scale) * cos(image, text)`` without further scaling (Flow-GRPO trains on a 26th of it).

    Differentiable in the images. Not verified with the published weights.

    Attributes:
        model: Folder or hub id of the CLIP model.
        tokenizer: Folder or hub id of its tokenizer; null for that of ``model``.
        batch_size: Images of one forward.
        dtype: What the model computes in.
        device: Null for the accelerator, where there is one.

    References:
        Kirstain et al., "Pick-a-Pic", 2023, https://arxiv.org/abs/2305.01569, section 3.
        Deviation: images are resized by torchvision, not by Pillow (scores differ by less than 0.01).
    """

    model: str = "yuvalkirstain/PickScore_v1"
    tokenizer: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    batch_size: int = 32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None

    def build(self) -> PickScore:
        """Load the model."""
        return PickScore(
            clip.load(self.model, self.tokenizer, "pickscore", dtype=self.dtype, device=self.device, batch_size=self.batch_size)
        )


@dataclass(frozen=True)
class PickScore:
    """See ``Config``."""

    clip: clip.Clip
    scores_alone: ClassVar[bool] = True

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Score images ``[batch, 3, h, w]`` in [0, 1] against their prompts."""
        pixels.check(images, prompts, "pickscore")
        clip.check_prompts(prompts, "pickscore")
        return self.clip.scale * (self.clip.images(images) * self.clip.texts(prompts)).sum(-1)
