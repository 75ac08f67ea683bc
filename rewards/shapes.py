"""The verifier of the shapes world as a reward: strict, graded or a mixture of both, in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from flowalign.shapes.verifier import CLAUSES, check_record, verify


@dataclass(frozen=True, kw_only=True)
class ShapesScores:
    """Values ``[batch]`` float64 and the clause matrix ``[batch, 6]``."""

    values: dict[str, Tensor]
    clauses: Tensor | None
    clauses_valid: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shapes world's verifier (no learned weights).

    Attributes:
        strict: Share of the strict verdict (0 or 1) in the reward; the rest is the graded one. 0.5 tells a nearly right image from a
            wrong one without paying for nearly right alone.
    """

    strict: float = 0.5

    def __post_init__(self) -> None:
        """Refuse a share outside [0, 1]."""
        if not 0 <= self.strict <= 1:
            raise ValueError(f"strict: got {self.strict}, needed a share in [0, 1]")

    def build(self) -> ShapesReward:
        """Make the reward."""
        return ShapesReward(self)


@dataclass(frozen=True)
class ShapesReward:
    """See ``Config``."""

    config: Config
    scores_alone: ClassVar[bool] = True
    clause_names: ClassVar[tuple[str, ...]] = CLAUSES

    def check(self, record: dict[str, Any]) -> None:
        """Refuse a prompt's record that cannot be verified, before anything is sampled."""
        check_record(record)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> ShapesScores:
        """Score images ``[batch, 3, 32, 32]`` against GenEval metadata of the shapes world.

        Raises:
            ValueError: If the metadata is not of the shapes world.
        """
        missing = next((prompt for prompt, record in zip(prompts, metadata, strict=True) if "include" not in record), None)
        if missing is not None:
            raise ValueError(f"reward 'shapes': prompt {missing!r} has no GenEval metadata ('include'); use prompts of the shapes world")
        verdict = verify(images, metadata)
        mixed = self.config.strict * verdict.strict.double() + (1 - self.config.strict) * verdict.graded
        return ShapesScores(values={"reward": mixed}, clauses=verdict.clauses.double(), clauses_valid=verdict.clauses_valid)
