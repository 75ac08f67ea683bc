"""GenEval as a suite: the 553 official prompts, or prompts of its kinds, judged by its rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from flowalign.evaluate.suites import Judgement, Prompt, prompt_id
from flowalign.rewards.geneval_prompts import TAGS, generate, official
from flowalign.rewards.geneval_rules import Verdict
from flowalign.shapes.prompts import meaning


class Judge(Protocol):
    """What :class:`flowalign.rewards.geneval.GenEval` offers."""

    @property
    def detector_name(self) -> str:
        """Name of the detector's weights."""

    @property
    def clip_name(self) -> str:
        """Name of the weights that name colours."""

    def verdicts(self, images: Tensor, metadata: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """Judge images."""


@dataclass(frozen=True, kw_only=True)
class GenEvalSuite:
    """GenEval with four measures: ``official``, its own "correct" (the published score is the macro mean of it); ``strict``, ``graded`` and
    ``graded_flow_grpo`` as in :mod:`flowalign.rewards.geneval_rules`.

    Attributes:
        judged_by: The detector and the colour namer.
        split: The official prompts; or prompts of the same kinds about seen objects ("train"), objects that training never names ("unseen"),
            or all of them ("all"). Prompts of "train" and "all" never ask what an official prompt asks; those of "unseen" may.
        num_prompts: How many; None for all 553 official ones (1000 of another split). Of fewer, the tags have equal shares as far as they go.
        images_per_prompt: How many images each prompt gets; 4 is official.
        seed: Chooses the prompts of the other splits.
    """

    judged_by: Judge
    split: Literal["official", "train", "unseen", "all"] = "official"
    num_prompts: int | None = None
    images_per_prompt: int = 4
    seed: int = 0
    scores_alone: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Return the split, the number of prompts where it is not all official ones, and the weights of detector and colour namer: what a score depends on."""
        size = "" if self.split == "official" and self.num_prompts in (None, len(official())) else f" of {len(self._records())} prompts"
        split = "" if self.split == "official" else f"/{self.split}"
        return f"geneval{split}{size}, detector {self.judged_by.detector_name}, colors {self.judged_by.clip_name}"

    @property
    def headline(self) -> str:
        """GenEval's own measure: what is published is the macro mean of it."""
        return "official"

    def _records(self) -> list[dict[str, Any]]:
        if self.split != "official":
            return generate(self.split, seed=self.seed, num=self.num_prompts or 1000)
        records = official()
        num = self.num_prompts or len(records)
        if not 0 < num <= len(records):
            raise ValueError(f"num_prompts: got {num}, needed 1 to {len(records)} (for more, use another split)")
        if num == len(records):
            return records
        queues = [[record for record in records if record["tag"] == tag] for tag in TAGS]
        turns = [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)]
        chosen = {record["prompt"] for record in turns[:num]}
        return [record for record in records if record["prompt"] in chosen]

    def prompts(self) -> list[Prompt]:
        """Return the prompts."""
        return [
            Prompt(id=prompt_id(record), text=record["prompt"], tag=record["tag"], metadata=record, meaning=meaning(record))
            for record in self._records()
        ]

    def judge(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Judgement]:
        """Judge images with detector, colour namer and rules."""
        return [
            Judgement(
                strict=verdict.strict,
                graded=verdict.graded,
                scores={"official": float(verdict.official), "graded_flow_grpo": verdict.graded_flow_grpo},
                clauses=dict(verdict.clauses),
                reason=verdict.reason,
            )
            for verdict in self.judged_by.verdicts(images, [prompt.metadata for prompt in prompts])
        ]
