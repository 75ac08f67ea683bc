"""What was written is loaded back and compared with what was trained: tensors, velocities and pixels. Nothing counts that differs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowalign.core.plans import ode
from flowalign.pipelines.loading import quiet
from flowalign.pipelines.watch import own_images

if TYPE_CHECKING:
    from flowalign.pipelines.base import FlowPipeline

_STEPS = 4  # of the picture that is compared; every schedule has a grid of four
VELOCITIES = 1e-5  # relative, in float32
PIXELS = 1e-2  # the largest difference, in float32
# In half precision diffusers loads an adapter in the base's precision, so that the picture is another one by rounding, which a few pixels
# show much more than the others.
HALF_VELOCITIES, HALF_MEAN, HALF_QUANTILE = 5e-2, 0.02, 0.1
QUANTILE = 0.99


class NotAsTrained(RuntimeError):
    """What was written, loaded back, is not what was trained."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a file was loaded into.

    Attributes:
        network: The denoiser.
        pipe: The pipeline that has it.
        acting: Makes the network act as the file says; by default it does.
    """

    network: nn.Module
    pipe: Any
    acting: Callable[[], AbstractContextManager[Any]] = nullcontext


def compare_tensors(written: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    """Compare tensors by name, bit for bit in the precision in which they were written.

    Raises:
        NotAsTrained: If one differs.
    """
    if written.keys() != trained.keys():
        raise NotAsTrained(f"the file has other tensors, for example {sorted(set(written) ^ set(trained))[0]}")
    for key, tensor in trained.items():
        if not torch.equal(written[key].to(tensor.device), tensor.to(written[key].dtype)):
            raise NotAsTrained(f"{key} is not what was trained")


def compare_behaviour(pipeline: FlowPipeline, role: str, loaded: Loaded, *, tolerance: float = VELOCITIES) -> None:
    """Compare velocities and a picture: one by a rollout of the role, the other by the own ``__call__`` of what was loaded.

    Args:
        pipeline: Has the role.
        role: What was written.
        loaded: What it was loaded into.
        tolerance: Of velocities, relative, in float32.

    Raises:
        NotAsTrained: If they are further apart than rounding explains.
    """
    is_full = pipeline.dtype == torch.float32
    _compare_velocities(pipeline, role, loaded, tolerance if is_full else HALF_VELOCITIES)
    apart = picture_difference(pipeline, role, loaded)
    largest, mean, high = float(apart.max()), float(apart.mean()), float(apart.kthvalue(max(1, round(QUANTILE * len(apart)))).values)
    fits = largest <= PIXELS if is_full else mean <= HALF_MEAN and high <= HALF_QUANTILE
    if not fits:
        raise NotAsTrained(
            f"the file makes another picture than the trained weights (pixels differ by {mean:.2g} in the mean, {high:.2g} at the "
            f"{QUANTILE:.0%} quantile, {largest:.2g} at most)"
        )


def _compare_velocities(pipeline: FlowPipeline, role: str, loaded: Loaded, tolerance: float) -> None:
    x = torch.randn(2, *pipeline.event_shape, generator=torch.Generator().manual_seed(1)).to(pipeline.device)
    cond, sigma = pipeline.encode(["", "a"]), torch.tensor(0.5)
    with torch.no_grad():  # and so never through the wrapped module, which would wait for other ranks
        trained = pipeline.velocity(x, sigma, cond, role)
        with loaded.acting():
            written = pipeline.replayed(loaded.network, x, sigma, cond)
    difference = float((written - trained).norm() / trained.norm())
    if not difference <= tolerance:
        raise NotAsTrained(f"the file does not behave like the trained weights (relative difference of velocities {difference:.2g})")


def picture_difference(pipeline: FlowPipeline, role: str, loaded: Loaded) -> Tensor:
    """Return by how much each value of a picture differs, made by what was loaded and made by the role, of the same noise."""
    x = torch.randn(1, *pipeline.event_shape, generator=torch.Generator().manual_seed(1)).to(pipeline.device)
    with quiet(level=logging.ERROR), loaded.acting():
        written = own_images(pipeline, loaded.pipe, "a", x, _STEPS).float()
    trained = pipeline.decode(pipeline.rollout(pipeline.encode(["a"]), ode(_STEPS), x_init=x, noise=lambda step: x, role=role).x0)
    return (written - trained).abs().flatten()
