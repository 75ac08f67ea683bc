"""Any prompts with any rewards as a suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowalign.evaluate.suites import Judgement, Prompt, Score, prompt_id, scores_of
from flowalign.rewards.parts import scores_alone


@dataclass(frozen=True, kw_only=True)
class PromptSuite:
    """A list of prompts, scored by rewards; each reward is a measure of its own, in its own unit.

    Attributes:
        title: Names the prompts.
        records: One for each prompt, with its text under "prompt"; "tag" is its kind, for the macro mean.
        score: The rewards.
        images_per_prompt: How many images each prompt gets.
        num_prompts: The first so many; None for all.
    """

    title: str
    records: Sequence[Mapping[str, Any]]
    score: Score
    images_per_prompt: int = 4
    num_prompts: int | None = None

    @property
    def name(self) -> str:
        """Return ``prompts/title``, with the number of prompts where it is not all."""
        size = "" if self.num_prompts is None or self.num_prompts >= len(self.records) else f" ({self.num_prompts} of {len(self.records)})"
        return f"prompts/{self.title}{size}"

    @property
    def headline(self) -> str:
        """No verdict: rewards are named."""
        return "strict"

    @property
    def scores_alone(self) -> bool:
        """Whether all rewards score each image by itself."""
        return scores_alone(self.score)

    def prompts(self) -> list[Prompt]:
        """Return the prompts, each once; a text that occurs again with the same record would be the same prompt."""
        chosen = self.records[: self.num_prompts]
        return [
            Prompt(id=prompt_id(record), text=str(record["prompt"]), tag=str(record.get("tag", "all")), metadata=dict(record))
            for record in chosen
        ]

    def judge(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Judgement]:
        """Score images with every reward."""
        return [Judgement(scores=scores) for scores in scores_of(self.score, images, prompts)]
