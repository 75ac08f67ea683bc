"""A network without the adapters that were put into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from accelerate import init_empty_weights
from torch import Tensor, nn

Value = TypeVar("Value", bound=Tensor)


def unadapted(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return a network's own tensors under the names that they had before it got adapters.

    Examples:
        >>> import torch
        >>> sorted(unadapted({"q.base_layer.weight": torch.ones(1), "q.lora_A.current.weight": torch.ones(1), "k.weight": torch.ones(1)}))
        ['k.weight', 'q.weight']
    """
    return {name.replace(".base_layer.", "."): value for name, value in values.items() if ".lora_" not in name}


def hollow(kind: Any, config: Any) -> Any:
    """Make a network whose parameters take no memory until they are assigned.

    Buffers and other tensors are real: those that no file holds, such as tables of positions, are computed here. Meanwhile no other thread may make a
    network: its parameters would be hollow too.
    """
    with init_empty_weights(include_buffers=False):
        return kind.from_config(config)


def bare(kind: Any, config: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """Make a network that holds these very tensors, and no copy of them.

    Args:
        kind: Its class.
        config: Its configuration.
        state: Its parameters and stored buffers, by the names of a network without adapters.
    """
    network: Any = hollow(kind, config)
    network.load_state_dict(dict(state), assign=True)
    return network
