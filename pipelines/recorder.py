"""The driver of a rollout: let a plan make the steps inside a pipeline's own call, refuse surprises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign.core.rollout import Take
from flowalign.pipelines.record import Left
from flowalign.pipelines.replay import Replay, differences


class Recorder:
    """Drives one call of a pipeline; the state is float32 inside, the pipeline sees a cast copy.

    What must hold (nothing edits the latents, the denoiser is told the same in every step, and just what a replay will tell it) is compared on
    the device and read once, in ``check``: no step waits for the device.

    Attributes:
        start: First step of the schedule that is taken.
        stop: Step before which the call is left; the number of steps for going to the end.
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
        dtype: torch.dtype,
        replay: Replay,
        expected: Sequence[dict[str, Any]],
    ) -> None:
        self.start, self.stop = start, stop
        self.levels: list[Tensor] = []
        self.timesteps: list[Tensor] = []
        self._take, self._x, self._num_steps, self._replay, self._expected = take, x, num_steps, replay, expected
        self._sigmas = torch.empty(0)
        self._calls = 0
        self._flags: list[tuple[str, Tensor | bool]] = []
        self._edits: list[tuple[str, Tensor | bool]] = []
        self._show(x, dtype)

    def begin(self, sigmas: Tensor) -> None:
        """Check the plan against the schedule."""
        # On the CPU, so that nothing waits for a device.
        self._sigmas = sigmas.float().cpu()
        got = len(sigmas) - 1 + self.start
        if got != self._num_steps:
            raise ValueError(f"plan: has {self._num_steps} steps, but the pipeline's schedule has {got}")

    def call(self, arguments: dict[str, Any]) -> None:
        """Compare one denoiser call with what the replay would tell it."""
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
        for name, value in told.items():
            self._flags += [(f"{where}: {place} differs", flag) for place, flag in differences(name, self._expected[number][name], value)]
        if not self.levels:
            # From here on the very same objects are expected: comparing those costs nothing.
            self._expected = [told if i == number else other for i, other in enumerate(self._expected)]
        given = arguments[rule.latents]
        shown = self._shown if rule.copies == 1 else torch.cat([self._shown] * rule.copies)
        self._flags += [
            (f"the pipeline changes its latents before it shows them to the denoiser in step {step}", flag)
            for _, flag in differences("latents", shown, given)
        ]
        if number == 0:
            self.timesteps.append(arguments[rule.timestep].flatten()[0])

    def answer(self, output: Any) -> None:
        """Let the pipeline combine it."""

    def step(self, index: int, model_output: Tensor, sample_seen: Tensor) -> Tensor:
        """Let the plan make the step; leave the call where it is to stop."""
        if self._calls != len(self._replay.calls):
            raise ValueError(
                f"the pipeline calls its denoiser {self._calls} times in step {index}, {len(self._replay.calls)} in its first ones"
            )
        self._calls = 0
        self._compare(index, sample_seen)
        self.levels.append(self._sigmas[index - self.start])
        self._x = self._take(index, self._x, model_output.float())
        if index + 1 == self.stop < self._num_steps:
            raise Left
        return self._show(self._x, model_output.dtype)

    def check(self, latents: Tensor | None) -> None:
        """Read all comparisons.

        Args:
            latents: What the pipeline returned; None where the call was left.

        Raises:
            ValueError: With the first thing that did not hold.
        """
        if latents is not None:
            self._compare(self._num_steps, latents)
        # Edits first: whatever else is seen then follows from them.
        flags = self._edits + self._flags
        if not flags:
            return
        reasons = [reason for reason, _ in flags]
        found = torch.stack([torch.as_tensor(flag, device=self._x.device) for _, flag in flags]).tolist()
        if any(found):
            raise ValueError(reasons[found.index(True)])

    def _show(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        self._shown = x.to(dtype)
        self._version = self._shown._version
        return self._shown

    def _compare(self, index: int, seen: Tensor) -> None:
        # An edit in place leaves the object but not its version.
        reason = (
            f"the pipeline edited its latents before step {index} (a callback, inpainting or a custom loop); its transitions would not be "
            "those of the plan"
        )
        if self._shown._version != self._version:
            raise ValueError(reason)
        self._edits += [(reason, flag) for _, flag in differences("latents", self._shown, seen)]
