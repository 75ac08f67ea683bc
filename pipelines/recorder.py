"""The driver of a rollout: let a plan make the steps inside a pipeline's own call, refuse surprises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign.core.rollout import Take
from flowalign.pipelines.combine import TOLERANCE
from flowalign.pipelines.frames import enter
from flowalign.pipelines.record import Left
from flowalign.pipelines.replay import Replay, differences
from flowalign.pipelines.schedulers import Schedule


class Recorder:
    """Drives one call of a pipeline; the state is float32 inside, the pipeline sees a cast copy.

    What must hold (nothing edits the latents, the denoiser is told the same in every step, and just what a replay will tell it, and what it answers
    is combined as a replay will combine it) is compared on the device and read once, in ``check``: no step waits for the device.

    Attributes:
        start: First step of the schedule that is taken.
        stop: Step before which the call is left; the number of steps for going to the end.
        x: The state, ``[batch, *event]``.
        latents: The same in the pipeline's coordinates, float32; at the end what the pipeline decodes.
        levels: Noise level of each step that was taken.
        timesteps: What the denoiser was told at each of them.
    """

    def __init__(
        self,
        take: Take,
        x: Tensor,
        *,
        start: int,
        stop: int,
        num_steps: int,
        sigma: Tensor,
        dtype: torch.dtype,
        replay: Replay,
        expected: Sequence[dict[str, Any]],
        is_told: bool = False,
    ) -> None:
        self.start, self.stop = start, stop
        self.x, self.latents = enter(replay.frame, x, sigma, start=start, is_trained=take.is_trained(start))
        self.levels: list[Tensor] = []
        self.timesteps: list[Tensor] = []
        self._take, self._num_steps, self._replay, self._expected = take, num_steps, replay, expected
        self._schedule = Schedule(sigmas=torch.empty(0))
        self._sigmas = torch.empty(0)
        self._calls = 0
        self._outputs: list[Tensor] = []
        self._instead = [dict(arguments) for arguments in expected] if is_told else None
        self._flags: list[tuple[str, Tensor | bool]] = []
        self._edits: list[tuple[str, Tensor | bool]] = []
        self._show(self.latents, dtype)

    def begin(self, schedule: Schedule) -> None:
        """Check the plan against the schedule."""
        self._schedule, sigmas = schedule, schedule.sigmas
        # On the CPU, so that nothing waits for a device.
        self._sigmas = sigmas.float().cpu()
        got = len(sigmas) - 1 + self.start
        if got != self._num_steps:
            raise ValueError(f"plan: has {self._num_steps} steps, but the pipeline's schedule has {got}")

    def call(self, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """Compare one denoiser call with what the replay would tell it; where texts are stood in for, tell it that instead."""
        step, number = self.start + len(self.levels), self._calls
        self._calls += 1
        if number >= len(self._replay.calls):
            raise ValueError(
                f"the pipeline calls its denoiser more than {len(self._replay.calls)} times in step {step}, but not in its first steps; such "
                "guidance cannot be replayed"
            )
        rule = self._replay.calls[number]
        told = {name: value for name, value in arguments.items() if name not in (rule.latents, rule.timestep)}
        where = f"the denoiser's arguments in step {step} are not the conditioning that a replay uses"
        if told.keys() != self._expected[number].keys():
            raise ValueError(f"{where}: got {sorted(told)}, expected {sorted(self._expected[number])}")
        for name, value in told.items() if self.levels or self._instead is None else ():
            self._flags += [(f"{where}: {place} differs", flag) for place, flag in differences(name, self._expected[number][name], value)]
        if not self.levels:
            # From here on the very same objects are expected: comparing those costs nothing.
            self._expected = [told if i == number else other for i, other in enumerate(self._expected)]
        given = arguments[rule.latents]
        shown = rule.show(self._shown)
        self._flags += [
            (f"the pipeline changes its latents before it shows them to the denoiser in step {step}", flag)
            for _, flag in differences("latents", shown, given)
        ]
        if number == 0:
            self.timesteps.append(arguments[rule.timestep].flatten()[0])
        return None if self._instead is None else {**arguments, **self._instead[number]}

    def answer(self, output: Any) -> None:
        """Keep it, and let the pipeline combine it."""
        rule = self._replay.calls[self._calls - 1]
        self._outputs += [part.to(self._replay.output_dtype) for part in rule.outputs(output)]

    def step(self, index: int, model_output: Tensor, sample_seen: Tensor) -> Tensor:
        """Let the plan make the step; leave the call where it is to stop."""
        if self._calls != len(self._replay.calls):
            raise ValueError(
                f"the pipeline calls its denoiser {self._calls} times in step {index}, {len(self._replay.calls)} in its first ones"
            )
        self._calls = 0
        self._compare(index, sample_seen)
        self._compare_combination(index, model_output)
        now, then = self._sigmas[index - self.start], self._sigmas[index - self.start + 1]
        velocity = self._replay.frame.velocity(model_output.float(), self.latents, now)
        self.levels.append(now)
        x_next = self._take(index, self.x, velocity)
        if index + 1 == self.stop and not self._take.ends:
            raise Left
        self._move(index, x_next, model_output.float(), then)
        return self._show(self.latents, model_output.dtype)

    def _move(self, index: int, x_next: Tensor, output: Tensor, then: Tensor) -> None:
        """Go on to the next state: by the scheduler's own step where it is deterministic, so that the bits are the untouched pipeline's."""
        advance, frame, kernel = self._schedule.advance, self._replay.frame, self._take.kernel(index)
        if advance is None or not kernel.is_deterministic:
            self.x, self.latents = x_next, frame.shown(x_next, then)
            return
        latents = advance(index - self.start, output, self.latents)
        self.x = frame.state(latents, then)
        # What a replay begins from is shown as the replay will show it.
        is_replayed = index + 1 < self._num_steps and self._take.is_trained(index + 1)
        self.latents = frame.shown(self.x, then) if is_replayed else latents
        apart = (self.x - x_next).abs().amax() > 1e-3 * x_next.abs().amax().clamp(min=1.0)
        self._flags.append((f"the scheduler's own step {index} is not that of {type(kernel).__name__}", apart))

    def check(self, latents: Tensor | None) -> None:
        """Read all comparisons.

        Args:
            latents: What the pipeline returned; None where the call was left. Of another shape it is unpacked, and not compared.

        Raises:
            ValueError: With the first thing that did not hold.
        """
        if latents is not None and latents.shape == self._shown.shape:
            self._compare(self._num_steps, latents)
        # Edits first: whatever else is seen then follows from them.
        flags = self._edits + self._flags
        if not flags:
            return
        reasons = [reason for reason, _ in flags]
        found = torch.stack([torch.as_tensor(flag, device=self.x.device) for _, flag in flags]).tolist()
        if any(found):
            raise ValueError(reasons[found.index(True)])

    def _show(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        self._shown = x.to(dtype)
        self._version = self._shown._version
        return self._shown

    def _compare_combination(self, index: int, prediction: Tensor) -> None:
        outputs, self._outputs = self._outputs, []
        reason = (
            f"in step {index} the pipeline combines its denoiser's outputs otherwise than in its first steps; guidance that changes on the way or "
            "with the text cannot be replayed"
        )
        if any(part.shape != prediction.shape for part in outputs):
            self._flags.append((reason, True))
            return
        expected = prediction.float()
        apart = (self._replay.combine(outputs).float() - expected).norm()
        self._flags.append((reason, apart > TOLERANCE.get(prediction.dtype, 1e-5) * expected.norm().clamp(min=1e-12)))

    def _compare(self, index: int, seen: Tensor) -> None:
        # An edit in place leaves the object but not its version.
        reason = (
            f"the pipeline edited its latents before step {index} (a callback, inpainting or a custom loop); its transitions would not be "
            "those of the plan"
        )
        if self._shown._version != self._version:
            raise ValueError(reason)
        self._edits += [(reason, flag) for _, flag in differences("latents", self._shown, seen)]
