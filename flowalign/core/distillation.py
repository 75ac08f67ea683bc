"""What a distribution-matching distillation is to the loop: a student of a few steps, a teacher, a fake score that follows the student, a discriminator.

All are one network: the teacher is the frozen base, fake score and student are adapters on it, the discriminator reads the base's blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flowalign.core.adamw import AdamW
from flowalign.core.algorithm import Rows, Update, Velocity
from flowalign.core.discriminators import Discriminator
from flowalign.core.ratios import Reduce
from flowalign.core.schedules import shift_sigmas

FAKE = "fake"
DISCRIMINATOR = "discriminator"
TEACHER = "teacher"  # the reference with guidance

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What a step of a distillation has to train on: prompts, and what the teacher made of noise under them (the rows of one rank).

    Rows come in shares of equal size, one for each update of the step.

    Attributes:
        spread: The student's first state is this times its noise: 1 for flows, less where a schedule begins below pure noise.
        finish: What it makes is this times its last state: 1 for flows; a variance-preserving schedule may end above sigma 0, and a pipeline then decodes
            the state in its own coordinates.

    Shapes:
        noise: ``[batch, *event]``, standard normal, what the teacher began with.
        x0: ``[batch, *event]``, its final state.
        sigmas: ``[K + 1]``, the student's own grid, decreasing.
        prompt, group, sample: ``[batch]`` int64, as in `flowalign.core.algorithm.Experience`.
        share: ``[batch]`` int64, which update a row is for.
        keep: ``[batch]`` bool, all True.
    """

    noise: Tensor
    x0: Tensor
    sigmas: Tensor
    spread: float
    finish: float
    prompt: Tensor
    group: Tensor
    sample: Tensor
    share: Tensor
    keep: Tensor


@dataclass(frozen=True, kw_only=True)
class Levels:
    """How noise levels are drawn: uniform between two, before a shift as schedules have it.

    Attributes:
        lowest: Least noisy.
        highest: Noisiest.
        shift: 1 for none, more for noisier levels.
    """

    lowest: float = 0.02
    highest: float = 0.98
    shift: float = 1.0

    def __post_init__(self) -> None:
        """Refuse limits that cannot be meant."""
        if not 0 < self.lowest < self.highest <= 1 or not 0 < self.shift < math.inf:
            raise ValueError(
                f"got lowest {self.lowest}, highest {self.highest} and shift {self.shift}; needed 0 < lowest < highest <= 1 and a positive shift"
            )

    def of(self, share: Tensor) -> Tensor:
        """Map numbers in [0, 1] to noise levels; with a shift they are shifted as schedules are, and stay within the limits.

        Examples:
            >>> Levels(lowest=0.2, highest=0.6).of(torch.tensor([0.0, 0.5, 1.0]))
            tensor([0.2000, 0.4000, 0.6000])
        """
        if self.shift == 1:
            return self.lowest + (self.highest - self.lowest) * share
        low, high = (
            float(shift_sigmas(torch.tensor([limit], dtype=torch.float64), 1 / self.shift)) for limit in (self.lowest, self.highest)
        )
        return shift_sigmas(low + (high - low) * share, self.shift)


@dataclass(frozen=True, kw_only=True)
class FakeScore(AdamW):
    """How the fake score is trained.

    Attributes:
        levels: Noise levels that it denoises the student's samples at; null for those of distribution matching (FastGen). DMD2 trains it on all of them.
    """

    levels: Levels | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every distillation can be told.

    Attributes:
        student_steps: Steps of the student, K. Its rungs are the pipeline's own schedule of K steps, and what is trained at a rung is what a
            pipeline computes there.
        guidance_scale: Of the teacher; 1 for none. The student learns the guided teacher and is not guided itself.
        teacher_steps: Steps of the teacher's own samples; null for the pipeline's ``num_steps``.
        num_pairs: The teacher's samples that are made at the start, in whole groups: the warm-up's targets, and what the discriminator holds for real. Matching
            draws noise anew, but its prompts are those of these samples.
        warmup_steps: Steps in which the student alone is drawn to what the teacher made of the same noise; for K above 1 at its first rung.
        warmup_learning_rate: Of the student when the warm-up begins, moving linearly to ``train.learning_rate`` at its end; null for that one throughout.
            Regression bears far larger steps than the push between two scores that have to keep up with each other.
        critic_updates: Updates of the critics for each of the student (published: 4 or 5); a step has them and one of the student.
        least_steps: Steps that the critics learn alone after the warm-up, at least.
        patience: With f_distill the run stops with an error if the student was held back for more steps than that, warm-up left out.
        levels: Noise levels that student and teacher are compared at, and that the discriminator judges at.
        adversarial_weight: Of the student's loss against the discriminator.
        fake: How the fake score is trained.
        discriminator: What judges, and how it is trained.
    """

    student_steps: int = 1
    guidance_scale: float = 1.0
    teacher_steps: int | None = None
    num_pairs: int = 1024
    warmup_steps: int = 0
    warmup_learning_rate: float | None = None
    critic_updates: int = 5
    least_steps: int = 10
    patience: int = 200
    levels: Levels = field(default_factory=Levels)
    adversarial_weight: float = 1e-3
    fake: FakeScore = field(default_factory=FakeScore)
    discriminator: Discriminator = field(default_factory=Discriminator)

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        for name in ("student_steps", "num_pairs", "critic_updates", "patience"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name}: got {vars(self)[name]}, needed at least 1")
        for name in ("warmup_steps", "least_steps", "adversarial_weight"):
            if vars(self)[name] < 0:
                raise ValueError(f"{name}: got {vars(self)[name]}, needed at least 0")
        if self.warmup_learning_rate is not None and not 0 < self.warmup_learning_rate < math.inf:
            raise ValueError(
                f"warmup_learning_rate: got {self.warmup_learning_rate}, needed a positive number, or null for train.learning_rate"
            )
        if self.patience <= self.least_steps:
            raise ValueError(
                f"patience: got {self.patience}, needed more than least_steps ({self.least_steps}), or the student could never begin"
            )
        if self.teacher_steps is not None and self.teacher_steps < 1:
            raise ValueError(f"teacher_steps: got {self.teacher_steps}, needed at least 1, or null for the pipeline's num_steps")
        if self.guidance_scale < 1:
            raise ValueError(f"guidance_scale: got {self.guidance_scale}, needed at least 1 (1 is no guidance)")


@runtime_checkable
class Distillation(Protocol):
    """An algorithm whose data is the teacher's and whose samples are the student's, with critics that learn beside it."""

    @property
    def config(self) -> Settings:
        """Its settings."""
        ...

    @property
    def judges(self) -> bool:
        """Whether there is a discriminator."""
        ...

    @property
    def weighs_batch(self) -> bool:
        """Whether ``weigh`` reads the whole batch; where it does not, the loop looks at one micro-batch at a time and keeps the student's pass for its loss."""
        ...

    def start(self) -> State:
        """Return the state that the critics' statistics begin with."""
        ...

    def learning_rate(self, update: Update, usual: float) -> float:
        """Return the student's in an update, given the usual one."""
        ...

    def look(self, rows: Rows, velocity: Velocity) -> Rows:
        """Add what an update reads of several networks, evaluated once."""
        ...

    def broken(self, rows: Rows) -> dict[str, bool]:
        """Tell whose output is not finite, of what ``look`` added."""
        ...

    def weigh(self, parts: Sequence[Rows], state: State, reduce: Reduce) -> tuple[list[Rows], State, dict[str, float]]:
        """Add what depends on the whole batch of all ranks; also returns the next state and what to log."""
        ...

    def is_ready(self, state: State, held_back: int) -> bool:
        """Tell whether the student may begin to move after the warm-up; once it does, it goes on."""
        ...
