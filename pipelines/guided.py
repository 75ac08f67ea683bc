"""Guidance where the conditional velocity is known already: only what it needs besides is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowalign.core import guidance
from flowalign.pipelines.combine import Guidance, Linear
from flowalign.pipelines.conditioning import Conditioning
from flowalign.pipelines.roles import REFERENCE

if TYPE_CHECKING:
    from flowalign.pipelines.base import FlowPipeline


def guide(flow: FlowPipeline, x: Tensor, sigma: Tensor, cond: Conditioning, conditional: Tensor) -> Tensor:
    """Return the reference's guided velocity.

    Args:
        flow: The pipeline, guided.
        x: ``[batch, *event]`` float32.
        sigma: Noise level, ``[batch]`` or 0-dim.
        cond: Conditioning of ``batch`` samples by this, guided pipeline.
        conditional: ``[batch, *event]``, what the same pipeline without guidance says of the same states.

    Returns:
        ``[batch, *event]`` float32, without gradient; ``velocity`` up to rounding, because velocities are affine in predictions and the weights of
        guidance add up to 1.
    """
    rule = flow.learnt().replay.combine
    if not isinstance(rule, Guidance) or rule.after is not None:
        return flow.velocity(x, sigma, cond, REFERENCE)
    unconditional = alone(flow, rule.unconditional, rule.sign, x, sigma, cond)
    scale = rule.scale if rule.anchor == "unconditional" else 1 + rule.scale
    return guidance.guide(unconditional, conditional, scale)


@torch.no_grad()
def alone(flow: FlowPipeline, number: int, sign: int, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
    """Return the reference's velocity by one of the outputs that a step combines, without computing the others."""
    replay = flow.learnt().replay
    places = [(call, copy) for call, told in enumerate(replay.calls) for copy in range(told.copies)]
    call, copy = places[number]
    told = replay.calls[call]
    single = replace(replay, calls=(replace(told, copies=1),), combine=Linear(weights=(float(sign),)))
    with flow.roles.use(REFERENCE) as network:
        return flow.replayed(network, x, sigma, cond.alone(call, copy, told.copies), single)
