"""Weights that processes share among each other: torch's own ``fully_shard`` (FSDP2), and the way back to whole tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flowalign.pipelines.bare import bare, unadapted
from flowalign.pipelines.base import FlowPipeline


def shard(network: nn.Module) -> None:
    """Let every process keep its part of each weight; a pass gathers one block at a time.

    The network stays the same object, but its parameters become others: optimizers are made afterwards.
    """
    mesh = init_device_mesh(next(network.parameters()).device.type, (torch.distributed.get_world_size(),))
    for child in network.children():
        for block in child if isinstance(child, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    # The root's weights too are given back after each pass: those left whole would not be those that the optimizer moves.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def is_sharded(network: nn.Module) -> bool:
    """Tell whether processes share a network's weights."""
    return isinstance(network, FSDPModule)


def number(value: Tensor) -> float:
    """Return a shared or whole tensor of one number as a number, on every process; every process must ask."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


def whole(state: Any) -> Any:
    """Gather the shared tensors of a nested state in the main memory of the first process; every process must ask for the same.

    On the others a shared tensor becomes None, so that a machine holds each once. The rest stays as it is.
    """
    if isinstance(state, DTensor):
        found = state.full_tensor()
        return found.cpu() if torch.distributed.get_rank() == 0 else None
    if isinstance(state, Mapping):
        return {key: whole(value) for key, value in state.items()}
    return [whole(value) for value in state] if isinstance(state, list) else state


def share(state: Any, targets: Any) -> Any:
    """Share the whole tensors of a nested state as those of another state of the same form are shared."""
    if isinstance(targets, DTensor) and isinstance(state, Tensor):
        # Every process has read the same file: each takes its part, and nothing is sent.
        return distribute_tensor(state.to(targets.device), targets.device_mesh, targets.placements, src_data_rank=None)
    if isinstance(state, Mapping) and isinstance(targets, Mapping):
        return {key: share(value, targets.get(key)) for key, value in state.items()}
    return state


def share_moments(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Share a stored state of an optimizer as its parameters are shared; step counts are numbers and stay."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        key: {name: share(value, parameters[int(key)]) if value.dim() else value for name, value in kept.items()}
        for key, kept in state["state"].items()
    }
    return {**state, "state": moments}


def unshared(pipeline: FlowPipeline) -> FlowPipeline | None:
    """Return a pipeline of its own with whole weights and the same roles, which can be saved; every process must ask for it, the first one gets it.

    One whose weights are not shared is returned as it is.
    """
    network = pipeline.roles.module
    if not is_sharded(network):
        return pipeline
    roles, state = whole(pipeline.roles.state_dict()), whole(network.state_dict())
    if torch.distributed.get_rank() > 0:
        return None
    kind: Any = next(kind for kind in type(network).__mro__ if not issubclass(kind, FSDPModule))
    fresh = bare(kind, network.config, unadapted(state))
    pipe = copy.copy(pipeline.pipe)
    object.__setattr__(pipe, pipeline.family.denoiser, fresh.to(pipeline.device))
    made = FlowPipeline(pipe, pipeline.family, pipeline.roles.lora, num_steps=pipeline.num_steps)
    made.dtype = pipeline.dtype
    made.roles.load_state_dict(roles)
    return made
