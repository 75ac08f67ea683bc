"""HPS v2.1: a CLIP-H that was trained on human preferences; the cosine, about 0.15 to 0.40, higher is better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flowalign.rewards import clip, pixels, weights


@dataclass(frozen=True, kw_only=True)
class Config:
    """The cosine of image and prompt, without the model's scale (the authors' leaderboards print 100 times it).

    Images are scaled to fit into 224 x 224 and filled up with black, not cropped. Differentiable in the images. v2.0 and v2.1 differ by
    the weights alone. Not verified with the published weights.

    Attributes:
        weights: A file, or ``owner/repository/file`` on the hub.
        architecture: Its name in open_clip.
        batch_size: Images of one forward.
        dtype: What the model computes in (the authors' code uses autocast).
        device: Null for the accelerator, where there is one.

    References:
        Wu et al., "Human Preference Score v2", 2023, https://arxiv.org/abs/2306.09341, section 4.
    """

    weights: str = "xswu/HPSv2/HPS_v2.1_compressed.pt"
    architecture: str = "ViT-H-14"
    batch_size: int = 32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None

    def build(self) -> HPSv2:
        """Load the model."""
        import open_clip

        state = weights.read(weights.file(self.weights, "hpsv2: weights"))
        if self.architecture not in open_clip.list_models():
            raise ValueError(f"hpsv2: architecture: open_clip knows no {self.architecture!r}; the published weights are of ViT-H-14")
        model = open_clip.create_model(self.architecture, pretrained=None)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"hpsv2: {self.weights} does not hold the weights of {self.architecture}: {reason}") from error
        model = model.eval().requires_grad_(False).to(weights.device_of(self.device), getattr(torch, self.dtype))
        size = model.visual.image_size
        tokenize = open_clip.get_tokenizer(self.architecture)
        lengths = clip.Lengths(where="hpsv2", most=model.context_length, count=partial(num_tokens, tokenize))
        return HPSv2(model, tokenize, size if isinstance(size, int) else size[0], self.batch_size, lengths)


def num_tokens(tokenize: Callable[..., Tensor], text: str) -> int:
    """Count a text's tokens, with the two that are added: open_clip's tokenizers fill up, here more than any text needs."""
    row = tokenize([text], context_length=len(text.encode()) + 3)[0]
    return 1 + int((row != row[-1]).nonzero().max())


@dataclass(frozen=True)
class HPSv2:
    """See ``Config``."""

    model: Any
    tokenize: Callable[[list[str]], Tensor]
    size: int
    batch_size: int
    lengths: clip.Lengths
    scores_alone: ClassVar[bool] = True

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Score images ``[batch, 3, h, w]`` in [0, 1] against their prompts."""
        pixels.check(images, prompts, "hpsv2")
        clip.check_prompts(prompts, "hpsv2")
        self.lengths.check(prompts)
        parameter = next(self.model.parameters())

        def seen(part: Tensor) -> Tensor:
            prepared = pixels.prepare(part.to(parameter.device), size=self.size, fit="pad")
            return clip.unit(self.model.encode_image(prepared.to(parameter.dtype)))

        def read(part: list[str]) -> Tensor:
            return clip.unit(self.model.encode_text(self.tokenize(part).to(parameter.device)))

        rows = clip.of_each(read, prompts, self.batch_size)
        return (clip.in_batches(seen, images, self.batch_size) * rows).sum(-1)
