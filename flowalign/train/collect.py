"""The first half of a step: sample, score, measure and compare over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from flowalign.core.algorithm import Algorithm, Experience, Velocity, sample_number
from flowalign.core.randomness import normal
from flowalign.estimators import AdvantageBatch, Estimator, RewardBatch
from flowalign.estimators.diversity import group_novelty
from flowalign.train.journal import Clock
from flowalign.train.protocols import Pipeline, PromptLike
from flowalign.train.scoring import NamedReward, RewardTable, score
from flowalign.train.settings import TrainConfig
from flowalign.train.tables import NOVELTY, Sampled, check_needs, extra_tables, features

Metric = NamedReward | Literal["novelty"]


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a step has to train on, and what it shows of it.

    Attributes:
        experience: This rank's samples with their advantages.
        velocity: The network's velocity on these samples, under any role.
        rewards, metrics: Raw values of all ranks, ``[samples, columns]``, with their names.
        advantages: Of all ranks.
        images: This rank's, ``[batch, 3, h, w]``.
    """

    experience: Experience
    velocity: Velocity
    rewards: RewardTable
    metrics: RewardTable
    advantages: AdvantageBatch
    images: Tensor


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

    def __post_init__(self) -> None:
        """Refuse what cannot be shared by the ranks or estimated."""
        world = self.accelerator.num_processes
        if self.config.group_size % world:
            raise ValueError(
                f"train.group_size: {self.config.group_size} samples of a prompt cannot be shared equally by {world} processes; "
                f"use a multiple of {world}"
            )
        if self.config.group_size == 1 and "baseline" not in self.estimator.needs:
            raise ValueError("train.group_size: got 1; a group estimator compares the samples of a prompt, so needed at least 2")
        check_needs(self.estimator.needs, self.algorithm.plan(0, self.pipeline.num_steps), len(self.metrics))
        self.state = self.estimator.init()

    def collect(self, step: int) -> Collected:
        """Sample this rank's images of a step, score them and compare them with those of all ranks."""
        config, rank, world = self.config, self.accelerator.process_index, self.accelerator.num_processes
        prompts = self.draw(step)
        flat = torch.arange(rank, config.groups * config.group_size, world)
        group, sample = flat // config.group_size, flat % config.group_size
        mine = [prompts[i] for i in group.tolist()]
        uid = torch.tensor([prompt.uid for prompt in mine])
        with self.clock.phase("rollout"):
            sampled = self._sample(step, mine, uid, sample_number(group, sample))
        with self.clock.phase("reward"):
            table = score(self.rewards, sampled.images, sampled.prompts, sampled.metadata)
            extra = extra_tables(
                self.estimator.needs,
                self.pipeline,
                self.rewards,
                sampled,
                batch_size=config.rollout_batch_size,
                step_rewards=config.step_rewards,
            )
            names, measured = self._measure(sampled)
        with self.clock.phase("advantage"):
            # Ids are unique over the run and groups are prompts: estimators with a memory meet them again.
            number = step * config.groups * config.group_size + flat
            everyone = self._gather(names, number, uid, table, {**extra, **measured})
            advantages, self.state = self.estimator.update(everyone, self.state)
        # Rank r holds rows r, r + world, ...; the gathered rows are sorted by id, which is the flat index.
        experience = Experience(
            trajectory=sampled.trajectory,
            advantage=advantages.advantage[flat],
            weight=advantages.weight[flat],
            keep=advantages.keep[flat],
            target=None if advantages.target is None else advantages.target[flat],
            prompt=uid,
            group=group,
            sample=sample,
        )

        def velocity(x: Tensor, sigma: Tensor, rows: Tensor, role: str) -> Tensor:
            return self.pipeline.velocity(x, sigma, sampled.cond.take(rows), role)

        return Collected(
            experience=experience,
            velocity=velocity,
            rewards=replace(table, values=everyone.rewards, clauses=None, clauses_valid=None),
            metrics=RewardTable(names=names, values=everyone.rewards[:, :0] if everyone.metric is None else everyone.metric),
            advantages=advantages,
            images=sampled.images,
        )

    def _sample(self, step: int, prompts: Sequence[PromptLike], uid: Tensor, number: Tensor) -> Sampled:
        def keyed(purpose: str) -> Tensor:
            return normal(self.pipeline.event_shape, seed=self.seed, purpose=purpose, step=step, prompts=uid, samples=number)

        plan = self.algorithm.plan(step, self.pipeline.num_steps)
        cond = self.pipeline.encode([prompt.text for prompt in prompts])
        trajectory = self.pipeline.rollout(
            cond,
            plan,
            x_init=keyed("initial noise").to(self.accelerator.device),
            noise=lambda i: keyed(f"noise of step {i}"),
            batch_size=self.config.rollout_batch_size,
        )
        return Sampled(
            cond=cond,
            plan=plan,
            trajectory=trajectory,
            images=self.pipeline.decode(trajectory.x0),
            prompts=[prompt.text for prompt in prompts],
            metadata=[prompt.metadata for prompt in prompts],
        )

    def _measure(self, sampled: Sampled) -> tuple[tuple[str, ...], dict[str, Tensor]]:
        """Measure this rank's samples: names of the metric's columns, and what is to be gathered for them."""
        names: list[str] = []
        columns: list[Tensor] = []
        gathered: dict[str, Tensor] = {}
        for metric in self.metrics:
            if isinstance(metric, str):
                # It compares samples of one group, which several ranks hold: only its features are measured here.
                gathered["features"] = features(sampled.images)
                names.append(NOVELTY)
                columns.append(torch.zeros(len(sampled.images), 1, dtype=torch.float64))
            else:
                table = score([metric], sampled.images, sampled.prompts, sampled.metadata)
                names.extend(table.names)
                columns.append(table.values)
        if columns:
            gathered["metric"] = torch.cat(columns, 1)
        return tuple(names), gathered

    def _gather(self, names: Sequence[str], number: Tensor, prompt: Tensor, table: RewardTable, tables: dict[str, Tensor]) -> RewardBatch:
        """Join the tables of all ranks, sorted by id: nothing that is compared may be rank-local."""

        def gathered(values: Tensor) -> Tensor:
            if self.accelerator.num_processes == 1:
                return values.cpu()  # not through the device: some have no float64
            everyone: Tensor = self.accelerator.gather(values.to(self.accelerator.device))
            return everyone.cpu()

        uid = gathered(number)
        order = torch.argsort(uid)
        tables = {"rewards": table.values, "group_id": prompt, **tables}
        if table.clauses is not None and table.clauses_valid is not None:
            tables |= {"clauses": table.clauses, "clauses_valid": table.clauses_valid}
        joined: dict[str, Any] = {name: gathered(values)[order] for name, values in tables.items()}
        if "features" in joined:
            novelty = group_novelty(joined.pop("features"), joined["group_id"])
            joined["metric"][:, names.index(NOVELTY)] = novelty
        return RewardBatch(sample_uid=uid[order], **joined)
