"""How the outputs of a step become the pipeline's prediction: guidance in its own order of operations, or solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, Protocol

import torch
from torch import Tensor

from flowalign.core.guidance import guide
from flowalign.pipelines.record import RecordedStep

# Largest relative residual that counts as rounding. A normalised guidance leaves about 0.1.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class After(Protocol):
    """What a pipeline does to a guided prediction; it may look at the conditional one."""

    def __call__(self, guided: Tensor, conditional: Tensor) -> Tensor:
        """Return the prediction, ``[batch, *event]``."""
        ...


@dataclass(frozen=True)
class SameNorm:
    """Give every token the norm of its conditional prediction (Qwen-Image, Lumina 2): the last axis holds a token's features."""

    def __call__(self, guided: Tensor, conditional: Tensor) -> Tensor:
        """Scale by the ratio of norms over the last axis."""
        return guided * (torch.norm(conditional, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True))


@dataclass(frozen=True)
class LimitedNorm:
    """Let no sample's norm exceed ``limit`` times that of its conditional prediction (Z-Image)."""

    limit: float

    def __call__(self, guided: Tensor, conditional: Tensor) -> Tensor:
        """Scale the samples that exceed it."""
        # Sample by sample, as the pipeline does: a norm over a batch sums in another order.
        rows = []
        for row, reference in zip(guided, conditional, strict=True):
            norm, most = torch.linalg.vector_norm(row), torch.linalg.vector_norm(reference) * self.limit
            rows.append(torch.where(norm > most, row * (most / norm), row))
        return torch.stack(rows)


@dataclass(frozen=True)
class Rescale:
    """Move each sample's standard deviation towards that of its conditional prediction by a share.

    References:
        Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", 2023, https://arxiv.org/abs/2305.08891, section 3.4.
    """

    share: float

    def __call__(self, guided: Tensor, conditional: Tensor) -> Tensor:
        """Mix the rescaled and the guided prediction."""
        axes = list(range(1, guided.ndim))
        rescaled = guided * (conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
        return self.share * rescaled + (1 - self.share) * guided


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Guidance in diffusers' own order of operations, so that equality is exact.

    Attributes:
        unconditional: Its place among the outputs of a step.
        conditional: Its place among them.
        scale: Guidance scale.
        anchor: What the scaled difference is added to; Z-Image adds it to the conditional prediction.
        sign: -1 where the pipeline turns the sum round.
        after: What is done before the sign.
    """

    unconditional: int
    conditional: int
    scale: float
    anchor: Literal["unconditional", "conditional"] = "unconditional"
    sign: Literal[1, -1] = 1
    after: After | None = None

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """Combine the outputs of a step."""
        u, c = outputs[self.unconditional], outputs[self.conditional]
        guided = guide(u, c, self.scale) if self.anchor == "unconditional" else c + self.scale * (c - u)
        guided = guided if self.after is None else self.after(guided, c)
        return guided if self.sign == 1 else -guided


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


def learn_combination(
    outputs: Sequence[Sequence[Tensor]], steps: Sequence[RecordedStep], scales: Sequence[float], afters: Sequence[After]
) -> Guidance | Linear:
    """Find what reproduces every recorded prediction.

    Args:
        outputs: For each step the outputs of its calls, copies apart.
        steps: The steps.
        scales: Guidance scales that the pipeline was called with.
        afters: What its family does to a guided prediction as it is set; tried before plain guidance.

    Raises:
        ValueError: If nothing does; the reason is named.
    """
    for candidate in _candidates(len(outputs[0]), scales, afters):
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


def _candidates(num: int, scales: Sequence[float], afters: Sequence[After]) -> list[Guidance | Linear]:
    if num == 1:
        return [Linear(weights=(1.0,)), Linear(weights=(-1.0,))]
    if num != 2:
        return []
    choices: product[tuple[After | None, Literal[1, -1], Literal["unconditional", "conditional"], int, float]]
    # Plain guidance last: a limit of norms that acts on no recorded sample leaves the same bits, and acts on others.
    choices = product((*afters, None), (1, -1), ("unconditional", "conditional"), (0, 1), scales)
    return [
        Guidance(unconditional=u, conditional=1 - u, scale=scale, anchor=anchor, sign=sign, after=after)
        for after, sign, anchor, u, scale in choices
    ]


def _solve(outputs: Sequence[Sequence[Tensor]], targets: Sequence[Tensor]) -> tuple[float, ...]:
    columns = [torch.cat([parts[i].double().cpu().flatten() for parts in outputs]) for i in range(len(outputs[0]))]
    target = torch.cat([tensor.double().cpu().flatten() for tensor in targets])
    return tuple(torch.linalg.lstsq(torch.stack(columns, 1), target[:, None]).solution.flatten().tolist())


def _residual(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))
