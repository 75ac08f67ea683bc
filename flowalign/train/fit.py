"""The one training loop: collect, update, log, checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from flowalign.core.algorithm import CURRENT, REFERENCE, Algorithm, Experience, NeverReady, Update
from flowalign.core.decays import ema_warmup
from flowalign.core.distillation import Distillation
from flowalign.estimators import Estimator
from flowalign.images import NotFiniteError
from flowalign.train import checkpoint, sharding
from flowalign.train.best import Best
from flowalign.train.cast import AVERAGE, Cast
from flowalign.train.collect import Collected, Collector, Metric
from flowalign.train.distance import distance_to_base, is_measured
from flowalign.train.flops import measure
from flowalign.train.gate import Gate
from flowalign.train.journal import Clock, Journal, flat
from flowalign.train.memory import exhausted
from flowalign.train.pairs import PairCollector
from flowalign.train.protocols import Pipeline, PromptLike
from flowalign.train.scoring import NamedReward
from flowalign.train.settings import TrainConfig
from flowalign.train.signals import stop_requests
from flowalign.train.updates import Updater


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; its state is saved."""


class Alarmed(ValueError):
    """The run stopped at an alarm; its state is saved."""


@dataclass(kw_only=True)
class Trainer:
    """Everything of a run that the loop works with.

    Attributes:
        pipeline: Generates, replays and decodes.
        algorithm: Plan, rows and loss.
        estimator: From rewards to advantages; None for a distillation.
        rewards: What images are scored by.
        metrics: Side measurements that the estimator may read, in the order of their columns; rewards, or "novelty".
        draw: From a step to its prompts, ``config.groups`` of them; a pure function.
        config: Sizes and rates.
        seed: Seed of the run.
        folder: Run folder.
        accelerator: Devices and ranks.
        after_step: Called with the finished step's line and what it was made of, on every rank.
        teacher: Of a distillation, the pipeline with the teacher's guidance; None for the same.
        distance_every: Steps between looks at the distance to the base, where no penalty measures it; None for none.
    """

    pipeline: Pipeline
    algorithm: Algorithm
    estimator: Estimator | None
    rewards: Sequence[NamedReward]
    draw: Callable[[int], Sequence[PromptLike]]
    config: TrainConfig
    seed: int
    folder: Path
    accelerator: Accelerator = field(default_factory=Accelerator)
    metrics: Sequence[Metric] = ()
    after_step: Callable[[dict[str, Any], Collected], None] | None = None
    teacher: Pipeline | None = None
    distance_every: int | None = None

    def __post_init__(self) -> None:
        """Set up where samples come from, and all that is trained."""
        on_device = self.accelerator.device.type == "cuda"
        self.clock = Clock(wait=torch.cuda.synchronize if on_device else None)
        self.collector = self._collector()
        self.cast = Cast(self.pipeline, self.algorithm, self.config, self.accelerator, seed=self.seed)
        self.collector.heads = self.cast.heads
        self.gate = Gate(self.algorithm, self.cast.heads)
        self.updater = Updater(
            pipeline=self.pipeline,
            algorithm=self.algorithm,
            config=self.config,
            accelerator=self.accelerator,
            cast=self.cast,
            folder=self.folder,
        )
        self.best = None if self.config.keep_best_by is None else Best(by=self.config.keep_best_by)
        self.is_whole = False  # whether nothing of the step at hand has moved

    def _collector(self) -> Collector | PairCollector:
        """Choose where a step's samples come from."""
        if isinstance(self.algorithm, Distillation):
            return PairCollector(
                pipeline=self.pipeline,
                teacher=self.teacher or self.pipeline,
                settings=self.algorithm.config,
                num_updates=self.algorithm.num_updates,
                rewards=self.rewards,
                draw=self.draw,
                config=self.config,
                seed=self.seed,
                folder=self.folder / "pairs",
                accelerator=self.accelerator,
                clock=self.clock,
                shown=self.result,
            )
        assert self.estimator is not None
        return Collector(
            pipeline=self.pipeline,
            algorithm=self.algorithm,
            estimator=self.estimator,
            rewards=self.rewards,
            metrics=self.metrics,
            draw=self.draw,
            config=self.config,
            seed=self.seed,
            accelerator=self.accelerator,
            clock=self.clock,
        )

    @property
    def result(self) -> str:
        """The role that the run is for: the average of the weights where there is one."""
        return CURRENT if self.config.ema_decay is None else AVERAGE

    def collect(self, step: int) -> Collected:
        """Sample, score and compare the images of a step."""
        return self.collector.collect(step)

    # -- run --------------------------------------------------------------------------------------------------------------------

    def step(self, step: int) -> dict[str, Any]:
        """Do one step: rollout, scoring and all its updates. Returns the step's log line."""
        self.is_whole, memory = True, self.collector.state
        try:
            found = self.collect(step)
        except NotFiniteError as error:
            self.is_whole = False
            raise self.updater.diverged(CURRENT, step, "its images hold values that are not finite") from error
        try:
            self.gate.ask(self.cast.state)
        except NeverReady:
            self.collector.state = memory  # the step will be done again
            raise
        self.is_whole = False
        logged: list[dict[str, float]] = []
        with self.clock.phase("train"):
            for index in range(self.algorithm.num_updates):
                update = Update(seed=self.seed, step=step, index=index)
                logged.append(self.updater.update(found.experience, found.velocity, update, ready=self.gate.is_open))
            for role, decay in self.algorithm.roles.items():
                self.pipeline.roles.blend(role, decay(step))
            if self.config.ema_decay is not None:
                self.pipeline.roles.blend(AVERAGE, ema_warmup(self.config.ema_decay)(step))
        self.updater.check_weights(step)
        made = [line for line in logged if line]  # an update whose samples were all filtered out logs nothing
        names = dict.fromkeys(name for line in made for name in line)
        told = {name: [line[name] for line in made if name in line] for name in names}
        metrics = {name: sum(values) / len(values) for name, values in told.items()}
        metrics |= self.gate.take(metrics)
        if "ratio_gap" in metrics:
            # On-policy only before the first update: there a gap is the rollout and the replay disagreeing.
            metrics["ratio_gap_first"] = made[0]["ratio_gap"]
        line = {
            "step": step,
            "images": len(found.rewards.values),
            "reward": found.rewards.means(),
            "reward_std": found.rewards.stds(),
            **({"metric": found.metrics.means()} if found.metrics.names else {}),
            "advantage": {} if found.advantages is None else dict(found.advantages.stats),
            "grad_norm": metrics.pop("grad_norm", 0.0),
            "metrics": metrics,
            "monitor": self._norms(found) | self._distance(step, found, metrics),
            "evaluations": self.collector.take_evaluations(),
        }
        if self.after_step is not None:
            self.after_step(line, found)
        return line

    def _norms(self, found: Collected) -> dict[str, float]:
        """Root mean squares that grow when a policy runs away: of the images' latents, and of the velocities that were trained."""
        parts = [found.latents.float().square().mean()]
        if found.velocity.squares:
            parts.append(
                torch.stack([total for total, _ in found.velocity.squares]).sum() / sum(rows for _, rows in found.velocity.squares)
            )
        means = torch.stack(parts)
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, "mean")
        return dict(zip(("latent_rms", "velocity_rms"), means.sqrt().tolist(), strict=False))

    def _distance(self, step: int, found: Collected, metrics: dict[str, float]) -> dict[str, float]:
        """Measure the distance to the base once in a few steps, where no penalty does and the base is at hand."""
        every = self.distance_every
        if every is None or step % every or is_measured(metrics) or REFERENCE not in self.pipeline.roles.names:
            return {}
        if not isinstance(found.experience, Experience):
            return {}
        return {"distance": self.updater.average(float(distance_to_base(found.velocity, found.experience, seed=self.seed, step=step)))}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on; randomness is keyed and needs no state. Where weights are shared, all processes must ask."""
        return {
            **self.cast.state_dict(),
            **self.gate.state_dict(),
            "estimator": self.collector.state,
            "best": None if self.best is None else self.best.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.cast.load_state_dict(state)
        self.gate.load_state_dict(state)
        self.collector.state = state["estimator"]
        if self.best is not None and state.get("best") is not None:
            self.best.load_state_dict(state["best"])

    def fit(self, steps: int) -> None:
        """Train up to ``steps`` steps in all, resuming from the run folder's newest whole checkpoint.

        Raises:
            Interrupted: If asked to stop (Ctrl-C or SIGTERM); the finished steps are saved, and the same call goes on.
            FloatingPointError: If a loss or gradient is not finite.
            Alarmed: At an alarm, where the configuration says so; the finished steps are saved.
            Exhausted: If the device's memory does not suffice.
        """
        main = self.accelerator.is_main_process
        found = checkpoint.load_newest(self.folder / "checkpoints")
        start = 0
        if found is not None:
            start, state = found
            try:
                self.load_state_dict(state)
            except (RuntimeError, KeyError, ValueError) as error:
                raise ValueError(f"{self.folder / 'checkpoints'}: does not fit this configuration: {error}") from error
        journal = Journal(self.folder / "log.jsonl", start=start, steps=steps, show=main) if main else None
        try:
            with stop_requests() as stop:
                self.clock.take()
                for step in range(start, steps):
                    try:
                        if step == start:
                            utilisation = measure(self.pipeline, self.accelerator, self.config.peak_tflops)
                            self.clock.take()
                        line = self.step(step)
                    except Exception as error:
                        if self.is_whole and step > start and step % self.config.checkpoint_every:
                            self._keep_before(step)
                        if isinstance(error, torch.OutOfMemoryError):
                            raise exhausted(error, step, self.clock.phases) from error
                        raise
                    alarmed = self.config.stop_on_alarm and bool(line.get("alarm"))
                    stopping = self.collector.together.anywhere(stop.is_set()) or alarmed  # all must leave together
                    if self.best is not None and self.best.look(line):
                        roles = sharding.whole(self.pipeline.roles.state_dict())
                        if main:
                            checkpoint.save(self.folder / "best", step + 1, {"roles": roles}, keep=1)
                    line["time_s"] = self.clock.take()
                    line |= utilisation.of(line["evaluations"], line["time_s"], num_devices=self.accelerator.num_processes)
                    # The log first: a line without its checkpoint is dropped on resuming, a checkpoint without its line would lose it.
                    if journal is not None:
                        journal.write(line)
                    if self.accelerator.trackers:
                        self.accelerator.log(flat(line), step=step)
                    due = (step + 1) % self.config.checkpoint_every == 0 or step + 1 == steps or stopping
                    with self.clock.phase("checkpoint"):  # counted to the next step
                        if due:
                            self._keep(step + 1)
                    if alarmed:
                        raise Alarmed(
                            f"stopped after step {step + 1} of {steps}: {'; '.join(line['alarm'])}. Look at samples and held-out rewards; the state "
                            "is saved, and --train.stop_on_alarm false goes on"
                        )
                    if stopping:
                        raise Interrupted(f"stopped after step {step + 1} of {steps}; the state is saved, the same command goes on")
            self.gate.check_opened(steps)
        finally:
            if journal is not None:
                journal.close()

    def _keep(self, step: int) -> None:
        """Write a checkpoint; all processes gather what they share, the first one writes."""
        main = self.accelerator.is_main_process
        if main or self.cast.gathers:
            state = self.state_dict()
            if main:
                checkpoint.save(self.folder / "checkpoints", step, state, keep=self.config.keep_checkpoints)

    def _keep_before(self, step: int) -> None:
        """Save what was trained before a step that failed while nothing had moved, as a reward may; where weights are shared, all must know of it."""
        everybody = self.collector.together.has_failed
        if everybody or not self.cast.gathers:
            self._keep(step)
        if everybody:
            self.accelerator.wait_for_everyone()  # who leaves first takes the others with him
