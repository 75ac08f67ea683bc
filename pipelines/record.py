"""Record a pipeline: let its own ``__call__`` drive, and watch its scheduler and its denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from flowalign.pipelines.schedulers import Driver, Schedule, driven_scheduler

# Offloading rewrites these during a call; putting old values back would leave hooks behind that nobody removes.
_OFFLOAD_STATE = ("_all_hooks", "_offload_device", "_offload_gpu_id")


class Left(Exception):
    """Leaves a pipeline's ``__call__`` early; never seen outside this package."""


@dataclass(kw_only=True)
class Call:
    """One denoiser call: its named arguments and, where kept, its output."""

    arguments: dict[str, Any]
    output: Any = None


@dataclass(kw_only=True)
class RecordedStep:
    """One scheduler step of a probe."""

    sigma: float
    sample: Tensor
    model_output: Tensor
    calls: list[Call]


@contextmanager
def installed(
    pipe: DiffusionPipeline, name: str, network: nn.Module, driver: Driver, encode_prompt: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Let a driver run the pipeline; on leaving, also by an error, the pipeline is what it was.

    Args:
        pipe: The pipeline.
        name: Attribute of the pipeline that holds its denoiser.
        network: The denoiser to use meanwhile.
        driver: Takes the steps and sees the denoiser's calls.
        encode_prompt: What answers meanwhile where the pipeline encodes texts; None for the pipeline's own method.
    """
    signature = inspect.signature(network.forward)
    scheduler = driven_scheduler(pipe.scheduler, driver)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        others = driver.call(dict(signature.bind(*args, **kwargs).arguments) if args else kwargs)
        return None if others is None else ((), others)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        driver.answer(output)

    state = dict(vars(pipe))
    # First of all hooks: whoever leaves the call leaves it before shared weights are gathered.
    handles = [network.register_forward_pre_hook(before, with_kwargs=True, prepend=True), network.register_forward_hook(after)]
    try:
        # Past the pipeline's __setattr__, which would write the class names of these parts into its configuration.
        object.__setattr__(pipe, "scheduler", scheduler)
        object.__setattr__(pipe, name, network)
        if encode_prompt is not None:
            object.__setattr__(pipe, "encode_prompt", encode_prompt)
        pipe.set_progress_bar_config(disable=True)
        yield
    finally:
        for handle in handles:
            handle.remove()
        kept = {key: vars(pipe)[key] for key in _OFFLOAD_STATE if key in vars(pipe)}
        vars(pipe).clear()
        vars(pipe).update(state | kept)


@dataclass(kw_only=True)
class Probe:
    """A driver that takes plain deterministic steps, keeps everything and leaves early.

    Attributes:
        num_steps: Leave after this many steps.
        num_calls: Leave at this denoiser call of the first step, before it happens; 0 for never.
        start: Always 0.
        sigmas: The schedule, once it is known.
        steps: What was seen; an unfinished step is not in it.
        calls: The calls of the unfinished step.
        advance: The scheduler's own step, where it is not Euler's.
    """

    num_steps: int
    num_calls: int = 0
    start: int = 0
    sigmas: Tensor = field(default_factory=lambda: torch.empty(0))
    steps: list[RecordedStep] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    advance: Callable[[int, Tensor, Tensor], Tensor] | None = None

    def begin(self, schedule: Schedule) -> None:
        """Keep the schedule."""
        self.sigmas, self.advance = schedule.sigmas, schedule.advance
        if self.num_steps == 0:
            raise Left

    def call(self, arguments: dict[str, Any]) -> None:
        """Keep the arguments."""
        self.calls.append(Call(arguments=dict(arguments)))
        if len(self.calls) == self.num_calls:
            raise Left

    def answer(self, output: Any) -> None:
        """Keep the output."""
        self.calls[-1].output = output

    def step(self, index: int, model_output: Tensor, sample: Tensor) -> Tensor:
        """Take a deterministic step, as the untouched scheduler would."""
        step = RecordedStep(sigma=float(self.sigmas[index]), sample=sample.clone(), model_output=model_output.clone(), calls=self.calls)
        self.steps.append(step)
        self.calls = []
        if len(self.steps) == self.num_steps:
            raise Left
        if self.advance is not None:
            return self.advance(index, model_output, sample)
        moved = sample.float() + (self.sigmas[index + 1] - self.sigmas[index]) * model_output
        return moved.to(model_output.dtype)


def run_probe(
    pipe: DiffusionPipeline,
    name: str,
    network: nn.Module,
    probe: Probe,
    arguments: Mapping[str, Any],
    encode_prompt: Callable[..., Any] | None = None,
) -> Probe:
    """Call the pipeline under a probe until the probe has seen enough."""
    with installed(pipe, name, network, probe, encode_prompt), torch.no_grad(), suppress(Left):
        pipe(**arguments)
    return probe
