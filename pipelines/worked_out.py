"""What `auto` worked out of a pipeline: learnt with reasons where it fails, checked against the pipeline itself, described."""

from __future__ import annotations

from dataclasses import replace

import torch

from flowalign.pipelines import parity
from flowalign.pipelines.base import FlowPipeline


def work_out(flow: FlowPipeline) -> None:
    """Record a pipeline and learn from it.

    Raises:
        ValueError: If it cannot be worked out: what was seen of it, and what is missing.
    """
    try:
        flow.learnt()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what is recorded is other people's code: whatever it raises is the reason
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"pipeline: {type(flow.pipe).__name__} cannot be worked out: {reason} (seen: the denoiser {flow.family.denoiser}, a "
            f"{type(flow.denoiser).__name__}; the scheduler {type(flow.pipe.scheduler).__name__}; called with "
            f"{', '.join(f'{name}={value!r}' for name, value in flow.family.arguments.items())})"
        ) from error


def verify(flow: FlowPipeline) -> None:
    """Check the promises that cost little: images of a short and of a long text, replayed velocities, resuming, texts of two lengths in one batch.

    Raises:
        ValueError: If one does not hold; the measurement is named.
    """
    it = parity.subject(flow, num_steps=4)  # a number that every spacing of DDIM has a grid for
    long = replace(it, prompt=parity.LONG_PROMPT)
    for name, asked in (("images", it), ("images", long), ("velocities", it), ("resuming", it), ("lengths", it)):
        finding = parity.attempt(name, lambda name=name, asked=asked: parity.CHECKS[name](asked))
        if not finding.passed:
            raise ValueError(
                f"pipeline: {type(flow.pipe).__name__} was worked out, but does not behave so with the text {asked.prompt!r}: {finding.check}: {finding.found}"
            )


def describe(flow: FlowPipeline) -> str:
    """Say what was found, a line for each thing."""
    layout, replay, _ = flow.learnt()
    rows = {
        "pipeline": type(flow.pipe).__name__,
        "denoiser": f"{flow.family.denoiser} ({type(flow.denoiser).__name__}), {len(replay.calls)} call(s) a step",
        "coordinates": type(replay.frame).__name__,
        "latents": f"{replay.calls[0].latents} {list(flow.event_shape)}"
        + (", a list of samples" if replay.calls[0].listed else "")
        + (f", packed by the pipeline from {list(flow.packing.given)}" if flow.packing.order is not None else ""),
        "copies": ", ".join(str(rule.copies) for rule in replay.calls),
        "timestep": f"{replay.calls[0].timestep} = {replay.slope:g} * clock + {replay.offset:g} ({str(replay.dtype).removeprefix('torch.')})"
        + (f", of the schedule before its shift by {replay.shift:.4g}" if replay.shift != 1 else ""),
        "prediction": str(replay.combine),
        "conditions": ", ".join(f"{name}: {type(spec).__name__}" for name, spec in layout[0].items()),
        "call": ", ".join(f"{name}={value}" for name, value in flow.family.arguments.items()),
        "adapters": f"{flow.roles.num_layers} layers" if flow.roles.lora else "none; all weights are trained",
    }
    return "\n".join(f"{name.ljust(11)}  {text}" for name, text in rows.items())
