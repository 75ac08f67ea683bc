"""Work that may fail on one rank alone, such as scoring: where it does, all ranks stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import Accelerator

Result = TypeVar("Result")


class FailedElsewhere(RuntimeError):
    """Another rank failed, and says why."""


@dataclass(kw_only=True)
class Together:
    """Lets all ranks know whether one has failed, before they wait for what it will never send.

    Attributes:
        accelerator: The ranks.
        has_failed: Whether one has; then all know.
    """

    accelerator: Accelerator
    has_failed: bool = False

    def __call__(self, work: Callable[[], Result]) -> Result:
        """Do the work of this rank; every rank must come here equally often.

        Raises:
            FailedElsewhere: If this rank has done its work and another has not; the other raises what its work raised.
        """
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        self.has_failed = self.anywhere(error is not None)
        if error is not None:
            raise error
        if self.has_failed:
            raise FailedElsewhere("another process failed and says why; this one stops with it")
        return result

    def anywhere(self, flag: bool) -> bool:
        """Tell whether a flag is set on any rank; every rank must ask."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum") > 0)
