"""The first half of a step: sample, score, measure and compare over all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from flowalign.core.algorithm import Algorithm, Experience, sample_number
from flowalign.core.distillation import Pairs
from flowalign.core.plans import Plan, ode
from flowalign.core.randomness import normal
from flowalign.estimators import AdvantageBatch, Estimator, RewardBatch
from flowalign.estimators.diversity import group_novelty
from flowalign.train.forests import anchors, compared_groups, forest, trained_steps
from flowalign.train.journal import HIDDEN, Clock
from flowalign.train.overlap import Decoder, Scorers, StepScores
from flowalign.train.players import HeadPlayer, Networks
from flowalign.train.protocols import Pipeline, PromptLike
from flowalign.train.rehearsal import rehearse
from flowalign.train.scoring import NamedReward, RewardTable, score
from flowalign.train.settings import TrainConfig
from flowalign.train.tables import NOVELTY, Sampled, check_needs, extra_tables, features, learns_alone
from flowalign.train.together import Together

Metric = NamedReward | Literal["novelty"]


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a step has to train on, and what it shows of it.

    Attributes:
        experience: This rank's samples with their advantages, or its pairs.
        velocity: The network's velocity on these samples, under any role.
        rewards, metrics: Raw values of all ranks, ``[samples, columns]``, with their names.
        own: This rank's rewards, with their clauses.
        prompts, metadata: One for each of this rank's images.
        advantages: Of all ranks; None where nothing is compared.
        images: This rank's, ``[batch, 3, h, w]``.
        latents: What they were decoded from.
    """

    experience: Experience | Pairs
    velocity: Networks
    rewards: RewardTable
    metrics: RewardTable
    own: RewardTable
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]
    advantages: AdvantageBatch | None
    images: Tensor
    latents: Tensor


@dataclass(kw_only=True)
class Collector:
    """Samples, scores and compares.

    Attributes:
        pipeline: Generates, replays and decodes.
        algorithm: Plans the rollout.
        estimator: From rewards to advantages.
        rewards: What images are scored by.
        metrics: Side measurements that the estimator may read, in the order of their columns; rewards, or "novelty".
        draw: From a step to its prompts, ``config.groups`` of them; a pure function.
        config: Sizes and rates.
        seed: Seed of the run.
        accelerator: Devices and ranks.
        clock: Times the phases.
        heads: Networks of the algorithm's own.
    """

    pipeline: Pipeline
    algorithm: Algorithm
    estimator: Estimator
    rewards: Sequence[NamedReward]
    metrics: Sequence[Metric]
    draw: Callable[[int], Sequence[PromptLike]]
    config: TrainConfig
    seed: int
    accelerator: Accelerator
    clock: Clock
    heads: Mapping[str, HeadPlayer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be shared by the ranks or estimated."""
        self.config.check_processes(self.accelerator.num_processes)
        plan = self.algorithm.plan(0, self.pipeline.num_steps, self.seed)
        groups = compared_groups(plan, torch.zeros(self.config.group_size, dtype=torch.int64), torch.arange(self.config.group_size))
        alone = int(torch.unique(groups, return_counts=True)[1].min()) == 1
        if alone and not learns_alone(self.estimator, len(self.rewards)):
            raise ValueError(
                f"train.group_size: got {self.config.group_size}; a group estimator compares the samples of a "
                f"{plan.compare}, so needed at least 2 there"
            )
        check_needs(self.estimator.needs, plan, len(self.metrics))
        rehearse(
            self.algorithm,
            self.pipeline.sigmas(self.pipeline.num_steps),
            groups=self.config.groups,
            group_size=self.config.group_size,
            gives_targets=self.estimator.gives_targets,
            num_processes=self.accelerator.num_processes,
        )
        self.state = self.estimator.init()
        self.together = Together(accelerator=self.accelerator)
        self.evaluations: Counter[str] = Counter()
        measured = [[metric] for metric in self.metrics if not isinstance(metric, str)]
        self.scorers = Scorers(self.rewards, *measured, device=self.accelerator.device)

    def collect(self, step: int) -> Collected:
        """Sample this rank's images of a step, score them and compare them with those of all ranks."""
        config, rank, world = self.config, self.accelerator.process_index, self.accelerator.num_processes
        prompts = self.draw(step)
        plan = self.algorithm.plan(step, self.pipeline.num_steps, self.seed)
        # A seed is an initial state; an image is a final state of one, numbered by seed and then within it.
        seed = torch.arange(rank, config.groups * config.group_size, world)
        flat = (plan.num_leaves * seed[:, None] + torch.arange(plan.num_leaves)).flatten()
        group, member = seed // config.group_size, seed % config.group_size
        mine = [prompts[i] for i in group.tolist()]
        uid = torch.tensor([prompt.uid for prompt in mine])
        with self.clock.phase("rollout"):
            scores = self.scorers.begin()
            sampled = self._sample(step, plan, mine, uid, sample_number(group, member), scores)
        with self.clock.phase("reward"):
            (table, *others), hidden = self.together(lambda: scores.finish(sampled.images, sampled.prompts, sampled.metadata))
            self.clock.add(HIDDEN, hidden)
            extra = self._extra_tables(sampled)
            names, measured = self._measure(sampled, others)
        with self.clock.phase("advantage"):
            # Ids are unique over the run and groups are prompts: estimators with a memory meet them again.
            number = step * config.groups * config.group_size * plan.num_leaves + flat
            # Trees and shared states are compared within prompts; everything else within what the plan compares.
            whole = {"tree", "anchor_id"} & self.estimator.needs
            compared = compared_groups(replace(plan, compare="prompt") if whole else plan, uid, sample_number(group, member))
            everyone = self._gather(plan, names, number, compared, table, {**extra, **measured})
            advantages, self.state = self.estimator.update(everyone, self.state)
        # The gathered rows are sorted by id, which is the flat index.
        experience = Experience(
            trajectory=sampled.trajectory,
            advantage=advantages.advantage[flat],
            weight=advantages.weight[flat],
            keep=advantages.keep[flat],
            target=None if advantages.target is None else advantages.target[flat],
            prompt=uid.repeat_interleave(plan.num_leaves),
            group=group.repeat_interleave(plan.num_leaves),
            sample=flat % (config.group_size * plan.num_leaves),
        )

        def count(purpose: str, rows: int) -> None:
            self.evaluations[purpose] += rows

        return Collected(
            experience=experience,
            velocity=Networks(pipeline=self.pipeline, cond=sampled.cond, heads=self.heads, count=count),
            rewards=replace(table, values=everyone.rewards, clauses=None, clauses_valid=None),
            metrics=RewardTable(names=names, values=everyone.rewards[:, :0] if everyone.metric is None else everyone.metric),
            own=table,
            prompts=sampled.prompts,
            metadata=sampled.metadata,
            advantages=advantages,
            images=sampled.images,
            latents=sampled.trajectory.x0,
        )

    def _sample(self, step: int, plan: Plan, prompts: Sequence[PromptLike], uid: Tensor, number: Tensor, scores: StepScores) -> Sampled:
        def initial(purpose: str) -> Tensor:
            return normal(self.pipeline.event_shape, seed=self.seed, purpose=purpose, step=step, prompts=uid, samples=number)

        def noise(index: int) -> Tensor:
            """Key each state that is drawn by its seed and its place among those that the seed draws at this step."""
            purpose, each = f"noise of step {index}", len(plan.drawn(index))
            drawn = [initial(purpose if place == 0 else f"{purpose}, state {place}") for place in range(each)]
            return torch.stack(drawn, 1).flatten(0, 1)

        cond = self.pipeline.encode([prompt.text for prompt in prompts])
        everyone = [prompt for prompt in prompts for _ in range(plan.num_leaves)]
        texts, records = [prompt.text for prompt in everyone], [prompt.metadata for prompt in everyone]
        size = self.config.rollout_batch_size
        decoder = Decoder(pipeline=self.pipeline, scores=scores, prompts=texts, metadata=records, batch_size=size)
        trajectory = self.pipeline.rollout(
            cond,
            plan,
            x_init=initial("initial noise").to(self.accelerator.device),
            noise=noise,
            batch_size=size,
            role=self.algorithm.behaviour,
            ended=decoder.take,
        )
        self.evaluations["rollout"] += trajectory.evaluations
        return Sampled(
            cond=cond.take(torch.arange(len(prompts)).repeat_interleave(plan.num_leaves)),
            plan=plan,
            trajectory=trajectory,
            images=decoder.images(),
            prompts=texts,
            metadata=records,
        )

    def _extra_tables(self, sampled: Sampled) -> dict[str, Tensor]:
        def complete(x: Tensor, images: Tensor, start: int) -> Tensor:
            done = self.pipeline.rollout(
                sampled.cond.take(images),
                ode(sampled.plan.num_steps),
                x_init=x,
                noise=no_noise,
                batch_size=self.config.rollout_batch_size,
                start=start,
                role=self.algorithm.behaviour,
            )
            self.evaluations["completion"] += done.evaluations
            return done.x0

        def scored(x0: Tensor, images: Tensor) -> Tensor:
            texts, records = ([column[i] for i in images.tolist()] for column in (sampled.prompts, sampled.metadata))
            images = self.pipeline.decode(x0)
            return self.together(lambda: score(self.rewards, images, texts, records).values)

        return extra_tables(self.estimator.needs, complete, scored, sampled, step_rewards=self.config.step_rewards)

    def take_evaluations(self) -> dict[str, int]:
        """Return the model evaluations by purpose since the last call, over all ranks, and begin anew.

        An evaluation is of one state; under guidance the network computes ``rows_per_evaluation`` rows for it.
        """
        names = ("rollout", "completion", "train", "monitor", *self.algorithm.roles)
        return counted(self.evaluations, names, self.accelerator, self.pipeline.rows_per_evaluation)

    def _measure(self, sampled: Sampled, tables: Sequence[RewardTable]) -> tuple[tuple[str, ...], dict[str, Tensor]]:
        """Return the names of the metric's columns, and what is to be gathered of this rank's samples for them; a table of each reward among them."""
        names: list[str] = []
        columns: list[Tensor] = []
        gathered: dict[str, Tensor] = {}
        found = iter(tables)
        for metric in self.metrics:
            if isinstance(metric, str):
                # It compares samples of one group, which several ranks hold: only its features are measured here.
                gathered["features"] = features(sampled.images)
                names.append(NOVELTY)
                columns.append(torch.zeros(len(sampled.images), 1, dtype=torch.float64))
            else:
                table = next(found)
                names.extend(table.names)
                columns.append(table.values)
        if columns:
            gathered["metric"] = torch.cat(columns, 1)
        return tuple(names), gathered

    def _gather(
        self, plan: Plan, names: Sequence[str], number: Tensor, compared: Tensor, table: RewardTable, tables: dict[str, Tensor]
    ) -> RewardBatch:
        """Join the tables of all ranks, sorted by id: nothing that is compared may be rank-local."""

        def gathered(values: Tensor) -> Tensor:
            if self.accelerator.num_processes == 1:
                return values.cpu()  # not through the device: some have no float64
            everyone: Tensor = self.accelerator.gather(values.to(self.accelerator.device))
            return everyone.cpu()

        uid = gathered(number)
        order = torch.argsort(uid)
        tables = {"rewards": table.values, "group_id": compared, **tables}
        if table.clauses is not None and table.clauses_valid is not None:
            tables |= {"clauses": table.clauses, "clauses_valid": table.clauses_valid}
        joined: dict[str, Any] = {name: gathered(values)[order] for name, values in tables.items()}
        if "features" in joined:
            novelty = group_novelty(joined.pop("features"), joined["group_id"])
            joined["metric"][:, names.index(NOVELTY)] = novelty
        if plan.has_siblings:
            joined |= self._shape(plan, joined)
        if "step_judge" in self.estimator.needs:
            joined["step_rewards"] = torch.where(joined["step_mask"][..., None], joined["rewards"][:, None], torch.nan)
        return RewardBatch(sample_uid=uid[order], **joined)

    def _shape(self, plan: Plan, joined: dict[str, Any]) -> dict[str, Any]:
        """Make what follows from the plan's shape alone: which steps each image trains, and what it shares with others."""
        num = len(joined["group_id"]) // plan.num_leaves
        shape: dict[str, Any] = {"step_mask": trained_steps(plan).repeat(num, 1)}
        if "anchor_id" in self.estimator.needs:
            shape["anchor_id"] = anchors(plan, num)
        if "tree" in self.estimator.needs:
            shape["tree"] = forest(plan, joined["group_id"][:: plan.num_leaves], joined["log_prob"])
        return shape


def counted(evaluations: Counter[str], names: Sequence[str], accelerator: Accelerator, rows_per_evaluation: int) -> dict[str, int]:
    """Sum counts over ranks and clear them; ``names`` are those that a rank may have and another not."""
    counts = {name: evaluations[name] for name in sorted({*names, *evaluations})}
    evaluations.clear()
    if accelerator.num_processes > 1:
        total = torch.tensor(list(counts.values()), device=accelerator.device)
        counts = dict(zip(counts, accelerator.reduce(total, "sum").tolist(), strict=True))
    counts = {name: count for name, count in counts.items() if count}
    return {**counts, "total": sum(counts.values()), "rows_per_evaluation": rows_per_evaluation}


def no_noise(step: int) -> Tensor:
    """Stand in for noise where a plan draws none."""
    raise AssertionError(f"the ODE asked for noise at step {step}")
