"""Which scheduler is driven for a pipeline's own, and how: a subclass whose steps are handed to a driver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from flowalign.core.paths import vp_sigma
from flowalign.pipelines.frames import Flow, Frame, VariancePreserving


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a driven scheduler tells its driver when the pipeline has set it up.

    Attributes:
        sigmas: Noise levels from the starting step to the end, float32.
        advance: The scheduler's own deterministic step, from (step counted from the start, prediction, latents) to latents. None where it
            is, bit for bit, the Euler step of the flow.
    """

    sigmas: Tensor
    advance: Callable[[int, Tensor, Tensor], Tensor] | None = None


class Driver(Protocol):
    """What stands behind the installed scheduler and the denoiser's hooks."""

    start: int

    def begin(self, schedule: Schedule) -> None:
        """Receive the schedule, from the starting step to the end."""

    def call(self, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """Receive the named arguments of one denoiser call, before it happens; return others to be used instead, or None."""

    def answer(self, output: Any) -> None:
        """Receive what that call returned."""

    def step(self, index: int, model_output: Tensor, sample: Tensor) -> Tensor:
        """Take step ``index`` of the whole schedule and return what the pipeline shall see next."""


def drivable(scheduler: Any) -> tuple[Any, dict[str, Any]]:
    """Choose the scheduler class that is driven for a pipeline's scheduler, and its configuration.

    Flow-matching Euler stays what it is. Solvers with a memory cannot be resumed in the middle, so those of variance-preserving models
    become DDIM, and flow versions of them flow-matching Euler with the same shift.

    Raises:
        ValueError: If the scheduler is neither, samples by itself, runs backwards or changes its predictions.
    """
    kind, config = type(scheduler), dict(scheduler.config)
    if issubclass(kind, FlowMatchEulerDiscreteScheduler):
        for option in ("stochastic_sampling", "invert_sigmas"):
            if config[option]:
                raise ValueError(f"scheduler.config.{option}: must be False (the plan decides where noise is added)")
        return kind, config
    if kind.__name__ not in KarrasDiffusionSchedulers.__members__:
        raise ValueError(
            f"scheduler: {kind.__name__} is not supported; needs a FlowMatchEulerDiscreteScheduler, or DDIMScheduler, DDPMScheduler or "
            "another of the schedulers that share their training schedule (set pipe.scheduler and save the pipeline)"
        )
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler, {
            "num_train_timesteps": config["num_train_timesteps"],
            "shift": config.get("flow_shift") or 1.0,
        }
    for option in ("clip_sample", "thresholding"):
        if config.get(option):
            raise ValueError(f"scheduler.config.{option}: must be False (clipped predictions have no velocity, and latents have no range)")
    return DDIMScheduler, config | {"clip_sample": False, "thresholding": False}


def frame_of(scheduler: Any) -> Frame:
    """Return the coordinates of a pipeline by its scheduler.

    Raises:
        ValueError: As ``drivable`` says, or if the prediction is of an unknown kind.
    """
    kind, config = drivable(scheduler)
    if kind is not DDIMScheduler:
        return Flow()
    if config["prediction_type"] not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"scheduler.config.prediction_type: got {config['prediction_type']!r}, needed epsilon, v_prediction or sample")
    return VariancePreserving(config["prediction_type"], _levels(DDIMScheduler.from_config(config).alphas_cumprod))


def ddim_levels(scheduler: DDIMScheduler) -> Tensor:
    """Return the noise levels that a DDIM scheduler visits, ``[steps + 1]`` float32.

    Raises:
        ValueError: If its steps do not meet its own grid: they have one length, the grid may be uneven. Or if it begins at pure noise and
            noise is what is predicted.
    """
    timesteps = [int(t) for t in scheduler.timesteps.tolist()]
    stride = scheduler.config.num_train_timesteps // len(timesteps)
    if any(now - stride != then for now, then in pairwise(timesteps)):
        raise ValueError(
            f"scheduler: with timestep_spacing {scheduler.config.timestep_spacing!r} and {len(timesteps)} steps DDIM's steps of {stride} do "
            f"not meet its own grid {timesteps}; take a number of steps that divides {scheduler.config.num_train_timesteps}, or the spacing "
            "'leading'"
        )
    if scheduler.config.prediction_type == "epsilon" and float(scheduler.alphas_cumprod[timesteps[0]]) == 0:
        raise ValueError(
            "scheduler: begins at pure noise (rescale_betas_zero_snr), where a predicted noise does not determine x0; use a model of "
            "v-prediction, or another spacing"
        )
    last = timesteps[-1] - stride
    end = scheduler.alphas_cumprod[last] if last >= 0 else torch.as_tensor(scheduler.final_alpha_cumprod)
    return _levels(torch.cat([scheduler.alphas_cumprod[timesteps], end.reshape(1)]))


def _levels(alphas_cumprod: Tensor) -> Tensor:
    kept = alphas_cumprod.double().cpu()
    return vp_sigma(kept.sqrt(), (1 - kept).sqrt()).float()


def driven_scheduler(scheduler: Any, driver: Driver) -> Any:
    """Make a scheduler of the pipeline's class and configuration (see `drivable`) whose steps are taken by the driver.

    Args:
        scheduler: The pipeline's own scheduler; it is not touched.
        driver: Takes the steps. A ``start`` above 0 cuts that many steps from the front of the schedule after it
            has been computed, because a truncated list of sigmas would be shifted a second time.

    Returns:
        An instance of a subclass of the class that is driven.

    Raises:
        ValueError: If the scheduler is neither for flow matching nor for DDPM, samples by itself or runs backwards.
    """
    parent, config = drivable(scheduler)
    if issubclass(parent, FlowMatchEulerDiscreteScheduler):
        driven = _driven_flow(parent, driver).from_config(config)
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            driven.set_shift(scheduler.shift)  # may have been changed after construction, where the config does not see it
        return driven
    return _driven_ddim(driver).from_config(config)


def _driven_flow(parent: Any, driver: Driver) -> Any:
    class Driven(parent):
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
            driver.begin(Schedule(sigmas=self.sigmas))

        def set_begin_index(self, begin_index: int = 0) -> None:
            _refuse_offset(begin_index)

        def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
            """Return a flow's latents as they are; some pipelines ask every scheduler but diffusers' own class (Bria)."""
            return sample

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
    return Driven


def _driven_ddim(driver: Driver) -> Any:
    class DrivenDDIM(DDIMScheduler):
        """DDIM with its steps handed to a driver; no ``eta`` in ``step``, so pipelines offer none."""

        def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
            super().set_timesteps(num_inference_steps, device)
            levels = ddim_levels(self)[driver.start :]
            self.timesteps = self.timesteps[driver.start :]  # type: ignore[has-type]
            # Numbers, so that the tables of the parent, on the CPU, are read without waiting for a device.
            known = [int(t) for t in self.timesteps.tolist()]
            self._taken = 0

            def advance(index: int, output: Tensor, latents: Tensor) -> Tensor:
                return DDIMScheduler.step(self, output, known[index], latents, return_dict=False)[0]

            driver.begin(Schedule(sigmas=levels, advance=advance))

        def set_begin_index(self, begin_index: int = 0) -> None:
            _refuse_offset(begin_index)

        def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True) -> Any:
            index = self._taken
            self._taken = index + 1
            result = driver.step(driver.start + index, model_output, sample)
            return DDIMSchedulerOutput(prev_sample=result) if return_dict else (result,)

    return DrivenDDIM


def _refuse_offset(begin_index: int) -> None:
    if begin_index != 0:
        raise ValueError(f"the pipeline starts its schedule at step {begin_index}: pass `start` to the rollout")
