"""A plain Python function as a reward: ``f(prompts, images, **columns)`` that returns a number for each image."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.rewards import parts


@dataclass(frozen=True)
class PlainReward:
    """Calls a function with the prompts, the images and the columns of the prompts' records that it asks for, all by name.

    A function that takes ``**columns`` gets every column; one that names ``metadata`` gets the records as they are. A column that some
    records lack holds None there. It returns a tensor, an array or a list with a number for each image; None means "not computed", which
    is allowed where the reward's ``may_skip`` is set.
    """

    function: Callable[..., Any]

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def scores_alone(self) -> bool:
        """Whether the function says, by an attribute of this name, that its score of an image depends on no other image of the call."""
        return parts.scores_alone(self.function)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Score images ``[batch, 3, h, w]`` in [0, 1].

        Raises:
            ValueError: If the function asks for a column that no record has, or returns something else than numbers.
        """
        values = self.function(**self._arguments(images, prompts, metadata))
        if isinstance(values, Tensor):
            return values
        try:
            return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"reward function {self.name!r}: returned {values!r:.80}, needed a number for each image ({error})") from error

    def _arguments(self, images: Tensor, prompts: list[str], metadata: Sequence[dict[str, Any]]) -> dict[str, Any]:
        names = list(dict.fromkeys(key for record in metadata for key in record))
        columns = {name: [record.get(name) for record in metadata] for name in names}
        offered = {**columns, "metadata": list(metadata), "prompts": prompts, "images": images}
        every = inspect.signature(self.function).parameters.values()
        parameters = [entry for entry in every if entry.kind not in (entry.POSITIONAL_ONLY, entry.VAR_POSITIONAL)]
        unnamed = [entry for entry in every if entry.kind is entry.POSITIONAL_ONLY and entry.default is entry.empty]
        if not parameters:  # beside named parameters, *names stays empty, as in any call by name
            unnamed += [entry for entry in every if entry.kind is entry.VAR_POSITIONAL]
        if unnamed:
            raise ValueError(
                f"reward function {self.name!r}: takes {', '.join(map(str, unnamed))} by position only, but arguments are given by name; "
                "needed parameters such as prompts and images, without '/' behind them"
            )
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            named = {parameter.name for parameter in parameters}
            return {name: value for name, value in offered.items() if name != "metadata" or name in named}
        needed = [parameter for parameter in parameters if parameter.default is parameter.empty]
        missing = next((parameter.name for parameter in needed if parameter.name not in offered), None)
        if missing is not None:
            raise ValueError(
                f"reward function {self.name!r}: asks for {missing!r}, but the prompts' records have {', '.join(names) or 'no columns'}; "
                "its arguments are prompts, images, metadata and columns of the prompt file"
            )
        return {parameter.name: offered[parameter.name] for parameter in parameters if parameter.name in offered}
