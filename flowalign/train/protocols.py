"""What the loop needs of the things that it is handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from flowalign.core.algorithm import CURRENT
from flowalign.core.plans import Plan
from flowalign.core.rollout import Ended, Trajectory


class Roles(Protocol):
    """Versions of the trained network."""

    names: list[str]

    def add(self, name: str, *, trained: bool = False) -> None: ...
    def use(self, name: str) -> AbstractContextManager[nn.Module]: ...
    def network(self, name: str) -> nn.Module: ...
    def blend(self, name: str, decay: float) -> None: ...
    def is_trained(self, name: str) -> bool: ...
    def trainable_parameters(self, name: str = CURRENT) -> list[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Pipeline(Protocol):
    """What the loop needs of a pipeline; ``rollout`` resumes at step ``start``."""

    module: nn.Module
    modules: dict[str, nn.Module]
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
        ended: Ended | None = None,
    ) -> Trajectory: ...
    def velocity(self, x: Tensor, sigma: Tensor, cond: Any, role: str = CURRENT) -> Tensor: ...
    def look(self, x: Tensor, sigma: Tensor, cond: Any, role: str) -> tuple[Tensor, Tensor]: ...
    def tap(
        self, x: Tensor, sigma: Tensor, cond: Any, places: Sequence[float | str], *, whole: bool
    ) -> tuple[Tensor | None, list[Tensor]]: ...
    def sigmas(self, num_steps: int | None = None) -> Tensor: ...
    def ends(self, num_steps: int) -> tuple[float, float]: ...
    def decode(self, x: Tensor) -> Tensor: ...


class PromptLike(Protocol):
    """A prompt: its text, its record and a stable id."""

    @property
    def text(self) -> str: ...
    @property
    def metadata(self) -> dict[str, Any]: ...
    @property
    def uid(self) -> int: ...
