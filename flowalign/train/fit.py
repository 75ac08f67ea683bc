"""The one training loop: collect, score, estimate, update, log, checkpoint."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flowalign.core.algorithm import CURRENT, Algorithm, Experience, Rows, Update, Velocity, sample_number
from flowalign.core.decays import ema_warmup
from flowalign.core.plans import Plan
from flowalign.core.randomness import normal
from flowalign.core.rollout import Trajectory
from flowalign.estimators import AdvantageBatch, Estimator, RewardBatch
from flowalign.train import checkpoint
from flowalign.train.journal import Clock, Journal
from flowalign.train.scoring import NamedReward, RewardTable, score


class Roles(Protocol):
    """Versions of the trained network."""

    def add(self, name: str) -> None: ...
    def blend(self, name: str, decay: float) -> None: ...
    def trainable_parameters(self) -> list[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Pipeline(Protocol):
    """What the loop needs of a pipeline."""

    roles: Any
    module: nn.Module
    num_steps: int

    @property
    def event_shape(self) -> tuple[int, ...]: ...
    def encode(self, prompts: Sequence[str]) -> Any: ...
    def rollout(
        self, cond: Any, plan: Plan, *, x_init: Tensor, noise: Callable[[int], Tensor], batch_size: int | None = None
    ) -> Trajectory: ...
    def velocity(self, x: Tensor, sigma: Tensor, cond: Any, role: str = CURRENT) -> Tensor: ...
    def decode(self, x: Tensor) -> Tensor: ...


class PromptLike(Protocol):
    """A prompt: its text, its record and a stable id."""

    @property
    def text(self) -> str: ...
    @property
    def metadata(self) -> dict[str, Any]: ...
    @property
    def uid(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run trains. Sizes are of the whole job; how many devices share the work changes no result beyond rounding.

    Attributes:
        groups: Prompts of a step; each is the group of its samples.
        group_size: Samples of a prompt; a multiple of the number of processes, which share each group equally.
        rollout_batch_size: Samples of one call of the pipeline, on each device.
        micro_batch_size: Rows of one forward and backward, on each device; changes nothing beyond rounding.
        learning_rate: Of AdamW, constant after the warm-up.
        warmup: Optimizer updates with a linearly rising learning rate.
        betas: Of AdamW.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are clipped to this norm.
        ema_decay: Decay of an average of the weights that is saved instead of the last ones; null for none.
        checkpoint_every: Steps between checkpoints (the last step is always written).
        keep_checkpoints: How many stay.
        sample_every: Steps between grids of samples; 0 for none.
        trackers: Further logs through accelerate: "tensorboard", "wandb", "trackio".
    """

    groups: int = 8
    group_size: int = 16
    rollout_batch_size: int = 64
    micro_batch_size: int = 64
    learning_rate: float = 3e-4
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema_decay: float | None = None
    checkpoint_every: int = 1
    keep_checkpoints: int = 2
    sample_every: int = 0
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()

    def __post_init__(self) -> None:
        """Refuse sizes and rates that cannot be meant."""
        for name in ("groups", "group_size", "rollout_batch_size", "micro_batch_size", "checkpoint_every", "keep_checkpoints"):
            if vars(self)[name] < 1:
                raise ValueError(f"train.{name}: got {vars(self)[name]}, needed at least 1")
        if self.group_size == 1:
            raise ValueError("train.group_size: got 1; a group estimator compares the samples of a prompt, so needed at least 2")
        if self.learning_rate <= 0 or self.max_grad_norm <= 0:
            raise ValueError("train.learning_rate and train.max_grad_norm must be positive")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"train.ema_decay: got {self.ema_decay}, needed a value in (0, 1) or null")


AVERAGE = "average"


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; its state is saved."""


@dataclass(kw_only=True)
class Trainer:
    """Everything of a run that the loop works with.

    Attributes:
        pipeline: Generates, replays and decodes.
        algorithm: Plan, rows and loss.
        estimator: From rewards to advantages.
        rewards: What images are scored by.
        draw: From a step to its prompts, ``config.groups`` of them; a pure function.
        config: Sizes and rates.
        seed: Seed of the run.
        folder: Run folder.
        accelerator: Devices and ranks.
        after_step: Called with the finished step's line and images, on every rank.
    """

    pipeline: Pipeline
    algorithm: Algorithm
    estimator: Estimator
    rewards: Sequence[NamedReward]
    draw: Callable[[int], Sequence[PromptLike]]
    config: TrainConfig
    seed: int
    folder: Path
    accelerator: Accelerator = field(default_factory=Accelerator)
    after_step: Callable[[dict[str, Any], Tensor], None] | None = None

    def __post_init__(self) -> None:
        """Set up roles, optimizer and the wrapped network."""
        world = self.accelerator.num_processes
        if self.config.group_size % world:
            raise ValueError(
                f"train.group_size: {self.config.group_size} samples of a prompt cannot be shared equally by {world} processes; "
                f"use a multiple of {world}"
            )
        for role in self.algorithm.roles:
            self.pipeline.roles.add(role)
        if self.config.ema_decay is not None:
            self.pipeline.roles.add(AVERAGE)
        self.parameters = self.pipeline.roles.trainable_parameters()
        config = self.config
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
        self.state = self.estimator.init()
        self.clock = Clock()
        self._last_finite = "none yet"
        self.pipeline.module = self.accelerator.prepare(self.pipeline.module)

    @property
    def result(self) -> str:
        """The role that the run is for: the average of the weights where there is one."""
        return CURRENT if self.config.ema_decay is None else AVERAGE

    # -- collect ----------------------------------------------------------------------------------------------------------------

    def collect(self, step: int) -> tuple[Experience, Velocity, RewardTable, AdvantageBatch, Tensor]:
        """Sample this rank's images of a step, score them and compare them with those of all ranks."""
        config, rank, world = self.config, self.accelerator.process_index, self.accelerator.num_processes
        prompts = self.draw(step)
        flat = torch.arange(rank, config.groups * config.group_size, world)
        group, sample = flat // config.group_size, flat % config.group_size
        mine = [prompts[i] for i in group.tolist()]
        uid = torch.tensor([prompt.uid for prompt in mine])

        def keyed(purpose: str) -> Tensor:
            numbers = sample_number(group, sample)
            return normal(self.pipeline.event_shape, seed=self.seed, purpose=purpose, step=step, prompts=uid, samples=numbers)

        with self.clock.phase("rollout"):
            cond = self.pipeline.encode([prompt.text for prompt in mine])
            trajectory = self.pipeline.rollout(
                cond,
                self.algorithm.plan(step, self.pipeline.num_steps),
                x_init=keyed("initial noise").to(self.accelerator.device),
                noise=lambda i: keyed(f"noise of step {i}"),
                batch_size=config.rollout_batch_size,
            )
            images = self.pipeline.decode(trajectory.x0)
        with self.clock.phase("reward"):
            table = score(self.rewards, images, [prompt.text for prompt in mine], [prompt.metadata for prompt in mine])
        with self.clock.phase("advantage"):
            everyone = self._gather(table, group, sample)
            advantages, self.state = self.estimator.update(everyone, self.state)
            # Rank r holds rows r, r + world, ...; the gathered rows are sorted by id, which is the flat index.
            advantage, weight = advantages.advantage[flat], advantages.weight[flat]
        experience = Experience(trajectory=trajectory, advantage=advantage, weight=weight, prompt=uid, group=group, sample=sample)

        def velocity(x: Tensor, sigma: Tensor, rows: Tensor, role: str) -> Tensor:
            return self.pipeline.velocity(x, sigma, cond.take(rows), role)

        everyone_table = RewardTable(names=table.names, values=everyone.rewards, clauses=None, clauses_valid=None)
        return experience, velocity, everyone_table, advantages, images

    def _gather(self, table: RewardTable, group: Tensor, sample: Tensor) -> RewardBatch:
        """Join the rewards of all ranks, sorted by id: nothing that is compared may be rank-local."""

        def gathered(values: Tensor) -> Tensor:
            if self.accelerator.num_processes == 1:
                return values.cpu()  # not through the device: some have no float64
            everyone: Tensor = self.accelerator.gather(values.to(self.accelerator.device))
            return everyone.cpu()

        uid = gathered(group * self.config.group_size + sample)
        order = torch.argsort(uid)
        columns: dict[str, Tensor] = {"rewards": table.values, "group_id": group}
        if table.clauses is not None and table.clauses_valid is not None:
            columns |= {"clauses": table.clauses, "clauses_valid": table.clauses_valid}
        joined = {name: gathered(values)[order] for name, values in columns.items()}
        return RewardBatch(
            rewards=joined["rewards"],
            group_id=joined["group_id"],
            sample_uid=uid[order],
            clauses=joined.get("clauses"),
            clauses_valid=joined.get("clauses_valid"),
        )

    # -- update -----------------------------------------------------------------------------------------------------------------

    def update(self, experience: Experience, velocity: Velocity, update: Update) -> dict[str, float]:
        """Make one optimizer update of each player and return what to log.

        Raises:
            FloatingPointError: If a loss or gradient is not finite, before anything moves.
        """
        logged: dict[str, float] = {}
        for player in self.algorithm.players:
            rows = self.algorithm.rows(experience, update)
            if len(rows) == 0:
                raise ValueError(f"step {update.step}, update {update.index}: no rows to train on (fewer groups than minibatches?)")
            try:
                sums = self._backward(player, rows, velocity)
            except FloatingPointError as error:
                raise self._diverged(player, update.step, str(error)) from error
            norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
            means = self._mean_over_ranks(sums, len(rows))
            self._check_finite(player, update.step, means["loss"], norm)
            number = update.key(self.algorithm.num_updates) + 1
            for options in self.optimizer.param_groups:
                options["lr"] = self.config.learning_rate * min(1.0, number / max(1, self.config.warmup))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            logged |= {**means, "grad_norm": norm}
        return logged

    def _backward(self, player: str, rows: Rows, velocity: Velocity) -> dict[str, Tensor]:
        """Accumulate the gradient of the mean loss over all rows; micro-batches only bound the memory."""
        parts = rows.split(self.config.micro_batch_size)
        sums: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.pipeline.module):
                loss = self.algorithm.loss(player, part, velocity)
                self.accelerator.backward(loss.value.sum() / len(rows))
            for name, value in {"loss": loss.value.detach(), **loss.metrics}.items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.sum()
        return sums

    def _mean_over_ranks(self, sums: Mapping[str, Tensor], num_rows: int) -> dict[str, float]:
        names = sorted(sums)
        means = torch.stack([sums[name] for name in names]) / num_rows
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, "mean")
        return dict(zip(names, means.tolist(), strict=True))

    def _check_finite(self, player: str, step: int, loss: float, norm: float) -> None:
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise self._diverged(player, step, f"the {what} is {value}")
        self._last_finite = f"step {step}, loss {loss:.4g}, gradient norm {norm:.4g}"

    def _diverged(self, player: str, step: int, what: str) -> FloatingPointError:
        self.optimizer.zero_grad(set_to_none=True)
        return FloatingPointError(
            f"step {step}, player {player!r}: {what} (last finite: {self._last_finite}); nothing was updated. "
            f"Lower train.learning_rate or raise the penalties, and resume from the last checkpoint"
        )

    # -- run --------------------------------------------------------------------------------------------------------------------

    def step(self, step: int) -> dict[str, Any]:
        """Do one step: rollout, scoring and all its updates. Returns the step's log line."""
        experience, velocity, table, advantages, images = self.collect(step)
        logged: list[dict[str, float]] = []
        with self.clock.phase("train"):
            for index in range(self.algorithm.num_updates):
                logged.append(self.update(experience, velocity, Update(seed=self.seed, step=step, index=index)))
            for role, decay in self.algorithm.roles.items():
                self.pipeline.roles.blend(role, decay(step))
            if self.config.ema_decay is not None:
                self.pipeline.roles.blend(AVERAGE, ema_warmup(self.config.ema_decay)(step))
        names = logged[0].keys()
        metrics = {name: sum(line[name] for line in logged) / len(logged) for name in names}
        if "ratio_gap" in metrics:
            # On-policy only before the first update: there a gap is the rollout and the replay disagreeing.
            metrics["ratio_gap_first"] = logged[0]["ratio_gap"]
        line = {
            "step": step,
            "images": len(table.values),
            "reward": dict(zip(table.names, torch.nanmean(table.values, 0).tolist(), strict=True)),
            "reward_std": dict(zip(table.names, _nanstd(table.values).tolist(), strict=True)),
            "advantage": dict(advantages.stats),
            "grad_norm": metrics.pop("grad_norm"),
            "metrics": metrics,
        }
        if self.after_step is not None:
            self.after_step(line, images)
        return line

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on; randomness is keyed and needs no state."""
        return {
            "roles": self.pipeline.roles.state_dict(),
            "optimizer": checkpoint.optimizer_state(self.optimizer),
            "estimator": self.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.pipeline.roles.load_state_dict(state["roles"])
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        self.state = state["estimator"]

    def _anywhere(self, flag: bool) -> bool:
        """Tell whether the flag is set on any rank: all must leave together."""
        if self.accelerator.num_processes == 1:
            return flag
        count = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum")
        return bool(count > 0)

    def fit(self, steps: int) -> None:
        """Train up to ``steps`` steps in all, resuming from the run folder's newest whole checkpoint.

        Raises:
            Interrupted: If asked to stop (Ctrl-C); the finished steps are saved, and the same call goes on.
            FloatingPointError: If a loss or gradient is not finite.
        """
        main = self.accelerator.is_main_process
        found = checkpoint.load_newest(self.folder / "checkpoints")
        start = 0
        if found is not None:
            start, state = found
            self.load_state_dict(state)
        journal = Journal(self.folder / "log.jsonl", start=start, steps=steps, show=main) if main else None
        try:
            with _stop_requests() as stop:
                self.clock.take()
                for step in range(start, steps):
                    line = self.step(step)
                    stopping = self._anywhere(stop.is_set())
                    line["time_s"] = self.clock.take()
                    # The log first: a line without its checkpoint is dropped on resuming, a checkpoint without its line would lose it.
                    if journal is not None:
                        journal.write(line)
                    if self.accelerator.trackers:
                        self.accelerator.log(_flat(line), step=step)
                    due = (step + 1) % self.config.checkpoint_every == 0 or step + 1 == steps or stopping
                    with self.clock.phase("checkpoint"):  # counted to the next step
                        if main and due:
                            checkpoint.save(self.folder / "checkpoints", step + 1, self.state_dict(), keep=self.config.keep_checkpoints)
                    if stopping:
                        raise Interrupted(f"stopped after step {step + 1} of {steps}; the state is saved, the same command goes on")
        finally:
            if journal is not None:
                journal.close()


def _nanstd(values: Tensor) -> Tensor:
    return (values - torch.nanmean(values, 0)).square().nanmean(0).sqrt()


def _flat(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat[f"{prefix}{key}"] = value
    return flat


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a request to stop after the step; a second one stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread alone
        return

    def ask(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
