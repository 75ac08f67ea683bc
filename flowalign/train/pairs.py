"""The first half of a step of a distillation: prompts with what the teacher made under them, and a look at what the student makes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from flowalign.core.algorithm import CURRENT, REFERENCE, sample_number
from flowalign.core.distillation import Pairs, Settings
from flowalign.core.plans import ode
from flowalign.core.randomness import generator, normal
from flowalign.train.collect import Collected, counted, no_noise
from flowalign.train.journal import HIDDEN, Clock
from flowalign.train.overlap import Decoder, Scorers
from flowalign.train.players import HeadPlayer, Networks
from flowalign.train.protocols import Pipeline, PromptLike
from flowalign.train.scoring import NamedReward, RewardTable
from flowalign.train.settings import TrainConfig
from flowalign.train.together import Together


@dataclass(kw_only=True)
class PairCollector:
    """Deals the teacher's samples out, which are made once, and measures the student's.

    Attributes:
        pipeline: Generates, replays and decodes.
        teacher: The same pipeline with the teacher's guidance, or itself.
        settings: Of the distillation.
        num_updates: Updates of a step; each gets pairs of its own.
        rewards: What the student's images are measured by; nothing is trained on them.
        draw: From a step to its prompts, ``config.groups`` of them; a pure function.
        config: Sizes and rates.
        seed: Seed of the run.
        folder: Where the teacher's samples are kept.
        accelerator: Devices and ranks.
        clock: Times the phases.
        heads: The discriminator, where there is one.
        shown: The student's version whose images are measured: the one that the run will be saved as.
    """

    pipeline: Pipeline
    teacher: Pipeline
    settings: Settings
    num_updates: int
    rewards: Sequence[NamedReward]
    draw: Callable[[int], Sequence[PromptLike]]
    config: TrainConfig
    seed: int
    folder: Path
    accelerator: Accelerator
    clock: Clock
    heads: Mapping[str, HeadPlayer] = field(default_factory=dict)
    shown: str = CURRENT

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be dealt out, and rungs that are none."""
        config = self.config
        config.check_processes(self.accelerator.num_processes)
        self.num_groups = self.settings.num_pairs // config.group_size
        if self.num_groups < config.groups:
            raise ValueError(
                f"algorithm.num_pairs: {self.settings.num_pairs} pairs are fewer than the {config.groups * config.group_size} of one update "
                "(train.groups times train.group_size)"
            )
        steps = self.settings.student_steps
        try:
            self.sigmas = self.pipeline.sigmas(steps)
        except ValueError as error:
            raise ValueError(
                f"algorithm.student_steps: got {steps}, of which the pipeline's scheduler makes no schedule ({error}); take a divisor of its number of training "
                'timesteps, such as 1, 2, 4, 5 or 8, and timestep_spacing "trailing"'
            ) from error
        least, most = self.pipeline.known_levels
        if len(self.sigmas) != steps + 1 or float(self.sigmas[0]) < _NOISE * most:
            raise ValueError(
                f"algorithm.student_steps: the pipeline's schedule of {steps} steps begins at level {float(self.sigmas[0]):.3f} and has "
                f"{len(self.sigmas) - 1} rungs; a student needs {steps}, the first at noise ({most:.3f} for this model). Give the pipeline a scheduler with "
                'timestep_spacing "trailing"'
            )
        for where, levels in (("levels", self.settings.levels), ("fake.levels", self.settings.fake.levels)):
            if levels is not None and (levels.highest > most or levels.lowest < least):
                odd, value = ("highest", levels.highest) if levels.highest > most else ("lowest", levels.lowest)
                raise ValueError(f"algorithm.{where}.{odd}: got {value}, but this model knows levels from {least:.4f} to {most:.4f} alone")
        self.spread, self.finish = self.pipeline.ends(steps)
        # Under guidance the teacher computes two rows where the student computes one.
        self._rows_of_teacher = self.teacher.rows_per_evaluation // self.pipeline.rows_per_evaluation
        self.state: dict[str, Any] = {}
        self.together = Together(accelerator=self.accelerator)
        self.scorers = Scorers(self.rewards, device=self.accelerator.device)
        self.evaluations: Counter[str] = Counter()
        self._pairs: tuple[Tensor, list[PromptLike]] | None = None

    # -- the teacher's samples ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the teacher's samples, or read them where they were made; what was made of them survives an interruption."""
        if self._pairs is not None:
            return
        rank, world, config = self.accelerator.process_index, self.accelerator.num_processes, self.config
        rounds = -(-self.num_groups // config.groups)
        prompts = [prompt for number in range(rounds) for prompt in self.draw(number)][: self.num_groups]
        mine = torch.arange(rank, self.num_groups * config.group_size, world)
        parts = []
        chunks = mine.split(config.rollout_batch_size)
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, rows in enumerate(tqdm(chunks, desc="teacher's samples", disable=not self.accelerator.is_main_process, leave=False)):
            path = self.folder / f"rank_{rank}_of_{world}_{number:05d}.safetensors"
            found = _read(path, (len(rows), *self.pipeline.event_shape))
            if found is None:
                found = self._teach(rows, prompts)
                partial = path.with_suffix(".partial")
                save_file({"x0": found}, partial)
                os.replace(partial, path)
            parts.append(found)
        self._pairs = torch.cat(parts), prompts

    def _teach(self, rows: Tensor, prompts: Sequence[PromptLike]) -> Tensor:
        texts = [prompts[group].text for group in (rows // self.config.group_size).tolist()]
        done = self.teacher.rollout(
            self.teacher.encode(texts),
            ode(self.settings.teacher_steps or self.pipeline.num_steps),
            x_init=self._noise(rows, prompts).to(self.accelerator.device),
            noise=no_noise,
            role=REFERENCE,
        )
        self.evaluations["teacher"] += done.evaluations * self._rows_of_teacher
        if not bool(torch.isfinite(done.x0).all()):
            raise FloatingPointError(
                "the teacher's samples are not finite: its weights are broken, or pipeline.dtype is too narrow for its activations; take bfloat16 or float32, "
                "and check it with flowalign doctor"
            )
        return done.x0.float().cpu()

    def _noise(self, rows: Tensor, prompts: Sequence[PromptLike]) -> Tensor:
        group, member = rows // self.config.group_size, rows % self.config.group_size
        uid = torch.tensor([prompts[i].uid for i in group.tolist()])
        return normal(
            self.pipeline.event_shape, seed=self.seed, purpose="pair noise", step=0, prompts=uid, samples=sample_number(group, member)
        )

    # -- steps --------------------------------------------------------------------------------------------------------------------

    def collect(self, step: int) -> Collected:
        """Deal pairs out to the updates of a step, and measure what the student makes of the last ones' prompts."""
        with self.clock.phase("rollout"):
            self.prepare()
            assert self._pairs is not None
            stored, prompts = self._pairs
            config, rank, world = self.config, self.accelerator.process_index, self.accelerator.num_processes
            groups = torch.tensor(self._dealt(step))  # [updates * groups]
            every = (groups[:, None] * config.group_size + torch.arange(rank, config.group_size, world)).flatten()
            share = torch.arange(self.num_updates).repeat_interleave(len(every) // self.num_updates)
            place = torch.arange(len(groups)).remainder(config.groups).repeat_interleave(config.group_size // world)
            texts = [prompts[group] for group in (every // config.group_size).tolist()]
            cond_texts = [prompt.text for prompt in texts]
            cond = self.pipeline.encode(cond_texts)
            pairs = Pairs(
                noise=self._noise(every, prompts).to(self.accelerator.device),
                x0=stored[(every - rank) // world].to(self.accelerator.device),
                sigmas=self.sigmas,
                spread=self.spread,
                finish=self.finish,
                prompt=torch.tensor([prompt.uid for prompt in texts]),
                group=place,
                sample=every % config.group_size,
                share=share,
                keep=torch.ones(len(every), dtype=torch.bool),
            )
            shown = (pairs.share == self.num_updates - 1).nonzero().squeeze(1)
            scores = self.scorers.begin()
            seen = [texts[row] for row in shown.tolist()]
            asked, records = [prompt.text for prompt in seen], [prompt.metadata for prompt in seen]
            size = config.rollout_batch_size
            decoder = Decoder(pipeline=self.pipeline, scores=scores, prompts=asked, metadata=records, batch_size=size)
            latents = self._show(step, pairs, cond, shown, decoder)
            images = decoder.images()
        with self.clock.phase("reward"):
            (table,), hidden = self.together(lambda: scores.finish(images, asked, records))
            self.clock.add(HIDDEN, hidden)
            values = RewardTable(names=table.names, values=self._gather(table.values))

        def count(purpose: str, rows: int) -> None:
            self.evaluations[purpose] += rows

        return Collected(
            experience=pairs,
            velocity=Networks(
                pipeline=self.pipeline,
                cond=cond,
                heads=self.heads,
                count=count,
                teacher=None if self.teacher is self.pipeline else (self.teacher, self.teacher.encode(cond_texts)),
                taps=self.settings.discriminator.taps if self.heads else (),
            ),
            rewards=values,
            metrics=RewardTable(names=(), values=values.values[:, :0]),
            own=table,
            prompts=asked,
            metadata=records,
            advantages=None,
            images=images,
            latents=latents,
        )

    def _dealt(self, step: int) -> list[int]:
        """Deal groups out, each once before any comes again."""
        first = step * self.num_updates * self.config.groups
        wanted = range(first, first + self.num_updates * self.config.groups)
        orders: dict[int, list[int]] = {}
        for at in wanted:
            turn = at // self.num_groups
            if turn not in orders:
                orders[turn] = torch.randperm(self.num_groups, generator=generator(self.seed, "pairs", turn)).tolist()
        return [orders[at // self.num_groups][at % self.num_groups] for at in wanted]

    def _show(self, step: int, pairs: Pairs, cond: Any, shown: Tensor, decoder: Decoder) -> Tensor:
        """Let the student make images for some rows' prompts, as a user of the pipeline would; returns what they are decoded from."""
        noise = normal(
            self.pipeline.event_shape,
            seed=self.seed,
            purpose="shown noise",
            step=step,
            prompts=pairs.prompt[shown],
            samples=sample_number(pairs.group[shown], pairs.sample[shown]),
        )
        done = self.pipeline.rollout(
            cond.take(shown),
            ode(self.settings.student_steps),
            x_init=noise.to(self.accelerator.device),
            noise=no_noise,
            role=self.shown,
            batch_size=self.config.rollout_batch_size,
            ended=decoder.take,
        )
        self.evaluations["shown"] += done.evaluations
        return done.x0

    def _gather(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values
        everyone: Tensor = self.accelerator.gather(values.to(self.accelerator.device))
        return everyone.cpu()

    def take_evaluations(self) -> dict[str, int]:
        """Return the model evaluations by purpose since the last call, over all ranks, and begin anew; "taps" end early."""
        names = ("shown", "teacher", "train", "current", "fake", "reference", "taps")
        return counted(self.evaluations, names, self.accelerator, self.pipeline.rows_per_evaluation)


_NOISE = 0.98  # share of the noisiest level that a first rung may have at least


def _read(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """Read stored samples; None where there are none that are whole."""
    if not path.is_file():
        return None
    try:
        found = load_file(path)["x0"]
    except (SafetensorError, KeyError):
        return None
    return found if found.shape == shape else None
