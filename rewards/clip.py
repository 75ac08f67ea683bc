"""CLIP as several rewards use it: unit embeddings of images and texts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flowalign.rewards import letters, pixels, weights


def pooled(output: Any) -> Tensor:
    """Return the projected embedding, which transformers 4 gave as a tensor and transformers 5 gives inside an output object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def check_prompts(prompts: Sequence[str], where: str) -> None:
    """Refuse empty prompts, and warn of scripts that English text encoders were not trained on.

    Raises:
        ValueError: If a prompt is empty.
    """
    for row, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"{where}: the prompt of sample {row} is empty, so there is nothing to compare the image with")
    other = next((prompt for prompt in prompts if letters.foreign(prompt)), None)
    if other is not None:
        warnings.warn(
            f"{where}: {other[:40]!r} is not in Latin script; this model was trained on English captions and its score says little",
            stacklevel=2,
        )


@dataclass(kw_only=True)
class Lengths:
    """Says once that a prompt is longer than a text encoder reads: what comes after is cut off, as the published code does without a word.

    Attributes:
        where: Name of the reward.
        most: Tokens that the encoder reads, with those that it adds.
        count: The tokens of a prompt, with those that the encoder adds.
        has_warned: Whether it was said.
    """

    where: str
    most: int
    count: Callable[[str], int]
    has_warned: bool = False

    def check(self, prompts: Sequence[str]) -> None:
        """Warn of the longest prompt, if it is too long and nothing was said yet."""
        # A token holds a byte at least, and two are added.
        long = [] if self.has_warned else [prompt for prompt in dict.fromkeys(prompts) if len(prompt.encode()) + 2 > self.most]
        lengths = {prompt: self.count(prompt) for prompt in long}
        longest = max(lengths, key=lengths.__getitem__, default="")
        if lengths.get(longest, 0) > self.most:
            self.has_warned = True
            warnings.warn(
                f"{self.where}: {longest[:40]!r}... has {lengths[longest]} tokens; the model reads the first {self.most}, as published, and the rest counts "
                "for nothing (said once)",
                stacklevel=3,
            )


def unit(embeddings: Tensor) -> Tensor:
    """Scale rows to length one, in float32."""
    return functional.normalize(embeddings.float(), dim=-1)


def in_batches(encode: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """Encode images part by part; a gradient is kept only where the images carry one."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
        return torch.cat([encode(part) for part in images.split(size)])


def of_each(encode: Callable[[list[str]], Tensor], prompts: Sequence[str], size: int) -> Tensor:
    """Encode every distinct text once and return one row for each prompt."""
    distinct = list(dict.fromkeys(prompts))
    with torch.no_grad():
        rows = torch.cat([encode(distinct[start : start + size]) for start in range(0, len(distinct), size)])
    return rows[torch.tensor([distinct.index(prompt) for prompt in prompts], device=rows.device)]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A CLIP model of transformers with its tokenizer.

    Attributes:
        model: ``transformers.CLIPModel``, frozen.
        tokenizer: Its tokenizer.
        lengths: Warns of long prompts.
        batch_size: Images of one forward.
    """

    model: Any
    tokenizer: Any
    lengths: Lengths
    batch_size: int

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def scale(self) -> Tensor:
        """The learnt scale of cosines, ``exp(logit_scale)``."""
        return self.model.logit_scale.exp().float()

    def images(self, images: Tensor) -> Tensor:
        """Return unit embeddings ``[batch, d]`` of images ``[batch, 3, h, w]`` in [0, 1]; differentiable where the images are."""
        return in_batches(lambda part: self._seen(self._prepared(part)), images, self.batch_size)

    def of_any_size(self, images: Sequence[Tensor]) -> Tensor:
        """Return unit embeddings ``[image, d]`` of images ``[3, h, w]``, each of a size of its own, which share forwards all the same."""
        return in_batches(self._seen, torch.cat([self._prepared(image[None]) for image in images]), self.batch_size)

    def _prepared(self, images: Tensor) -> Tensor:
        return pixels.prepare(images.to(self.device), size=self.model.config.vision_config.image_size)

    def _seen(self, prepared: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        return unit(pooled(self.model.get_image_features(pixel_values=prepared.to(dtype))))

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Return unit embeddings ``[batch, d]``; what is longer than the model reads is cut, with a warning."""
        self.lengths.check(prompts)

        def encode(part: list[str]) -> Tensor:
            tokens = self.tokenizer(part, padding=True, truncation=True, max_length=self.lengths.most, return_tensors="pt")
            chosen = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
            return unit(pooled(self.model.get_text_features(**chosen)))

        return of_each(encode, prompts, self.batch_size)


def load(model: str, tokenizer: str | None, where: str, *, dtype: str, device: str | None, batch_size: int) -> Clip:
    """Load a CLIP model; see :func:`flowalign.rewards.weights.pretrained` for the errors."""
    from transformers import AutoTokenizer, CLIPModel

    network = weights.network(CLIPModel.from_pretrained, model, where, dtype=dtype, device=weights.device_of(device))
    words = weights.pretrained(AutoTokenizer.from_pretrained, tokenizer or model, where)
    lengths = Lengths(where=where, most=network.config.text_config.max_position_embeddings, count=lambda text: num_tokens(words, text))
    return Clip(model=network, tokenizer=words, lengths=lengths, batch_size=batch_size)


def num_tokens(tokenizer: Any, text: str) -> int:
    """Count a text's tokens, with those that a tokenizer of transformers adds."""
    return len(tokenizer(text, truncation=False, verbose=False)["input_ids"])
