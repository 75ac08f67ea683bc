"""What a run spends: rows through its denoiser, their floating-point operations, and seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from flowalign.core.flops import DIFFERENTIATED


@dataclass(kw_only=True)
class Meter:
    """Counts the rows of every denoiser call while it is attached.

    Attributes:
        network: The denoiser.
        forward: Floating-point operations of a row (a multiplication and an addition are two).
        backward: The same of its backward pass, as far as it is needed: adapters need no gradient of frozen weights.
        sampled: Rows without gradient: rollouts, reference passes.
        trained: Rows with gradient.
        seconds: Wall time, which the caller adds.
    """

    network: nn.Module
    forward: float
    backward: float
    sampled: int = 0
    trained: int = 0
    seconds: float = 0.0
    _pauses: int = field(default=0, repr=False)

    @property
    def evaluations(self) -> float:
        """Rows, those with gradient counted three times."""
        return self.sampled + DIFFERENTIATED * self.trained

    @property
    def flops(self) -> float:
        """Floating-point operations of the denoiser."""
        return (self.sampled + self.trained) * self.forward + self.trained * self.backward

    def spent(self) -> dict[str, float]:
        """Everything that was counted."""
        return {
            "evaluations": self.evaluations,
            "flops": self.flops,
            "seconds": self.seconds,
            "rows_sampled": float(self.sampled),
            "rows_trained": float(self.trained),
        }

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Count nothing: what is done inside measures the run and is not part of it."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    @contextlib.contextmanager
    def attached(self) -> Iterator[Meter]:
        """Count what passes the denoiser inside."""
        handle = self.network.register_forward_hook(self._note)
        try:
            yield self
        finally:
            handle.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._pauses:
            return
        rows = len(output[0] if isinstance(output, tuple) else output.sample)
        if torch.is_grad_enabled():
            self.trained += rows
        else:
            self.sampled += rows
