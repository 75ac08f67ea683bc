"""ImageReward: a BLIP that was trained on human rankings; about -2.3 to 2, higher is better."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flowalign.rewards import clip, heads, pixels, weights

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score over the authors' data
MAX_TOKENS = 35
_HEAD_WIDTH = 64  # of every attention head of ViT-L and BERT-base
# From the published names of the image tower (timm's) to those of transformers.
_RENAMED = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """ImageReward v1.0: ``(head(first text token after attending to the image) - 0.1672) / 1.0333``.

    Differentiable in the images. Not verified with the published weights.

    Attributes:
        weights: A file, or ``owner/repository/file`` on the hub.
        tokenizer: Folder or hub id of BERT's tokenizer.
        batch_size: Images of one forward.
        dtype: What both towers compute in; the head computes in float32.
        device: Null for the accelerator, where there is one.

    References:
        Xu et al., "ImageReward", 2023, https://arxiv.org/abs/2304.05977, section 3. The sizes are read off the weights; the head's
        five linear layers have no activations between them and are folded into one map, which is exact.
    """

    weights: str = "zai-org/ImageReward/ImageReward.pt"
    tokenizer: str = "google-bert/bert-base-uncased"
    batch_size: int = 32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None

    def build(self) -> ImageReward:
        """Load the model."""
        from transformers import AutoTokenizer

        where = "image_reward: weights"
        state = weights.read(weights.file(self.weights, where))
        words = weights.pretrained(AutoTokenizer.from_pretrained, self.tokenizer, "image_reward: tokenizer")
        image_tower, text_tower = _towers(state, where)
        device, dtype = weights.device_of(self.device), getattr(torch, self.dtype)
        for tower in (image_tower, text_tower):
            tower.eval().requires_grad_(False).to(device, dtype)
        lengths = clip.Lengths(where="image_reward", most=MAX_TOKENS, count=partial(clip.num_tokens, words))
        return ImageReward(image_tower, text_tower, heads.fold(state, "mlp.layers.", where), words, self.batch_size, lengths)


@dataclass(frozen=True)
class ImageReward:
    """See ``Config``."""

    image_tower: Any
    text_tower: Any
    head: heads.Affine
    tokenizer: Any
    batch_size: int
    lengths: clip.Lengths
    scores_alone: ClassVar[bool] = True

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Score images ``[batch, 3, h, w]`` in [0, 1] against their prompts; what is longer than 35 tokens is cut, as published."""
        pixels.check(images, prompts, "image_reward")
        clip.check_prompts(prompts, "image_reward")
        self.lengths.check(prompts)
        options = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
        device = next(self.text_tower.parameters()).device
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            parts = []
            for start in range(0, len(images), self.batch_size):
                tokens = self.tokenizer(prompts[start : start + self.batch_size], **options).to(device)
                parts.append(self._score(images[start : start + self.batch_size].to(device), tokens))
            return torch.cat(parts)

    def _score(self, images: Tensor, tokens: Any) -> Tensor:
        seen = pixels.prepare(images, size=self.image_tower.config.image_size)
        states = self.image_tower(pixel_values=seen.to(next(self.image_tower.parameters()).dtype)).last_hidden_state
        read = self.text_tower(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=states.device),
            is_decoder=False,
        ).last_hidden_state
        return (self.head(read[:, 0]) - MEAN) / STD


def _towers(state: Mapping[str, Tensor], where: str) -> tuple[Any, Any]:
    """Build both towers in the sizes of the published weights and load them."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    seeing, reading = _under(state, "blip.visual_encoder."), _under(state, "blip.text_encoder.")
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    if any(name not in seeing for name in needed) or "embeddings.word_embeddings.weight" not in reading:
        raise ValueError(f"{where}: holds no ImageReward model (needed names such as 'blip.visual_encoder.pos_embed')")
    width, _, patch, _ = seeing["patch_embed.proj.weight"].shape
    side = round((seeing["pos_embed"].shape[1] - 1) ** 0.5)
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(seeing["blocks.0.mlp.fc1.weight"]),
            num_hidden_layers=_depth(seeing, "blocks."),
            num_attention_heads=width // _HEAD_WIDTH,
            image_size=side * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,  # timm's; transformers' own default is 1e-5
        )
    )
    num_words, text_width = reading["embeddings.word_embeddings.weight"].shape
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=num_words,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=len(reading["encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=_depth(reading, "encoder.layer."),
            num_attention_heads=text_width // _HEAD_WIDTH,
            max_position_embeddings=len(reading["embeddings.position_embeddings.weight"]),
            is_decoder=True,  # gives its layers their attention to the image
            bos_token_id=None,
            sep_token_id=None,
        ),
        add_pooling_layer=False,
    )
    _load(vision, {_renamed(name): value for name, value in seeing.items()}, where)
    _load(text, {name: value for name, value in reading.items() if not name.endswith("position_ids")}, where)
    return vision, text


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix))


def _renamed(name: str) -> str:
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return name


def _load(model: Any, state: dict[str, Tensor], where: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{where}: do not fit {type(model).__name__}: {' '.join(str(error).split())[:200]}") from error
