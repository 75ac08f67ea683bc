"""Add an adapter to its base: layer by layer, so that the device never holds a second network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowalign.pipelines.bare import bare, unadapted
from flowalign.pipelines.loaded_back import Loaded, compare_behaviour, compare_tensors
from flowalign.pipelines.lora_files import atomically, checked, compare_parts_beside, read_back, with_denoiser, write_pipeline
from flowalign.pipelines.roles import CURRENT, REFERENCE, Roles

if TYPE_CHECKING:
    from flowalign.pipelines.base import FlowPipeline

TOLERANCE = 1e-4  # relative, of velocities in float32: weights are added before, and not after, they are multiplied


def merge(pipeline: FlowPipeline, folder: Path, role: str = CURRENT, *, notes: Mapping[str, str] | None = None) -> None:
    """Add a role's adapter to the base's weights and write the whole pipeline, which then needs no LoRA.

    The result is loaded back and compared with the role, by weights, velocities and pixels, before it takes its name. It is rounded to the
    base's precision, so it equals the role within rounding, not to the bit. The device holds one layer more than before at most; merged
    layers are kept in main memory.

    Args:
        pipeline: Has the role.
        folder: Where to.
        role: Version of the network.
        notes: Written into the metadata of the weights.

    Raises:
        ValueError: If the pipeline has no adapters.
        RuntimeError: If what was written does not behave like the role.
    """
    if pipeline.roles.lora is None:
        raise ValueError("merge: the pipeline has no adapters; its weights are whole already (save it)")
    network = _merged_network(pipeline.roles, merged(pipeline.roles, role))
    with atomically(folder) as written:
        write_pipeline(pipeline, network, written, notes or {})
        checked(folder, partial(_check, pipeline, network, role, written))


@torch.no_grad()
def merged(roles: Roles, role: str) -> dict[str, Tensor]:
    """Return the weight of each layer that has an adapter, with a role's added, in main memory and the base's precision.

    Raises:
        ValueError: If a sum is not finite in that precision.
    """
    found = {}
    for name in roles.layers:
        layer: Any = roles.module.get_submodule(name)
        base = layer.base_layer.weight
        found[name] = (base.float() + layer.get_delta_weight(role).float()).to(base.dtype).cpu()
        if not bool(found[name].isfinite().all()):
            raise ValueError(f"merge: the merged weights of {name} are not finite in {base.dtype}; merge in a wider pipeline.dtype")
    return found


def _merged_network(roles: Roles, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return the network without adapters: merged layers in main memory, all others those of the live one."""
    network: Any = roles.module
    state = unadapted(network.state_dict()) | {f"{name}.weight": value for name, value in weights.items()}
    return bare(type(network), network.config, state)


def _check(pipeline: FlowPipeline, network: nn.Module, role: str, folder: Path) -> None:
    """Compare a merged pipeline with what was merged, and by its layers, put into the live network, with the role."""
    fresh = read_back(pipeline, network, folder)
    compare_tensors(dict(network.named_parameters()), dict(fresh.named_parameters()))
    compare_parts_beside(pipeline, folder)
    weights = {name: fresh.get_parameter(f"{name}.weight") for name in pipeline.roles.layers}
    live = pipeline.roles.module
    loaded = Loaded(network=live, pipe=with_denoiser(pipeline, live), acting=lambda: _acting(pipeline.roles, weights))
    compare_behaviour(pipeline, role, loaded, tolerance=TOLERANCE)


@contextmanager
def _acting(roles: Roles, weights: Mapping[str, Any]) -> Iterator[None]:
    """Let the live network be the merged one for as long as the block, its own weights meanwhile in main memory."""
    bases: dict[str, Any] = {name: roles.module.get_parameter(f"{name}.base_layer.weight") for name in weights}
    kept = {name: base.detach().cpu().clone() for name, base in bases.items()}
    try:
        _put(bases, weights)
        with roles.use(REFERENCE):
            yield
    finally:
        _put(bases, kept)


@torch.no_grad()
def _put(bases: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, base in bases.items():
        base.copy_(values[name])
