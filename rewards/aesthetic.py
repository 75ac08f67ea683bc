"""LAION's aesthetic predictor v2: a linear map of CLIP's image embedding, trained on human ratings; about 1 to 10, higher is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from flowalign.rewards import clip, heads, pixels, weights

_PUBLISHED = "sac+logos+ava1-l14-linearMSE.pth"
_GET = f"curl -LO 'https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/{_PUBLISHED}'"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The improved aesthetic predictor on CLIP ViT-L/14's normalised image embedding; blind to the prompt.

    Differentiable in the images. Not verified with the published weights.

    Attributes:
        head: The head's weights: a file, or ``owner/repository/file`` on the hub. The published file is
            ``sac+logos+ava1-l14-linearMSE.pth`` of christophschuhmann/improved-aesthetic-predictor (on GitHub).
        model: Folder or hub id of the CLIP model.
        batch_size: Images of one forward.
        dtype: What the CLIP model computes in; the head computes in float32.
        device: Null for the accelerator, where there is one.

    References:
        https://github.com/christophschuhmann/improved-aesthetic-predictor. The published head has five linear layers and no
        activations; it is folded into one map, which is exact.
    """

    head: str = _PUBLISHED
    model: str = "openai/clip-vit-large-patch14"
    batch_size: int = 32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None

    def build(self) -> Aesthetic:
        """Load both models."""
        head = heads.fold(weights.read(weights.file(self.head, "aesthetic: head", get=_GET)), "layers.", "aesthetic: head")
        loaded = clip.load(self.model, None, "aesthetic", dtype=self.dtype, device=self.device, batch_size=self.batch_size)
        width = loaded.model.config.projection_dim
        if len(head.weight) != width:
            raise ValueError(
                f"aesthetic: the head takes {len(head.weight)} values, but {self.model} embeds in {width}; they belong to another CLIP"
            )
        return Aesthetic(loaded, head)


@dataclass(frozen=True)
class Aesthetic:
    """See ``Config``."""

    clip: clip.Clip
    head: heads.Affine
    scores_alone: ClassVar[bool] = True

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Score images ``[batch, 3, h, w]`` in [0, 1]; prompts play no part."""
        pixels.check(images, prompts, "aesthetic")
        return self.head(self.clip.images(images))
