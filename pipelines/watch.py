"""Watch a pipeline at its own work: short calls of its ``__call__`` that are left as soon as enough was seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flowalign.pipelines.conditioning import Layout, learn
from flowalign.pipelines.family import Family
from flowalign.pipelines.record import Call, Probe, installed, run_probe
from flowalign.pipelines.replay import Replay, learn_replay
from flowalign.pipelines.schedulers import drivable, frame_of
from flowalign.pipelines.standin import Decoder, Encoder, StandIn, learn_stand_in, silenced, watched

if TYPE_CHECKING:
    from flowalign.pipelines.base import FlowPipeline


_STEPS = 4  # that are recorded: a rule of three numbers is checked by a fourth


class Learnt(NamedTuple):
    """What recordings told of a pipeline.

    Attributes:
        layout: Where the batch is in the arguments of each denoiser call.
        replay: How the denoiser is called again.
        stand_in: Texts that stand in for others in rollouts; None where the family passes embeddings.
    """

    layout: Layout
    replay: Replay
    stand_in: StandIn | None


def probe(flow: FlowPipeline, driver: Probe, prompts: Sequence[str], num_steps: int, *, encoder: Callable[..., Any] | None = None) -> Probe:
    """Call the pipeline under a probe with latents of our own, so that it draws nothing from torch's global generator.

    Args:
        flow: The pipeline.
        driver: Says when it is left.
        prompts: Texts, one a sample.
        num_steps: Of the schedule.
        encoder: What answers in the place of ``encode_prompt``.
    """
    # Samples differ, so that no wrong axis fits.
    x = torch.randn(len(prompts), *flow.event_shape, generator=torch.Generator().manual_seed(0)).to(flow.device, flow.dtype)
    return call(flow, driver, prompts, num_steps, latents=flow.packing.unpacked(x), encoder=encoder)


def call(
    flow: FlowPipeline,
    driver: Probe,
    prompts: Sequence[str],
    num_steps: int,
    *,
    latents: Tensor | None,
    encoder: Callable[..., Any] | None = None,
) -> Probe:
    """Call the pipeline under a probe with given latents, as it takes them; None lets it draw its own."""
    arguments = {**flow.family.arguments, **texts(flow.family, prompts), "num_inference_steps": num_steps}
    arguments |= {"generator": torch.Generator().manual_seed(0)} if latents is None else {"latents": latents}
    with flow.precision(), flow.resting.awake(text=encoder is None or isinstance(encoder, Encoder)):
        return run_probe(flow.pipe, flow.family.denoiser, flow.denoiser, driver, arguments, encoder)


def texts(family: Family, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the arguments that carry prompts; the lists are new, because some pipelines write into them."""
    negative = family.negative_prompt
    return {"prompt": list(prompts)} | ({} if negative is None else {"negative_prompt": [negative] * len(prompts)})


def fixed(family: Family, calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Return the arguments of calls, brought to one length of text where the family says how."""
    told = [call.arguments for call in calls]
    return told if family.fix is None else family.fix(told)


def learn_all(flow: FlowPipeline) -> Learnt:
    """Work out from two short recordings where the batch is, what the timestep is and how outputs are combined.

    Raises:
        ValueError: If the pipeline cannot be replayed; the reason is named.
    """
    family, num_steps = flow.family, max(flow.num_steps, _STEPS)
    encoders = [None, None] if family.embeds else [watched(flow.pipe), watched(flow.pipe)]
    steps = probe(flow, Probe(num_steps=_STEPS), ["a", "b"], num_steps, encoder=encoders[1]).steps
    replay = learn_replay(steps, (family.guidance_scale,), afters=family.afters, frame=frame_of(flow.pipe.scheduler))
    one = probe(flow, Probe(num_steps=1, num_calls=len(replay.calls)), ["a"], num_steps, encoder=encoders[0]).calls
    layout = []
    for rule, first, second in zip(replay.calls, fixed(family, one), fixed(family, steps[0].calls), strict=True):
        names = [name for name in second if name not in (rule.latents, rule.timestep)]
        layout.append({name: learn(name, first[name], second[name]) for name in names})
    stand_in = learn_stand_in(encoders[0], encoders[1]) if encoders[0] and encoders[1] else None
    return Learnt(tuple(layout), replay, stand_in)


def decode(flow: FlowPipeline, x: Tensor) -> Tensor:
    """Let the pipeline's own ``__call__`` decode: it takes its last step with a silent denoiser and is given the latents.

    Args:
        flow: The pipeline.
        x: ``[batch, *event]``.

    Returns:
        Images ``[batch, 3, h, w]`` in [0, 1].
    """
    _, replay, stand_in = flow.learnt()
    assert stand_in is not None
    family, shown = flow.family, x.to(flow.device, flow.dtype)
    given = {"num_inference_steps": flow.num_steps, "latents": flow.packing.unpacked(shown)}
    arguments = {**family.arguments, **texts(family, [""] * len(x)), **given}
    driver = Decoder(flow.num_steps - 1, shown)
    with installed(flow.pipe, family.denoiser, flow.denoiser, driver, stand_in(len(x))), silenced(flow.denoiser, replay):
        images: Tensor = flow.pipe(**arguments, output_type="pt", return_dict=False)[0]
    return images


def own_images(flow: FlowPipeline, pipe: Any, prompt: str, noise: Tensor, num_steps: int) -> Tensor:
    """Let a pipeline's own ``__call__`` make images with nothing of ours installed.

    A variance-preserving pipeline gets a plain ``DDIMScheduler`` of its own training schedule for it, because that is what is sampled by.

    Args:
        flow: Says what the calls of this family get.
        pipe: The pipeline that is called: the same, or a fresh one of the same class.
        prompt: One text.
        noise: First latents, a row for each image.
        num_steps: Of the schedule.
    """
    kind, config = drivable(pipe.scheduler)
    negative = {} if flow.family.negative_prompt is None else {"negative_prompt": [flow.family.negative_prompt]}
    asked = {"prompt": [prompt], "num_images_per_prompt": len(noise), **negative}
    latents = flow.packing.unpacked(noise.to(flow.device, flow.dtype))
    options = {"num_inference_steps": num_steps, "latents": latents, "output_type": "pt", "return_dict": False}
    before = pipe.scheduler
    try:
        if not isinstance(before, kind):
            object.__setattr__(pipe, "scheduler", kind.from_config(config))
        with flow.precision(), flow.resting.awake(text=True, images=True):
            images: Tensor = pipe(**flow.family.arguments, **asked, **options)[0]
    finally:
        object.__setattr__(pipe, "scheduler", before)
    return images
