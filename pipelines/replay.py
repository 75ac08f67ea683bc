"""Replay a denoiser: how its timestep depends on sigma and how its outputs become the velocity, read off a recording."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowalign.pipelines.combine import TOLERANCE, After, Guidance, Linear, learn_combination
from flowalign.pipelines.frames import Flow, Frame
from flowalign.pipelines.record import Call, RecordedStep


@dataclass(frozen=True, kw_only=True)
class CallRule:
    """One denoiser call of a step.

    Attributes:
        latents: Name of the argument that takes the latents.
        timestep: Name of the argument that takes the noise level.
        copies: How often the latents are repeated: 2 under guidance in one batch.
        dtype: What the denoiser is shown the latents in.
        axis: Where the pipeline inserts an axis of one (a single frame); None for nowhere.
        listed: Whether each sample is a tensor of its own, in a list.
    """

    latents: str
    timestep: str
    copies: int
    dtype: torch.dtype
    axis: int | None = None
    listed: bool = False

    def show(self, x: Tensor) -> Tensor | list[Tensor]:
        """Lay latents ``[batch, *event]`` out as the denoiser takes them."""
        shown = x.to(self.dtype)
        shown = shown if self.copies == 1 else torch.cat([shown] * self.copies)
        shown = shown if self.axis is None else shown.unsqueeze(self.axis)
        return list(shown.unbind()) if self.listed else shown

    def outputs(self, output: Any) -> list[Tensor]:
        """Take what the denoiser returned apart: ``copies`` tensors ``[batch, *event]``."""
        made = tensor_of(output)
        return list((made if self.axis is None else made.squeeze(self.axis)).chunk(self.copies))


@dataclass(frozen=True, kw_only=True)
class Replay:
    """How to call the denoiser for given latents and noise level.

    Attributes:
        calls: The calls of a step, in order.
        slope: The timestep is ``slope * clock + offset``, where the clock is sigma, or the training timestep of a variance-preserving model.
        offset: See slope.
        shift: Where the denoiser is told a flow's schedule as it was before it was shifted (CogView4), the clock is ``u`` of
            ``sigma = shift * u / (1 + (shift - 1) * u)``; else 1.
        dtype: Type of the timestep.
        combine: From the outputs of a step, ``[batch, *event]`` each, to the prediction.
        output_dtype: What the pipeline combines outputs in.
        frame: The pipeline's coordinates.
    """

    calls: tuple[CallRule, ...]
    slope: float
    offset: float
    dtype: torch.dtype
    combine: Guidance | Linear
    output_dtype: torch.dtype
    frame: Frame
    shift: float = 1.0

    def timestep(self, sigma: Tensor, known: tuple[Tensor, Tensor]) -> Tensor:
        """Map noise levels to timesteps.

        Args:
            sigma: Float32, ``[batch]``.
            known: Levels and timesteps that a rollout has recorded; these are given back verbatim, others by the rule.
        """
        # The scheduler's own arithmetic, float32 sigmas times a number, so that even the rule hits its timesteps.
        clock = _unshifted(self.frame.clock(sigma), self.shift)
        ruled = clock * self.slope + self.offset if self.offset else clock * self.slope
        levels, timesteps = known
        if len(levels):
            match = sigma[:, None] == levels
            ruled = torch.where(match.any(1), timesteps[match.int().argmax(1)].to(ruled.dtype), ruled)
        return ruled.to(self.dtype)


def learn_replay(
    steps: Sequence[RecordedStep], scales: Sequence[float], *, afters: Sequence[After] = (), frame: Frame | None = None
) -> Replay:
    """Work out a replay from at least two recorded steps.

    Args:
        steps: Recorded at different noise levels, with outputs.
        scales: Guidance scales that the pipeline was called with.
        afters: What its family does to a guided prediction as it is set.
        frame: The pipeline's coordinates; None for a flow's.

    Returns:
        A replay that reproduces every recorded model output.

    Raises:
        ValueError: If the pipeline cannot be replayed: calls or arguments that change between steps, a timestep that
            is not affine in sigma, before or after a shift of the schedule, or outputs that are not combined linearly. The reason is named.
    """
    counts = [len(step.calls) for step in steps]
    if min(counts) == 0 or min(counts) != max(counts):
        raise ValueError(
            f"the pipeline calls its denoiser {counts} times in its first steps; the number must be the same in every step (switch off "
            "guidance that works in some steps only)"
        )
    calls = tuple(_learn_call(steps, number) for number in range(counts[0]))
    frame = Flow() if frame is None else frame
    slope, offset, shift = _rule(steps, calls[0].timestep, frame)
    told = steps[0].calls[0].arguments[calls[0].timestep].dtype
    wide = steps[0].model_output.dtype
    outputs = [_outputs(step, calls, wide) for step in steps]
    if any(part.shape != step.sample.shape for parts, step in zip(outputs, steps, strict=True) for part in parts):
        raise ValueError(
            f"the denoiser returns {tuple(outputs[0][0].shape)} for latents {tuple(steps[0].sample.shape)}; needed one prediction"
        )
    return Replay(
        calls=calls,
        slope=slope,
        offset=offset,
        # Training timesteps are whole numbers, but levels between them are not.
        dtype=told if told.is_floating_point else torch.float32,
        combine=learn_combination(outputs, steps, scales, afters),
        output_dtype=wide,
        frame=frame,
        shift=shift,
    )


def tensor_of(output: Any) -> Tensor:
    """Take the tensor out of what a denoiser returned; a list of samples is stacked."""
    tensor = output[0] if isinstance(output, tuple | list) else output.sample
    if isinstance(tensor, list) and all(isinstance(item, Tensor) for item in tensor):
        return torch.stack(tensor)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"the denoiser returns a {type(tensor).__name__}; needed one tensor")
    return tensor


def differences(where: str, one: Any, two: Any) -> Iterator[tuple[str, Tensor | bool]]:
    """Compare two recorded arguments without waiting for the device.

    Yields:
        A name, and whether the values differ: False, True, or a 0-dim tensor that is still being computed.
    """
    if one is two:
        return
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        yield where, (one != two).any() if one.shape == two.shape else True
    elif type(one) is not type(two):
        yield where, True
    elif isinstance(one, list | tuple):
        if len(one) != len(two):
            yield where, True
        else:
            for number, (first, second) in enumerate(zip(one, two, strict=True)):
                yield from differences(f"{where}[{number}]", first, second)
    elif isinstance(one, dict):
        if one.keys() != two.keys():
            yield where, True
        else:
            for key in one:
                yield from differences(f"{where}[{key!r}]", one[key], two[key])
    else:
        yield where, bool(one != two)


def _outputs(step: RecordedStep, calls: Sequence[CallRule], dtype: torch.dtype) -> list[Tensor]:
    return [part.to(dtype) for call, rule in zip(step.calls, calls, strict=True) for part in rule.outputs(call.output)]


def _learn_call(steps: Sequence[RecordedStep], number: int) -> CallRule:
    found = [latents_of(step.calls[number], step.sample) for step in steps]
    if any(rule != found[0] for rule in found):
        raise ValueError(f"the pipeline passes its latents under changing names or numbers of copies: {found}")
    return replace(found[0], timestep=_timestep_name([step.calls[number] for step in steps], found[0].latents))


def latents_of(call: Call, sample: Tensor) -> CallRule:
    """Find the argument of a denoiser call that holds the latents.

    Raises:
        ValueError: If none does.
    """
    for name, value in call.arguments.items():
        listed = isinstance(value, list) and bool(value) and all(isinstance(item, Tensor) for item in value)
        tensor = torch.stack(value) if listed and len({item.shape for item in value}) == 1 else value
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            continue
        copies, rest = divmod(len(tensor), len(sample))
        for axis in (None, *range(1, sample.dim() + 1)) if copies and rest == 0 else ():
            rule = CallRule(latents=name, timestep="", copies=copies, dtype=tensor.dtype, axis=axis, listed=listed)
            shown = rule.show(sample)
            if torch.equal(torch.stack(shown) if isinstance(shown, list) else shown, tensor):
                return rule
    seen = ", ".join(f"{name} {list(value.shape)}" for name, value in call.arguments.items() if isinstance(value, Tensor))
    raise ValueError(
        f"no argument of the denoiser equals the latents that the scheduler sees, {list(sample.shape)} (it is told {seen}); the pipeline changes "
        "them in between (image conditioning, input scaling) and needs a family of its own"
    )


def _timestep_name(calls: Sequence[Call], latents: str) -> str:
    first = calls[0].arguments
    if any(call.arguments.keys() != first.keys() for call in calls):
        raise ValueError(f"the names of the denoiser's arguments change between steps: {[sorted(call.arguments) for call in calls]}")
    changing = [
        name
        for name, value in first.items()
        if name != latents and any(bool(flag) for call in calls[1:] for _, flag in differences(name, value, call.arguments[name]))
    ]
    levels = [name for name in changing if isinstance(first[name], Tensor) and first[name].dim() <= 1]
    if len(changing) != 1 or len(levels) != 1:
        raise ValueError(f"between steps the denoiser's arguments {changing} change; only the timestep may, as a tensor [batch] or 0-dim")
    return levels[0]


def _rule(steps: Sequence[RecordedStep], name: str, frame: Frame) -> tuple[float, float, float]:
    """From clock to timestep: slope, offset, and by how much the schedule was shifted after the denoiser's timesteps were taken from it."""
    clock = frame.clock(torch.tensor([step.sigma for step in steps], dtype=torch.float64)).double()
    recorded = [step.calls[0].arguments[name].flatten()[0] for step in steps]
    value = torch.stack([timestep.double().cpu() for timestep in recorded])
    tolerance = TOLERANCE.get(recorded[0].dtype, 1e-2)
    slope, offset, residual = _affine(clock, value, tolerance)
    if residual <= tolerance:
        return slope, offset, 1.0
    # Three numbers are solved for: only a fourth step can tell that they are not those of the rule.
    shift = _shift(clock, value) if isinstance(frame, Flow) and len(steps) > 3 else 1.0
    slope, offset, after = _affine(_unshifted(clock, shift), value, tolerance)
    if after <= tolerance:
        return slope, offset, shift
    seen = ", ".join(f"{told:.4g} at {level:.4g}" for told, level in zip(value.tolist(), clock.tolist(), strict=True))
    raise ValueError(
        f"the denoiser's {name} is not affine in sigma (relative residual {residual:.2g}), nor in the schedule before a shift: it is told {seen}; "
        "a family must say how its timesteps depend on the noise level"
    )


def _affine(clock: Tensor, value: Tensor, tolerance: float) -> tuple[float, float, float]:
    """Solve for slope and offset; returns them with the relative residual."""
    slope, offset = _least_squares([clock, torch.ones_like(clock)], value)
    # Every pipeline in use has round numbers here (1000 sigma, sigma, 1 - sigma); what is left is rounding.
    slope, offset = (float(round(v)) if abs(v - round(v)) <= tolerance * float(value.abs().max()) else v for v in (slope, offset))
    return slope, offset, float((slope * clock + offset - value).abs().max() / value.abs().max())


def _shift(clock: Tensor, value: Tensor) -> float:
    """Solve ``value = (p * clock + q) / (r * clock + 1)``, which an affine function of a schedule is after a shift by ``1 / (1 + r)``."""
    _, _, r = _least_squares([clock, torch.ones_like(clock), -value * clock], value)
    return 1 / (1 + r) if r > -1 else 1.0


def _least_squares(columns: list[Tensor], target: Tensor) -> list[float]:
    found: list[float] = torch.linalg.lstsq(torch.stack(columns, 1), target[:, None]).solution.flatten().tolist()
    return found


def _unshifted(clock: Tensor, shift: float) -> Tensor:
    """Take a shift of a schedule back."""
    return clock if shift == 1 else clock / (clock + shift * (1 - clock))


__all__ = ["CallRule", "Guidance", "Linear", "Replay", "differences", "latents_of", "learn_replay", "tensor_of"]
