"""CLIPScore: the cosine of image and prompt in CLIP; about 0.15 to 0.40, higher is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from flowalign.rewards import clip, pixels


@dataclass(frozen=True, kw_only=True)
class Config:
    """The cosine of CLIP's embeddings. Differentiable in the images (not where Hessel's form is cut at 0). Not verified with the published weights.

    Attributes:
        model: Folder or hub id of a CLIP model of transformers.
        form: "cosine"; "percent", 100 times it, the unit of torchmetrics, which also cuts the mean at 0; "hessel", ``2.5 max(cosine, 0)``.
        batch_size: Images of one forward.
        dtype: What the model computes in.
        device: Null for the accelerator, where there is one.

    References:
        Hessel et al., "CLIPScore", 2021, https://arxiv.org/abs/2104.08718, section 3.
        Deviation: no prefix "A photo depicts" before the caption, as in the text-to-image literature.
    """

    model: str = "openai/clip-vit-large-patch14"
    form: Literal["cosine", "percent", "hessel"] = "cosine"
    batch_size: int = 32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None

    def build(self) -> ClipScore:
        """Load the model."""
        loaded = clip.load(self.model, None, "clip_score", dtype=self.dtype, device=self.device, batch_size=self.batch_size)
        return ClipScore(loaded, self.form)


@dataclass(frozen=True)
class ClipScore:
    """See ``Config``."""

    clip: clip.Clip
    form: str = "cosine"
    scores_alone: ClassVar[bool] = True

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Score images ``[batch, 3, h, w]`` in [0, 1] against their prompts."""
        pixels.check(images, prompts, "clip_score")
        clip.check_prompts(prompts, "clip_score")
        return formed((self.clip.images(images) * self.clip.texts(prompts)).sum(-1), self.form)


def formed(cosine: Tensor, form: str) -> Tensor:
    """Return cosines in one of the published units.

    Examples:
        >>> import torch
        >>> [round(float(formed(torch.tensor(0.96), form)), 4) for form in ("cosine", "percent", "hessel")]
        [0.96, 96.0, 2.4]
    """
    return {"cosine": cosine, "percent": 100 * cosine, "hessel": 2.5 * cosine.clamp(min=0)}[form]
