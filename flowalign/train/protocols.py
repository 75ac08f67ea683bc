"""What the loop needs of the things that it is handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from flowalign.core.algorithm import CURRENT
from flowalign.core.plans import Plan
from flowalign.core.rollout import Trajectory


class Roles(Protocol):
    """Versions of the trained network."""

    def add(self, name: str) -> None: ...
    def blend(self, name: str, decay: float) -> None: ...
    def trainable_parameters(self) -> list[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Pipeline(Protocol):
    """What the loop needs of a pipeline; ``rollout`` resumes at step ``start``."""

    module: nn.Module
    num_steps: int

    @property
    def roles(self) -> Roles: ...
    @property
    def event_shape(self) -> tuple[int, ...]: ...
    @property
    def rows_per_evaluation(self) -> int: ...
    def encode(self, prompts: Sequence[str]) -> Any: ...
    def rollout(
        self,
        cond: Any,
        plan: Plan,
        *,
        x_init: Tensor,
        noise: Callable[[int], Tensor],
        batch_size: int | None = None,
        start: int = 0,
        role: str = CURRENT,
    ) -> Trajectory: ...
    def velocity(self, x: Tensor, sigma: Tensor, cond: Any, role: str = CURRENT) -> Tensor: ...
    def look(self, x: Tensor, sigma: Tensor, cond: Any, role: str) -> tuple[Tensor, Tensor]: ...
    def decode(self, x: Tensor) -> Tensor: ...


class PromptLike(Protocol):
    """A prompt: its text, its record and a stable id."""

    @property
    def text(self) -> str: ...
    @property
    def metadata(self) -> dict[str, Any]: ...
    @property
    def uid(self) -> int: ...
