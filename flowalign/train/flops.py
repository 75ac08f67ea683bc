"""What a step computes, and which share of the device's peak that is: model FLOPs utilisation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from flowalign.core.algorithm import CURRENT
from flowalign.core.flops import flops_of
from flowalign.train.protocols import Pipeline
from flowalign.train.sharding import is_sharded

# Dense TFLOP/s of matrix products as the makers state them (without sparsity): half precision, and float32 without TensorFloat-32. The first name that is in a
# device's own name counts.
PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250.0, 80.0),
    ("H200", 989.0, 67.0),
    ("H100 PCIe", 756.0, 51.0),
    ("H100 NVL", 835.0, 60.0),
    ("H100", 989.0, 67.0),
    ("H800", 989.0, 67.0),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 30.3),
    ("A10G", 70.0, 31.2),
    ("A10", 125.0, 31.2),
    ("RTX 6000 Ada", 364.0, 91.1),
    ("RTX A6000", 155.0, 38.7),
    ("RTX 5090", 209.5, 104.8),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 4080", 97.5, 48.7),
    ("RTX 3090", 71.0, 35.6),
    ("V100", 125.0, 15.7),
    ("T4", 65.0, 8.1),
    ("MI300X", 1307.0, 163.4),
)
PER_ROW = "flops_per_row"
SIZE = 4096  # of the square matrices of a measured peak; on a CPU 1024
_SAMPLED = ("rollout", "shown")  # purposes that are counted in the phase of the rollout
_BESIDE = ("completion", "monitor", "teacher")  # and those of no one phase, which count in the whole step alone
SECONDS = 0.3  # that a measurement takes


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """Cost of an evaluation, and what the device could do.

    A multiplication and an addition are two operations. What gradient checkpointing computes again is no part of the model's cost, nor are text
    encoders, autoencoder and rewards: the time that they take lowers the share.

    Attributes:
        forward: Operations of the denoiser for one state; under guidance those of both rows.
        backward: The same of its backward pass, as far as it is needed: adapters need the gradient of activations, not of frozen weights.
        peak: Operations per second of one device; None where unknown.
    """

    forward: float
    backward: float
    peak: float | None

    def of(self, evaluations: Mapping[str, int], time_s: Mapping[str, float], *, num_devices: int) -> dict[str, Any]:
        """Return what to log of a step.

        Args:
            evaluations: By purpose, over all devices, as a log line has them.
            time_s: Of the phases, as a log line has them.
            num_devices: That shared the work.

        Returns:
            ``flops_per_row``, operations of one row's forward pass; ``tflops``, operations per second of a device / 1e12, in rollout, training and the
            whole step; and where the peak is known ``utilisation``, the same over the peak.
        """
        counts = {name: number for name, number in evaluations.items() if name not in ("total", "rows_per_evaluation")}
        spent = {name: number * (self.forward + (self.backward if name == "train" else 0.0)) for name, number in counts.items()}
        made = {
            "rollout": sum(spent.get(name, 0.0) for name in _SAMPLED),
            "train": sum(value for name, value in spent.items() if name not in (*_SAMPLED, *_BESIDE)),
            "total": sum(spent.values()),
        }
        rates = {name: value / time_s[name] / num_devices for name, value in made.items() if value and time_s.get(name, 0.0) > 0}
        told: dict[str, Any] = {PER_ROW: self.forward / evaluations["rows_per_evaluation"]}
        told["tflops"] = {name: rate / 1e12 for name, rate in rates.items()}
        return told if self.peak is None else told | {"utilisation": {name: rate / self.peak for name, rate in rates.items()}}


def measure(pipeline: Pipeline, accelerator: Accelerator, peak: float | Literal["measured"] | None) -> Utilisation:
    """Count one forward and one backward pass of the real network on one state; nothing of it stays.

    The text is one letter: where a pipeline does not pad its texts, longer ones cost a little more than is counted.
    Under gradient checkpointing a second forward pass is taken off the backward's count, so that this is low by the few layers outside the blocks.

    Args:
        pipeline: Has the network.
        accelerator: Devices and ranks.
        peak: TFLOP/s of a device; "measured" for that of its matrix products now, None for the table's.
    """
    x = torch.zeros(1, *pipeline.event_shape, device=accelerator.device)
    sigma, cond = torch.tensor(0.5, device=x.device), pipeline.encode(["a"])
    parameters = pipeline.roles.trainable_parameters()
    kept = [parameter.grad for parameter in parameters]
    with pipeline.roles.use(CURRENT) as network:

        def replay() -> Tensor:
            # Past the hooks of the network itself, because others count its calls; shared weights are gathered by them, though.
            return pipeline.replayed(network if is_sharded(network) else network.forward, x, sigma, cond)

        forward = flops_of(torch.no_grad()(replay))

        def there_and_back() -> None:
            if is_sharded(network):
                replay().sum().backward()
            else:
                # Past what waits for gradients: DeepSpeed would take these for the first of an update.
                torch.autograd.grad(replay().sum(), parameters, allow_unused=True)

        both = flops_of(there_and_back)
        checkpoints = any(vars(module).get("gradient_checkpointing") for module in network.modules())
    for parameter, gradient in zip(parameters, kept, strict=True):
        parameter.grad = gradient
    backward = both - (2 if checkpoints else 1) * forward
    if peak == "measured":
        return Utilisation(forward=forward, backward=backward, peak=measured_peak(accelerator.device, pipeline.dtype))
    known = known_peak(accelerator.device, pipeline.dtype) if peak is None else peak * 1e12
    return Utilisation(forward=forward, backward=backward, peak=known)


def known_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Look a device's peak up, in operations per second; None for CPUs and devices that the table does not have."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), dtype)


def peak_of(name: str, dtype: torch.dtype) -> float | None:
    """Look a peak up by the device's name, in operations per second; None for a name that the table does not have."""
    for known, half, single in PEAKS:
        if known.lower() in name.lower():
            return 1e12 * (single if dtype == torch.float32 else half)
    return None


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Time products of square matrices on a device; returns operations per second."""
    size = SIZE if device.type == "cuda" else SIZE // 4
    # Of random numbers: a device draws less power on ones, and is faster for it.
    a = torch.randn(size, size, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)

    def products(number: int) -> float:
        began = time.perf_counter()
        for _ in range(number):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    products(3)  # what is chosen or allocated at the first products is not measured
    number = max(1, int(SECONDS / max(products(3) / 3, 1e-6)))
    return 2 * size**3 * number / products(number)
