"""Suites and generators that need no model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import flowalign.shapes as shapes
from flowalign.core.randomness import generator, key
from flowalign.evaluate.suites import Generate, Judgement, Prompt, ShapesSuite


@dataclass(frozen=True)
class RedSuite:
    """Passes images that are red enough; its prompts are what it is given."""

    texts: Sequence[str]
    images_per_prompt: int = 2
    name: str = "red"
    headline: str = "strict"
    scores_alone: bool = True

    def prompts(self) -> list[Prompt]:
        return [Prompt(id=len(text), text=text, tag=text[0]) for text in self.texts]

    def judge(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Judgement]:
        red = images[:, 0].mean((1, 2)).tolist()
        return [Judgement(strict=value > 0.3, graded=value) for value in red]


def random_images(prompts: list[str], seeds: list[tuple[int, int]]) -> Tensor:
    return torch.stack([torch.rand(3, 8, 8, generator=generator(noise, k)) * (k + 2) / 4 for noise, k in seeds])


def renderer(suite: ShapesSuite, *, accuracy: float) -> Generate:
    """A model that draws the right thing with some probability, and else an object too many."""
    metadata = {prompt.text: dict(prompt.metadata) for prompt in suite.prompts()}
    wrong = {"tag": "single_object", "include": [{"class": "ring", "count": 4}]}

    def generate(prompts: list[str], seeds: list[tuple[int, int]]) -> Tensor:
        is_right = [key(noise, k) % 1000 < 1000 * accuracy for noise, k in seeds]
        drawn = [metadata[text] if right else wrong for text, right in zip(prompts, is_right, strict=True)]
        return shapes.render(drawn, seeds[0][0] % 2**32)

    return generate
