"""Record a pipeline: let its own ``__call__`` drive, and watch its scheduler and its denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor, nn

# Offloading rewrites these during a call; putting old values back would leave hooks behind that nobody removes.
_OFFLOAD_STATE = ("_all_hooks", "_offload_device", "_offload_gpu_id")


class Left(Exception):
    """Leaves a pipeline's ``__call__`` early; never seen outside this package."""


class Driver(Protocol):
    """What stands behind the installed scheduler and the denoiser's hooks."""

    start: int

    def begin(self, sigmas: Tensor) -> None:
        """Receive the schedule, from the starting step to the end."""

    def call(self, arguments: dict[str, Any]) -> None:
        """Receive the named arguments of one denoiser call, before it happens."""

    def answer(self, output: Any) -> None:
        """Receive what that call returned."""

    def step(self, index: int, model_output: Tensor, sample: Tensor) -> Tensor:
        """Take step ``index`` of the whole schedule and return what the pipeline shall see next."""


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


def driven_scheduler(scheduler: FlowMatchEulerDiscreteScheduler, driver: Driver) -> FlowMatchEulerDiscreteScheduler:
    """Make a scheduler of the same class and configuration whose steps are taken by the driver.

    Args:
        scheduler: The pipeline's own scheduler; it is not touched.
        driver: Takes the steps. A ``start`` above 0 cuts that many steps from the front of the schedule after it
            has been computed, because a truncated list of sigmas would be shifted a second time.

    Returns:
        An instance of a subclass of the scheduler's class.

    Raises:
        ValueError: If the scheduler is not a flow-matching Euler scheduler, samples by itself or runs backwards.
    """
    parent = type(scheduler)
    if not issubclass(parent, FlowMatchEulerDiscreteScheduler):
        raise ValueError(f"scheduler: {parent.__name__} is not supported (needs a FlowMatchEulerDiscreteScheduler)")
    for option in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config[option]:
            raise ValueError(f"scheduler.config.{option}: must be False (the plan decides where noise is added)")

    class Driven(parent):  # type: ignore
        """The pipeline's scheduler with its steps handed to a driver."""

        # Spelled out because the pipelines' retrieve_timesteps reads the parameter names.
        def set_timesteps(
            self,
            num_inference_steps: int | None = None,
            device: str | torch.device | None = None,
            sigmas: list[float] | None = None,
            mu: float | None = None,
            timesteps: list[float] | None = None,
        ) -> None:
            super().set_timesteps(num_inference_steps, device, sigmas=sigmas, mu=mu, timesteps=timesteps)
            self.timesteps = self.timesteps[driver.start :]  # type: ignore[has-type]
            self.sigmas = self.sigmas[driver.start :]  # type: ignore[has-type]
            # Set here so that nothing looks a timestep up, which would make the host wait for the device.
            self._begin_index = 0
            self._step_index = 0
            driver.begin(self.sigmas)

        def set_begin_index(self, begin_index: int = 0) -> None:
            if begin_index != 0:
                raise ValueError(f"the pipeline starts its schedule at step {begin_index}: pass `start` to the rollout")

        def step(
            self,
            model_output: Tensor,
            timestep: Tensor,
            sample: Tensor,
            generator: torch.Generator | None = None,
            return_dict: bool = True,
        ) -> Any:
            index = self._step_index
            self._step_index = index + 1
            result = driver.step(driver.start + index, model_output, sample)
            return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=result) if return_dict else (result,)

    Driven.__name__ = Driven.__qualname__ = f"Driven{parent.__name__}"
    driven = Driven.from_config(scheduler.config)
    driven.set_shift(scheduler.shift)  # may have been changed after construction, where the config does not see it
    return driven


@contextmanager
def installed(pipe: DiffusionPipeline, name: str, network: nn.Module, driver: Driver) -> Iterator[None]:
    """Let a driver run the pipeline; on leaving, also by an error, the pipeline is what it was.

    Args:
        pipe: The pipeline.
        name: Attribute of the pipeline that holds its denoiser.
        network: The denoiser to use meanwhile.
        driver: Takes the steps and sees the denoiser's calls.
    """
    signature = inspect.signature(network.forward)
    scheduler = driven_scheduler(pipe.scheduler, driver)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        driver.call(dict(signature.bind(*args, **kwargs).arguments) if args else kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        driver.answer(output)

    state = dict(vars(pipe))
    handles = [network.register_forward_pre_hook(before, with_kwargs=True), network.register_forward_hook(after)]
    try:
        # Past the pipeline's __setattr__, which would write the class names of these parts into its configuration.
        object.__setattr__(pipe, "scheduler", scheduler)
        object.__setattr__(pipe, name, network)
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
    """A driver that takes plain Euler steps, keeps everything and leaves early.

    Attributes:
        num_steps: Leave after this many steps.
        num_calls: Leave at this denoiser call of the first step, before it happens; 0 for never.
        start: Always 0.
        sigmas: The schedule, once it is known.
        steps: What was seen; an unfinished step is not in it.
        calls: The calls of the unfinished step.
    """

    num_steps: int
    num_calls: int = 0
    start: int = 0
    sigmas: Tensor = field(default_factory=lambda: torch.empty(0))
    steps: list[RecordedStep] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def begin(self, sigmas: Tensor) -> None:
        """Keep the schedule."""
        self.sigmas = sigmas
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
        """Take an Euler step, as the untouched scheduler would."""
        step = RecordedStep(sigma=float(self.sigmas[index]), sample=sample.clone(), model_output=model_output.clone(), calls=self.calls)
        self.steps.append(step)
        self.calls = []
        if len(self.steps) == self.num_steps:
            raise Left
        moved = sample.float() + (self.sigmas[index + 1] - self.sigmas[index]) * model_output
        return moved.to(model_output.dtype)


def run_probe(pipe: DiffusionPipeline, name: str, network: nn.Module, probe: Probe, arguments: Mapping[str, Any]) -> Probe:
    """Call the pipeline under a probe until the probe has seen enough."""
    with installed(pipe, name, network, probe), torch.no_grad(), suppress(Left):
        pipe(**arguments)
    return probe
