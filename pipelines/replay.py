"""Replay a denoiser: how its timestep depends on sigma and how its outputs become the velocity, read off a recording."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.core.guidance import guide
from flowalign.pipelines.record import Call, RecordedStep

# Largest relative residual that counts as rounding. A normalised guidance leaves about 0.1.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True, kw_only=True)
class CallRule:
    """One denoiser call of a step.

    Attributes:
        latents: Name of the argument that takes the latents.
        timestep: Name of the argument that takes the noise level.
        copies: How often the latents are repeated: 2 under guidance in one batch.
    """

    latents: str
    timestep: str
    copies: int


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Plain guidance in diffusers' own order of operations, so that equality is exact."""

    unconditional: int
    conditional: int
    scale: float

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """Combine the outputs of a step."""
        return guide(outputs[self.unconditional], outputs[self.conditional], self.scale)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Any other linear combination; exact if it is one output or its negative, else up to rounding."""

    weights: tuple[float, ...]

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """Combine the outputs of a step."""
        terms = [out if weight == 1 else weight * out for weight, out in zip(self.weights, outputs, strict=True)]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total


@dataclass(frozen=True, kw_only=True)
class Replay:
    """How to call the denoiser for given latents and noise level.

    Attributes:
        calls: The calls of a step, in order.
        slope: The timestep is ``slope * sigma + offset``.
        offset: See slope.
        dtype: Type of the timestep.
        combine: From the outputs of a step, ``[batch, *event]`` each, to the velocity.
    """

    calls: tuple[CallRule, ...]
    slope: float
    offset: float
    dtype: torch.dtype
    combine: Guidance | Linear

    def timestep(self, sigma: Tensor, known: tuple[Tensor, Tensor]) -> Tensor:
        """Map noise levels to timesteps.

        Args:
            sigma: Float32, ``[batch]``.
            known: Levels and timesteps that a rollout has recorded; these are given back verbatim, others by the rule.
        """
        # The scheduler's own arithmetic, float32 sigmas times a number, so that even the rule hits its timesteps.
        ruled = sigma * self.slope + self.offset if self.offset else sigma * self.slope
        levels, timesteps = known
        if len(levels):
            match = sigma[:, None] == levels
            ruled = torch.where(match.any(1), timesteps[match.int().argmax(1)].to(ruled.dtype), ruled)
        return ruled.to(self.dtype)


def learn_replay(steps: Sequence[RecordedStep], scales: Sequence[float]) -> Replay:
    """Work out a replay from at least two recorded steps.

    Args:
        steps: Recorded at different noise levels, with outputs.
        scales: Guidance scales that the pipeline was called with.

    Returns:
        A replay that reproduces every recorded model output.

    Raises:
        ValueError: If the pipeline cannot be replayed: calls or arguments that change between steps, a timestep that
            is not affine in sigma, or outputs that are not combined linearly. The reason is named.
    """
    counts = [len(step.calls) for step in steps]
    if min(counts) == 0 or min(counts) != max(counts):
        raise ValueError(
            f"the pipeline calls its denoiser {counts} times in its first steps; the number must be the same in every step (switch off "
            "guidance that works in some steps only)"
        )
    calls = tuple(_learn_call(steps, number) for number in range(counts[0]))
    slope, offset = _affine(steps, calls[0].timestep)
    return Replay(
        calls=calls,
        slope=slope,
        offset=offset,
        dtype=steps[0].calls[0].arguments[calls[0].timestep].dtype,
        combine=_learn_combination([_outputs(step, calls) for step in steps], steps, scales),
    )


def tensor_of(output: Any) -> Tensor:
    """Take the tensor out of what a denoiser returned."""
    tensor = output[0] if isinstance(output, tuple | list) else output.sample
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


def _outputs(step: RecordedStep, calls: Sequence[CallRule]) -> list[Tensor]:
    return [part for call, rule in zip(step.calls, calls, strict=True) for part in tensor_of(call.output).chunk(rule.copies)]


def _learn_call(steps: Sequence[RecordedStep], number: int) -> CallRule:
    found = [_latents(step.calls[number], step.sample) for step in steps]
    latents, copies = found[0]
    if any(pair != found[0] for pair in found):
        raise ValueError(f"the pipeline passes its latents under changing names or numbers of copies: {found}")
    return CallRule(latents=latents, timestep=_timestep_name([step.calls[number] for step in steps], latents), copies=copies)


def _latents(call: Call, sample: Tensor) -> tuple[str, int]:
    for name, value in call.arguments.items():
        if isinstance(value, Tensor) and value.dim() == sample.dim() and value.shape[1:] == sample.shape[1:]:
            copies, rest = divmod(len(value), len(sample))
            if copies and rest == 0 and all(torch.equal(part, sample) for part in value.chunk(copies)):
                return name, copies
    raise ValueError(
        "no argument of the denoiser equals the latents that the scheduler sees; the pipeline changes them in between (image conditioning, "
        "input scaling) and needs a family of its own"
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


def _affine(steps: Sequence[RecordedStep], name: str) -> tuple[float, float]:
    sigma = torch.tensor([step.sigma for step in steps], dtype=torch.float64)
    recorded = [step.calls[0].arguments[name].flatten()[0] for step in steps]
    value = torch.stack([timestep.double().cpu() for timestep in recorded])
    design = torch.stack([sigma, torch.ones_like(sigma)], dim=1)
    slope, offset = torch.linalg.lstsq(design, value[:, None]).solution.flatten().tolist()
    # Every pipeline in use has round numbers here (1000 sigma, sigma, 1 - sigma); what is left is rounding.
    tolerance = TOLERANCE.get(recorded[0].dtype, 1e-2)
    slope, offset = (float(round(v)) if abs(v - round(v)) <= tolerance * float(value.abs().max()) else v for v in (slope, offset))
    residual = float((slope * sigma + offset - value).abs().max() / value.abs().max())
    if residual > tolerance:
        raise ValueError(f"the denoiser's {name} is not affine in sigma (relative residual {residual:.2g})")
    return slope, offset


def _learn_combination(outputs: Sequence[Sequence[Tensor]], steps: Sequence[RecordedStep], scales: Sequence[float]) -> Guidance | Linear:
    num = len(outputs[0])
    candidates: list[Guidance | Linear] = [Linear(weights=(1.0,)), Linear(weights=(-1.0,))] if num == 1 else []
    if num == 2:
        candidates += [Guidance(unconditional=u, conditional=1 - u, scale=scale) for u in (0, 1) for scale in scales]
    for candidate in candidates:
        if all(torch.equal(candidate(parts), step.model_output) for parts, step in zip(outputs, steps, strict=True)):
            return candidate
    targets = [step.model_output for step in steps]
    solved = Linear(weights=_solve(outputs, targets))
    tolerance = TOLERANCE[targets[0].dtype]
    residuals = [_residual(solved(parts), target) for parts, target in zip(outputs, targets, strict=True)]
    worst = max(range(len(steps)), key=residuals.__getitem__)
    if not residuals[worst] <= tolerance:
        alone = [Linear(weights=_solve([parts], [target])) for parts, target in zip(outputs, targets, strict=True)]
        fits = [_residual(rule(parts), target) <= tolerance for rule, parts, target in zip(alone, outputs, targets, strict=True)]
        reason = "the combination changes between steps" if all(fits) else "it is not a linear combination of its denoiser's outputs"
        raise ValueError(
            f"at sigma {steps[worst].sigma:.4f} the pipeline's velocity cannot be replayed: {reason} (relative residual "
            f"{residuals[worst]:.2g}); its family must say how outputs are combined, or switch this kind of guidance off"
        )
    return solved


def _solve(outputs: Sequence[Sequence[Tensor]], targets: Sequence[Tensor]) -> tuple[float, ...]:
    columns = [torch.cat([parts[i].double().cpu().flatten() for parts in outputs]) for i in range(len(outputs[0]))]
    target = torch.cat([tensor.double().cpu().flatten() for tensor in targets])
    return tuple(torch.linalg.lstsq(torch.stack(columns, 1), target[:, None]).solution.flatten().tolist())


def _residual(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))
