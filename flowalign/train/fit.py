"""The one training loop: collect, update, log, checkpoint."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flowalign.core.algorithm import CURRENT, REFERENCE, WINDOW, Algorithm, Experience, HasHeads, NeverReady, Rows, Update, Velocity
from flowalign.core.decays import ema_warmup
from flowalign.core.distillation import DISCRIMINATOR, FAKE, Distillation, Pairs
from flowalign.core.heads import Evidence
from flowalign.core.ratios import Operation
from flowalign.estimators import Estimator
from flowalign.images import NotFiniteError
from flowalign.train import checkpoint, engines, sharding
from flowalign.train.best import Best
from flowalign.train.collect import Collected, Collector, Metric
from flowalign.train.distance import distance_to_base, is_measured
from flowalign.train.flops import measure
from flowalign.train.journal import Clock, Journal
from flowalign.train.loss_scale import scale_for
from flowalign.train.memory import exhausted
from flowalign.train.pairs import PairCollector
from flowalign.train.players import HeadPlayer, Player, build_discriminator, build_fake, build_heads
from flowalign.train.protocols import Pipeline, PromptLike
from flowalign.train.scoring import NamedReward
from flowalign.train.settings import TrainConfig
from flowalign.train.signals import stop_requests
from flowalign.train.zero import Zero, is_zero

AVERAGE = "average"


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; its state is saved."""


class Diverged(FloatingPointError):
    """A player's output, loss or gradient is not finite; it was not updated."""


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
        """Set up the collector, roles, optimizer and the wrapped network."""
        on_device = self.accelerator.device.type == "cuda"
        self.clock = Clock(wait=torch.cuda.synchronize if on_device else None)
        self.collector = self._collector()
        for role in self.algorithm.roles:
            self.pipeline.roles.add(role)
        if self.config.ema_decay is not None:
            self.pipeline.roles.add(AVERAGE)
        config = self.config
        engines.check(self.accelerator, self.algorithm, shard=config.shard, dtype=self.pipeline.dtype)
        self.scale = scale_for(self.pipeline.dtype, self.algorithm)
        self.sharded = config.shard and self.accelerator.num_processes > 1
        for network in self.pipeline.roles.networks() if self.sharded else ():
            sharding.shard(network)
        self.parameters = self.pipeline.roles.trainable_parameters()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
        self._last_finite = "none yet"
        self.is_whole = False  # whether nothing of the step at hand has moved
        self.heads: dict[str, HeadPlayer] = {}
        self.state: dict[str, Tensor] = {}  # a distillation's statistics
        if isinstance(self.algorithm, HasHeads):
            self.heads = build_heads(self.algorithm, self.pipeline, self.accelerator, seed=self.seed)
        elif isinstance(self.algorithm, Distillation):
            self.state = self.algorithm.start()
            if self.algorithm.judges:
                judge = self.algorithm.config.discriminator
                self.heads = {DISCRIMINATOR: build_discriminator(judge, self.pipeline, self.accelerator, seed=self.seed)}
            self.pipeline.roles.add(FAKE, trained=True)
        self.collector.heads = self.heads
        self.zero: Zero | None = None
        if is_zero(self.accelerator):
            self.zero = Zero(self.accelerator, self.pipeline.module, self.parameters, self.optimizer, clip=config.max_grad_norm)
            self.pipeline.module = self.zero.engine
        elif not self.sharded:
            self.pipeline.module = self.accelerator.prepare(self.pipeline.module)
        denoiser = Player(
            module=self.pipeline.module, parameters=self.parameters, optimizer=self.optimizer, learning_rate=config.learning_rate
        )
        self.trained: dict[str, Player] = {CURRENT: denoiser, **self.heads}
        if isinstance(self.algorithm, Distillation):
            self.trained[FAKE] = build_fake(self.algorithm.config.fake, self.pipeline, self.accelerator)
        self.best = None if config.keep_best_by is None else Best(by=config.keep_best_by)
        self.may_move = not isinstance(self.algorithm, HasHeads | Distillation)  # whether critics have let the policy begin
        self.held_back = 0  # steps in which they have not
        # What heads knew of samples that they had not learnt from.
        self.evidence = {name: Evidence() for name in self.heads} if isinstance(self.algorithm, HasHeads) else {}

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

    # -- update -----------------------------------------------------------------------------------------------------------------

    def update(self, experience: Experience | Pairs, velocity: Velocity, update: Update) -> dict[str, float]:
        """Make one optimizer update of each player and return what to log.

        Raises:
            FloatingPointError: If a loss or gradient is not finite, before anything moves.
        """
        rows = self.algorithm.rows(experience, update)
        if len(rows) == 0:
            raise ValueError(f"step {update.step}, update {update.index}: no rows to train on (fewer groups than minibatches?)")
        parts = rows.split(self.config.micro_batch_size)
        turns = self.algorithm.turns(update, ready=self.may_move)
        logged: dict[str, float] = {}
        apart = False  # whether parts are looked at one by one, as their losses need them
        if isinstance(self.algorithm, HasHeads):
            with torch.no_grad():
                parts = [self.algorithm.look(part, velocity) for part in parts]
        elif isinstance(self.algorithm, Distillation):
            apart = CURRENT in turns and not self.algorithm.weighs_batch
            if not apart and (turns or self.algorithm.weighs_batch):
                # A student's pass is kept for its loss where the whole batch is one; else it is made again, so that weights are of the whole batch.
                parts, logged = self._look(parts, velocity, update.step, keep_pass=len(parts) == 1 and CURRENT in turns)
        turn = partial(self._gradient, parts=parts, velocity=velocity, keep=experience.keep, update=update, apart=apart)
        # All players' gradients before any moves: a loss that is not finite leaves everybody where he was.
        found = {name: turn(name) for name in dict.fromkeys(turns)}
        for name, means in found.items():
            logged |= self._move(name, means, update)
        # Of a head's several turns the first is told: it is of samples that it had not learnt from.
        for name, number in Counter(turns).items():
            for _ in range(number - 1):
                self._move(name, turn(name), update)
        return logged

    def _look(self, parts: Sequence[Rows], velocity: Velocity, step: int, *, keep_pass: bool) -> tuple[list[Rows], dict[str, float]]:
        """Let a distillation's networks look at rows and weigh them; the student's pass may be kept for its loss."""
        assert isinstance(self.algorithm, Distillation)
        with torch.set_grad_enabled(keep_pass):
            parts = [self.algorithm.look(part, velocity) for part in parts]
        self._check_outputs(parts, step)
        parts, self.state, logged = self.algorithm.weigh(parts, self.state, self._reduce)
        return parts, logged

    def _reduce(self, x: Tensor, op: Operation = "sum") -> Tensor:
        """Sum over ranks, or take the largest."""
        if self.accelerator.num_processes == 1:
            return x
        mine = x.to(self.accelerator.device)
        found: Tensor = self.accelerator.reduce(mine, "sum") if op == "sum" else self.accelerator.gather(mine[None]).amax(0)
        return found.to(x.device)

    def _check_outputs(self, parts: Sequence[Rows], step: int) -> None:
        """Refuse what networks said of an update's rows where it is not finite, on every rank alike, and name whose it is."""
        assert isinstance(self.algorithm, Distillation)
        told = [self.algorithm.broken(part) for part in parts]
        names = list(told[0])
        flags = self._reduce(torch.tensor([float(any(found[name] for found in told)) for name in names]))
        for name, flag in zip(names, flags.tolist(), strict=True):
            if flag:
                raise self._diverged(name, step, "its output is not finite")

    def _may_move(self) -> bool:
        """Let critics hold the policy back until they know something."""
        if self.may_move:
            return True
        if isinstance(self.algorithm, Distillation):
            ready = self.algorithm.is_ready(self.state, self.held_back)
        else:
            assert isinstance(self.algorithm, HasHeads)
            ready = self.algorithm.is_ready(self.evidence, self.held_back)
        self.held_back += not ready
        return ready

    def _gradient(
        self, name: str, *, parts: Sequence[Rows], velocity: Velocity, keep: Tensor, update: Update, apart: bool
    ) -> dict[str, float]:
        """Leave a player's clipped gradient in its parameters; returns its loss, metrics and norm, and nothing without a row to learn from."""
        player = self.trained[name]
        try:
            sums, count = self._backward(name, parts, velocity, keep, look_at=update.step if apart else None)
        except Diverged:
            raise
        except FloatingPointError as error:
            raise self._diverged(name, update.step, str(error)) from error
        norm = self._clip(player)
        if count == 0:  # every sample was filtered out: nothing to learn, and no momentum to follow
            self._forget(player)
            return {}
        means = self._mean_over_ranks(sums)
        if self.scale is not None:
            if self.scale.overflows(loss=means["loss"], norm=norm):
                self._forget(player)
                return {}
            means["loss_scale"] = self.scale.value
        self._check_finite(name, update.step, means["loss"], norm)
        return {**means, "grad_norm": norm}

    def _clip(self, player: Player) -> float:
        """Clip a player's gradient; returns the norm that it had."""
        if self.zero is not None:
            return self.zero.norm()  # which clips when it steps
        if self.scale is not None:
            self.scale.unscale(player.parameters)
        return sharding.number(self.accelerator.clip_grad_norm_(player.parameters, self.config.max_grad_norm))

    def _forget(self, player: Player) -> None:
        """Drop a player's gradient."""
        player.optimizer.zero_grad(set_to_none=True)
        if self.zero is not None:
            self.zero.drop()

    def _move(self, name: str, means: Mapping[str, float], update: Update) -> dict[str, float]:
        """Make one optimizer update of one player by the gradient that it has; without one nothing moves and nothing is logged."""
        if not means:
            return {}
        player, prefix = self.trained[name], "" if name == CURRENT else f"{name}/"
        number, rate = update.key(self.algorithm.num_updates) + 1, player.learning_rate
        if name == CURRENT and isinstance(self.algorithm, Distillation):
            rate = self.algorithm.learning_rate(update, rate)
        for options in player.optimizer.param_groups:
            options["lr"] = rate * min(1.0, number / max(1, self.config.warmup))
        (player.optimizer if self.zero is None else self.zero).step()
        player.optimizer.zero_grad(set_to_none=True)
        rest = {key: value for key, value in means.items() if key not in ("loss", "grad_norm")}
        return {f"{prefix}loss": means["loss"], **rest, f"{prefix}grad_norm": means["grad_norm"]}

    def _backward(
        self, player: str, parts: Sequence[Rows], velocity: Velocity, keep: Tensor, *, look_at: int | None = None
    ) -> tuple[dict[str, Tensor], float]:
        """Accumulate the gradient of the mean loss over the rows of kept samples; micro-batches only bound the memory.

        With ``look_at``, the number of the step, a distillation's networks look at each part right before its loss.

        Returns:
            Of each metric its sum over this rank's kept rows and their number, and the number of kept rows a rank, on average over the ranks.
        """
        masks = [keep.to(part.sample.device)[part.sample] for part in parts]
        count = self._average(float(sum(mask.sum() for mask in masks)))
        sums: dict[str, Tensor] = {}
        for number, (part, mask) in enumerate(zip(parts, masks, strict=True)):
            last = number == len(parts) - 1
            # As this player until the backward pass is done: checkpointed activations are computed again in it.
            acting = self.pipeline.roles.use(player) if player == FAKE else nullcontext()
            with acting, nullcontext() if last or self.zero is not None else self.accelerator.no_sync(self._module_of(player)):
                if look_at is not None:
                    part = self._look([part], velocity, look_at, keep_pass=True)[0][0]
                loss = self.algorithm.loss(player, part, velocity)
                mean = (loss.value * mask.to(loss.value)).sum() / max(count, 1.0)
                if self.zero is not None:
                    self.zero.backward(mean, last=last)
                else:
                    self.accelerator.backward(mean if self.scale is None else mean * self.scale.value)
            for name, value in {"loss": loss.value.detach(), **loss.metrics}.items():
                # A metric that is NaN says nothing of its row; a loss that is NaN says a lot.
                told = mask if name == "loss" else mask & ~torch.isnan(value)
                total = (value * mask).sum() if name == "loss" else torch.where(told, value, 0).sum()
                sums[name] = sums.get(name, torch.zeros(2, device=value.device)) + torch.stack([total, told.sum().to(total)])
        return sums, count

    def _module_of(self, player: str) -> nn.Module:
        """Look the network up that a player trains; a caller may have put another one into the pipeline."""
        return self.pipeline.modules.get(player, self.pipeline.module) if player in (CURRENT, FAKE) else self.trained[player].module

    def _average(self, value: float) -> float:
        return float(self._reduce(torch.tensor(value))) / self.accelerator.num_processes

    def _mean_over_ranks(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the means of what any row told of."""
        names = sorted(sums)
        found = self._reduce(torch.stack([sums[name] for name in names]))
        return {name: total / number for name, (total, number) in zip(names, found.tolist(), strict=True) if number}

    def _check_finite(self, player: str, step: int, loss: float, norm: float) -> None:
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise self._diverged(player, step, f"the {what} is {value}")
        self._last_finite = f"step {step}, loss {loss:.4g}, gradient norm {norm:.4g}"

    def _check_weights(self, step: int) -> None:
        """Refuse to log and save weights that are not finite, as a rate far too large makes them of a finite gradient."""
        for name, player in self.trained.items():
            norm = sharding.number(torch.nn.utils.get_total_norm(player.parameters))
            if not math.isfinite(norm):
                raise FloatingPointError(
                    f"step {step}, player {name!r}: the norm of its weights is {norm} (last finite: {self._last_finite}); this step is not saved. "
                    f"Lower {_where(name)}.learning_rate, and {self._go_on()}"
                )

    def _diverged(self, player: str, step: int, what: str) -> Diverged:
        for other in self.trained.values():
            self._forget(other)
        if player not in self.trained:
            return Diverged(
                f"step {step}, the frozen {player}: {what} (last finite: {self._last_finite}); nobody was updated. Its weights are broken, or pipeline.dtype "
                "is too narrow for its activations: take bfloat16 or float32, and check it with flowalign doctor"
            )
        return Diverged(
            f"step {step}, player {player!r}: {what} (last finite: {self._last_finite}); it was not updated. "
            f"Lower {_where(player)}.learning_rate or raise the penalties, and {self._go_on()}"
        )

    def _go_on(self) -> str:
        return f"go on from the last checkpoint in another folder: flowalign train CONFIG --from {self.folder} --output OTHER"

    # -- run --------------------------------------------------------------------------------------------------------------------

    def step(self, step: int) -> dict[str, Any]:
        """Do one step: rollout, scoring and all its updates. Returns the step's log line."""
        self.is_whole, memory = True, self.collector.state
        try:
            found = self.collect(step)
        except NotFiniteError as error:
            self.is_whole = False
            raise self._diverged(CURRENT, step, "its images hold values that are not finite") from error
        try:
            self.may_move = self._may_move()
        except NeverReady:
            self.collector.state = memory  # the step will be done again
            raise
        self.is_whole = False
        logged: list[dict[str, float]] = []
        with self.clock.phase("train"):
            for index in range(self.algorithm.num_updates):
                logged.append(self.update(found.experience, found.velocity, Update(seed=self.seed, step=step, index=index)))
            for role, decay in self.algorithm.roles.items():
                self.pipeline.roles.blend(role, decay(step))
            if self.config.ema_decay is not None:
                self.pipeline.roles.blend(AVERAGE, ema_warmup(self.config.ema_decay)(step))
        self._check_weights(step)
        made = [line for line in logged if line]  # an update whose samples were all filtered out logs nothing
        names = dict.fromkeys(name for line in made for name in line)
        told = {name: [line[name] for line in made if name in line] for name in names}
        metrics = {name: sum(values) / len(values) for name, values in told.items()}
        for name in self.evidence:
            if f"{name}/error" in metrics:
                self.evidence[name] = self.evidence[name].after(metrics, name, window=WINDOW)
            metrics |= {f"{name}/explained": self.evidence[name].explained(), "held_back": self.held_back}
        if isinstance(self.algorithm, Distillation):
            metrics["held_back"] = self.held_back
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
        return {"distance": self._average(float(distance_to_base(found.velocity, found.experience, seed=self.seed, step=step)))}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on; randomness is keyed and needs no state. Where weights are shared, all processes must ask."""
        return {
            "roles": sharding.whole(self.pipeline.roles.state_dict()),
            "optimizer": sharding.whole(checkpoint.optimizer_state(self.optimizer)) if self.zero is None else self.zero.state_dict(),
            "estimator": self.collector.state,
            "heads": {name: head.state_dict() for name, head in self.heads.items()},
            "best": None if self.best is None else self.best.state_dict(),
            "scale": None if self.scale is None else self.scale.state_dict(),
            "state": self.state,
            "fake": checkpoint.optimizer_state(self.trained[FAKE].optimizer) if FAKE in self.trained else None,
            "may_move": self.may_move,
            "held_back": self.held_back,
            "evidence": {name: {key: list(values) for key, values in vars(seen).items()} for name, seen in self.evidence.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.pipeline.roles.load_state_dict(sharding.share(state["roles"], self.pipeline.roles.state_dict()))
        if self.zero is None:
            checkpoint.restore_optimizer(self.optimizer, sharding.share_moments(state["optimizer"], self.optimizer))
        else:
            self.zero.load_state_dict(state["optimizer"])
        self.collector.state = state["estimator"]
        for name, head in self.heads.items():
            head.load_state_dict(state["heads"][name])
        if self.best is not None and state.get("best") is not None:
            self.best.load_state_dict(state["best"])
        if self.scale is not None and state.get("scale") is not None:
            self.scale.load_state_dict(state["scale"])
        if FAKE in self.trained:
            self.state = dict(state["state"])
            checkpoint.restore_optimizer(self.trained[FAKE].optimizer, state["fake"])
        if isinstance(self.algorithm, HasHeads | Distillation):
            self.may_move, self.held_back = state["may_move"], state["held_back"]
            self.evidence = {
                name: Evidence(**{key: tuple(values) for key, values in seen.items()}) for name, seen in state["evidence"].items()
            }

    @property
    def gathers(self) -> bool:
        """Whether a state is put together from what processes share: all must ask for it."""
        return self.sharded or self.zero is not None

    def _anywhere(self, flag: bool) -> bool:
        """Tell whether the flag is set on any rank: all must leave together."""
        if self.accelerator.num_processes == 1:
            return flag
        count = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum")
        return bool(count > 0)

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
                    stopping = self._anywhere(stop.is_set()) or alarmed
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
                        self.accelerator.log(_flat(line), step=step)
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
            self._check_moved(steps)
        finally:
            if journal is not None:
                journal.close()

    def _keep(self, step: int) -> None:
        """Write a checkpoint; all processes gather what they share, the first one writes."""
        main = self.accelerator.is_main_process
        if main or self.gathers:
            state = self.state_dict()
            if main:
                checkpoint.save(self.folder / "checkpoints", step, state, keep=self.config.keep_checkpoints)

    def _keep_before(self, step: int) -> None:
        """Save what was trained before a step that failed while nothing had moved, as a reward may; where weights are shared, all must know of it."""
        everybody = self.collector.together.has_failed
        if everybody or not self.gathers:
            self._keep(step)
        if everybody:
            self.accelerator.wait_for_everyone()  # who leaves first takes the others with him

    def _check_moved(self, steps: int) -> None:
        """Refuse to end a run in which critics never let anything move: its weights are those that it began with."""
        if self.may_move:
            return
        if not isinstance(self.algorithm, Distillation):
            what = f"the policy never moved in {steps} steps: {', '.join(self.heads)} had not shown that it explains rewards (see explained in log.jsonl)"
        elif steps > self.algorithm.config.warmup_steps:
            what = (
                f"the student never moved after its warm-up in {steps} steps: its critics learnt alone (algorithm.least_steps, and with f_distill until "
                "ratio/calibrated is 1)"
            )
        else:
            return
        raise NeverReady(f"{what}; the state is saved, more --steps go on")


def _where(player: str) -> str:
    """Say where a player's rate stands in the configuration."""
    return "train" if player == CURRENT else f"algorithm.{player}"


def _flat(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat[f"{prefix}{key}"] = value
    return flat
