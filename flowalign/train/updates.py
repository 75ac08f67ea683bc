"""One optimizer update of each player: from rows to losses to gradients to weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flowalign.core.algorithm import CURRENT, Algorithm, Experience, HasHeads, Rows, Update, Velocity
from flowalign.core.distillation import FAKE, Distillation, Pairs
from flowalign.core.ratios import Operation
from flowalign.train import sharding
from flowalign.train.cast import Cast
from flowalign.train.players import Player
from flowalign.train.protocols import Pipeline
from flowalign.train.settings import TrainConfig


class Diverged(FloatingPointError):
    """A player's output, loss or gradient is not finite; it was not updated."""


@dataclass(kw_only=True)
class Updater:
    """Turns what a step has sampled into optimizer updates.

    Attributes:
        pipeline: Has the denoiser and its roles.
        algorithm: Rows, turns and losses.
        config: Rates, and rows of a micro-batch.
        accelerator: Devices and ranks.
        cast: Players, and a distillation's statistics.
        folder: Of the run, for advice.
        last_finite: What was last known to be finite, for messages.
    """

    pipeline: Pipeline
    algorithm: Algorithm
    config: TrainConfig
    accelerator: Accelerator
    cast: Cast
    folder: Path
    last_finite: str = field(default="none yet", init=False)

    def update(self, experience: Experience | Pairs, velocity: Velocity, update: Update, *, ready: bool) -> dict[str, float]:
        """Make one optimizer update of each player and return what to log.

        Args:
            experience: What was sampled.
            velocity: The networks on its samples.
            update: Which update of which step.
            ready: Whether critics let the policy move.

        Raises:
            FloatingPointError: If a loss or gradient is not finite, before anything moves.
        """
        rows = self.algorithm.rows(experience, update)
        if len(rows) == 0:
            raise ValueError(f"step {update.step}, update {update.index}: no rows to train on (fewer groups than minibatches?)")
        parts = rows.split(self.config.micro_batch_size)
        turns = self.algorithm.turns(update, ready=ready)
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
        parts, self.cast.state, logged = self.algorithm.weigh(parts, self.cast.state, self._reduce)
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
                raise self.diverged(name, step, "its output is not finite")

    def _gradient(
        self, name: str, *, parts: Sequence[Rows], velocity: Velocity, keep: Tensor, update: Update, apart: bool
    ) -> dict[str, float]:
        """Leave a player's clipped gradient in its parameters; returns its loss, metrics and norm, and nothing without a row to learn from."""
        player = self.cast.players[name]
        try:
            sums, count = self._backward(name, parts, velocity, keep, look_at=update.step if apart else None)
        except Diverged:
            raise
        except FloatingPointError as error:
            raise self.diverged(name, update.step, str(error)) from error
        norm = self._clip(player)
        if count == 0:  # every sample was filtered out: nothing to learn, and no momentum to follow
            self._forget(player)
            return {}
        means = self._mean_over_ranks(sums)
        if self.cast.scale is not None:
            if self.cast.scale.overflows(loss=means["loss"], norm=norm):
                self._forget(player)
                return {}
            means["loss_scale"] = self.cast.scale.value
        self._check_finite(name, update.step, means["loss"], norm)
        return {**means, "grad_norm": norm}

    def _clip(self, player: Player) -> float:
        """Clip a player's gradient; returns the norm that it had."""
        if self.cast.zero is not None:
            return self.cast.zero.norm()  # which clips when it steps
        if self.cast.scale is not None:
            self.cast.scale.unscale(player.parameters)
        return sharding.number(self.accelerator.clip_grad_norm_(player.parameters, self.config.max_grad_norm))

    def _forget(self, player: Player) -> None:
        """Drop a player's gradient."""
        player.optimizer.zero_grad(set_to_none=True)
        if self.cast.zero is not None:
            self.cast.zero.drop()

    def _move(self, name: str, means: Mapping[str, float], update: Update) -> dict[str, float]:
        """Make one optimizer update of one player by the gradient that it has; without one nothing moves and nothing is logged."""
        if not means:
            return {}
        player, prefix = self.cast.players[name], "" if name == CURRENT else f"{name}/"
        number, rate = update.key(self.algorithm.num_updates) + 1, player.learning_rate
        if name == CURRENT and isinstance(self.algorithm, Distillation):
            rate = self.algorithm.learning_rate(update, rate)
        for options in player.optimizer.param_groups:
            options["lr"] = rate * min(1.0, number / max(1, self.config.warmup))
        (player.optimizer if self.cast.zero is None else self.cast.zero).step()
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
        count = self.average(float(sum(mask.sum() for mask in masks)))
        sums: dict[str, Tensor] = {}
        for number, (part, mask) in enumerate(zip(parts, masks, strict=True)):
            last = number == len(parts) - 1
            # As this player until the backward pass is done: checkpointed activations are computed again in it.
            acting = self.pipeline.roles.use(player) if player == FAKE else nullcontext()
            with acting, nullcontext() if last or self.cast.zero is not None else self.accelerator.no_sync(self._module_of(player)):
                if look_at is not None:
                    part = self._look([part], velocity, look_at, keep_pass=True)[0][0]
                loss = self.algorithm.loss(player, part, velocity)
                mean = (loss.value * mask.to(loss.value)).sum() / max(count, 1.0)
                if self.cast.zero is not None:
                    self.cast.zero.backward(mean, last=last)
                else:
                    self.accelerator.backward(mean if self.cast.scale is None else mean * self.cast.scale.value)
            for name, value in {"loss": loss.value.detach(), **loss.metrics}.items():
                # A metric that is NaN says nothing of its row; a loss that is NaN says a lot.
                told = mask if name == "loss" else mask & ~torch.isnan(value)
                total = (value * mask).sum() if name == "loss" else torch.where(told, value, 0).sum()
                sums[name] = sums.get(name, torch.zeros(2, device=value.device)) + torch.stack([total, told.sum().to(total)])
        return sums, count

    def _module_of(self, player: str) -> nn.Module:
        """Look the network up that a player trains; a caller may have put another one into the pipeline."""
        return self.pipeline.modules.get(player, self.pipeline.module) if player in (CURRENT, FAKE) else self.cast.players[player].module

    def average(self, value: float) -> float:
        """Return the mean over ranks."""
        return float(self._reduce(torch.tensor(value))) / self.accelerator.num_processes

    def _mean_over_ranks(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the means of what any row told of."""
        names = sorted(sums)
        found = self._reduce(torch.stack([sums[name] for name in names]))
        return {name: total / number for name, (total, number) in zip(names, found.tolist(), strict=True) if number}

    def _check_finite(self, player: str, step: int, loss: float, norm: float) -> None:
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise self.diverged(player, step, f"the {what} is {value}")
        self.last_finite = f"step {step}, loss {loss:.4g}, gradient norm {norm:.4g}"

    def check_weights(self, step: int) -> None:
        """Refuse to log and save weights that are not finite, as a rate far too large makes them of a finite gradient.

        Raises:
            FloatingPointError: If any is not.
        """
        for name, player in self.cast.players.items():
            norm = sharding.number(torch.nn.utils.get_total_norm(player.parameters))
            if not math.isfinite(norm):
                raise FloatingPointError(
                    f"step {step}, player {name!r}: the norm of its weights is {norm} (last finite: {self.last_finite}); this step is not saved. "
                    f"Lower {_where(name)}.learning_rate, and {self._go_on()}"
                )

    def diverged(self, player: str, step: int, what: str) -> Diverged:
        """Drop all gradients; returns the error that says what is not finite, since when and what to do."""
        for other in self.cast.players.values():
            self._forget(other)
        if player not in self.cast.players:
            return Diverged(
                f"step {step}, the frozen {player}: {what} (last finite: {self.last_finite}); nobody was updated. Its weights are broken, or pipeline.dtype "
                "is too narrow for its activations: take bfloat16 or float32, and check it with flowalign doctor"
            )
        return Diverged(
            f"step {step}, player {player!r}: {what} (last finite: {self.last_finite}); it was not updated. "
            f"Lower {_where(player)}.learning_rate or raise the penalties, and {self._go_on()}"
        )

    def _go_on(self) -> str:
        return f"go on from the last checkpoint in another folder: flowalign train CONFIG --from {self.folder} --output OTHER"


def _where(player: str) -> str:
    """Say where a player's rate stands in the configuration."""
    return "train" if player == CURRENT else f"algorithm.{player}"
