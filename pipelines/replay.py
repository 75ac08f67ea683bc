"""Replay a denoiser: how its timestep depends on sigma and how its outputs become the velocity, read off a recording."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.core.guidance import guide
from flowalign.pipelines.record import RecordedStep

TOLERANCE = 1e-4  # relative residual; a linear combination in float32 leaves about 1e-6, a normalised guidance 0.1


@dataclass(frozen=True, kw_only=True)
class Replay:
    """How to call the denoiser for given latents and noise level.

    Attributes:
        latents: Name of the argument that takes the latents.
        timestep: Name of the argument that takes the noise level.
        copies: How often the latents are repeated: 2 under guidance in one batch.
        slope, offset: The timestep is ``slope * sigma + offset``.
        weights: The velocity as a linear combination of the outputs' copies.
        guidance: The scale, where the combination is plain guidance; then it is computed in the pipeline's own order.
    """

    latents: str
    timestep: str
    copies: int
    slope: float
    offset: float
    weights: tuple[float, ...]
    guidance: float | None

    def combine(self, output: Tensor) -> Tensor:
        """Make the velocity from the denoiser's output ``[copies * batch, *event]``."""
        parts = output.chunk(self.copies)
        if self.guidance is not None:
            return guide(parts[0], parts[1], self.guidance)
        if self.weights == (1.0,):
            return parts[0]
        return torch.stack([weight * part for weight, part in zip(self.weights, parts, strict=True)]).sum(0)


def learn_replay(steps: Sequence[RecordedStep], guidance_scale: float) -> Replay:
    """Work out a replay from at least two recorded steps.

    Args:
        steps: Recorded at different noise levels, with outputs.
        guidance_scale: What the pipeline was called with.

    Returns:
        A replay that reproduces every recorded model output.

    Raises:
        ValueError: If the pipeline cannot be replayed: several denoiser calls in a step, arguments that change between steps, a timestep
            that is not affine in sigma, or outputs that are not combined linearly. The reason is named.
    """
    for step in steps:
        if len(step.calls) != 1:
            raise ValueError(
                f"the pipeline calls its denoiser {len(step.calls)} times in a step at sigma {step.sigma:.4f}; one call is supported"
            )
    names = [_latent_name(step) for step in steps]
    latents, copies = names[0]
    if any(name != names[0] for name in names):
        raise ValueError(f"the pipeline passes its latents under changing names or copies: {names}")
    timestep = _timestep_name(steps, latents)
    slope, offset = _affine(steps, timestep)
    weights = _weights(steps, copies)
    plain = copies == 2 and abs(weights[1] - guidance_scale) < 1e-3 and abs(sum(weights) - 1) < 1e-3
    if copies == 1 and abs(weights[0] - 1) < 1e-6:
        weights = (1.0,)
    replay = Replay(
        latents=latents,
        timestep=timestep,
        copies=copies,
        slope=slope,
        offset=offset,
        weights=weights,
        guidance=guidance_scale if plain else None,
    )
    for step in steps:
        residual = _residual(replay.combine(_output(step)), step.model_output)
        if residual > TOLERANCE:
            raise ValueError(
                f"at sigma {step.sigma:.4f} the pipeline's velocity is not a linear combination of its denoiser's outputs (relative "
                f"residual {residual:.2g}); its family must say how they are combined, or call it without this kind of guidance"
            )
    return replay


def _output(step: RecordedStep) -> Tensor:
    output = step.calls[0].output
    tensor = output[0] if isinstance(output, tuple) else output.sample
    assert isinstance(tensor, Tensor)
    return tensor


def _residual(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12))


def _latent_name(step: RecordedStep) -> tuple[str, int]:
    for name, value in step.calls[0].arguments.items():
        if isinstance(value, Tensor) and value.dim() == step.sample.dim() and value.shape[1:] == step.sample.shape[1:]:
            copies, rest = divmod(len(value), len(step.sample))
            if rest == 0 and all(torch.equal(part, step.sample) for part in value.chunk(copies)):
                return name, copies
    raise ValueError(
        "no argument of the denoiser equals the latents that the scheduler sees; the pipeline changes them in between (image conditioning, "
        "input scaling) and needs a family of its own"
    )


def _timestep_name(steps: Sequence[RecordedStep], latents: str) -> str:
    changing = []
    first = steps[0].calls[0].arguments
    for name, value in first.items():
        if name != latents and any(not _same(value, step.calls[0].arguments.get(name)) for step in steps[1:]):
            changing.append(name)
    levels = [name for name in changing if isinstance(first[name], Tensor) and first[name].dim() <= 1]
    if len(changing) != 1 or len(levels) != 1:
        raise ValueError(f"between steps the denoiser's arguments {changing} change; only the timestep may, as a tensor [batch] or 0-dim")
    return levels[0]


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(_same(a, b) for a, b in zip(one, two, strict=True))
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    return type(one) is type(two) and (one is two or bool(one == two))


def _affine(steps: Sequence[RecordedStep], name: str) -> tuple[float, float]:
    sigma = torch.tensor([step.sigma for step in steps], dtype=torch.float64)
    value = torch.stack([step.calls[0].arguments[name].flatten()[0].double().cpu() for step in steps])
    design = torch.stack([sigma, torch.ones_like(sigma)], dim=1)
    slope, offset = torch.linalg.lstsq(design, value[:, None]).solution.flatten().tolist()
    residual = float((design @ torch.tensor([slope, offset], dtype=torch.float64) - value).abs().max() / value.abs().max())
    if residual > TOLERANCE:
        raise ValueError(f"the denoiser's {name} is not affine in sigma (relative residual {residual:.2g})")
    # Every pipeline in use has round numbers here (1000 sigma, sigma, 1 - sigma); what is left is rounding.
    slope = round(slope) if abs(slope - round(slope)) < 1e-2 * max(1.0, abs(slope)) * 1e-1 else slope
    offset = round(offset) if abs(offset - round(offset)) < 1e-2 else offset
    return float(slope), float(offset)


def _weights(steps: Sequence[RecordedStep], copies: int) -> tuple[float, ...]:
    columns = [torch.cat([_output(step).chunk(copies)[i].double().cpu().flatten() for step in steps]) for i in range(copies)]
    target = torch.cat([step.model_output.double().cpu().flatten() for step in steps])
    solution = torch.linalg.lstsq(torch.stack(columns, 1), target[:, None]).solution
    return tuple(solution.flatten().tolist())
