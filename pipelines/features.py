"""What a denoiser makes of noised samples on its way, as a few numbers for each: what critics read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowalign.pipelines.conditioning import Conditioning
from flowalign.pipelines.replay import CallRule

if TYPE_CHECKING:
    from flowalign.pipelines.base import FlowPipeline


def look(flow: FlowPipeline, x: Tensor, sigma: Tensor, cond: Conditioning, role: str) -> tuple[Tensor, Tensor]:
    """Return a role's velocity and what its denoiser made of the latents on the way, of one pass without gradient.

    Features pool the block in the middle of a denoiser: mean and standard deviation of each channel over its tokens, of image and text.
    Both calls of a guided denoiser are read, side by side.

    Args:
        flow: The pipeline.
        x: ``[batch, *event]`` float32.
        sigma: Noise level, ``[batch]`` or 0-dim.
        cond: Conditioning of ``batch`` samples.
        role: Version of the network.

    Returns:
        Velocity ``[batch, *event]`` and features ``[batch, features]``, float32.

    Raises:
        ValueError: If the denoiser has no list of blocks, or its middle one does not keep samples apart.
    """
    with flow.roles.use(role) as network, torch.no_grad(), _watched(middle_block(network)) as seen:
        velocity = flow.replayed(network, x, sigma, cond)
    rules = flow.learnt().replay.calls
    if len(seen) != len(rules):
        raise ValueError(
            f"features: the middle block is called {len(seen)} times in {len(rules)} calls of the denoiser, needed once in each; use an algorithm "
            "without a critic"
        )
    return velocity, torch.cat([part for rule, outputs in zip(rules, seen, strict=True) for part in _pooled(rule, outputs, len(x))], 1)


def middle_block(network: nn.Module) -> nn.Module:
    """Return the block in the middle of the denoiser's longest list of blocks.

    Raises:
        ValueError: If it has no such list.
    """
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList) and len(child)]
    if not lists:
        raise ValueError(
            f"features: {type(network).__name__} has no list of blocks to read a critic's features from; use an algorithm without one"
        )
    blocks = max(lists, key=len)
    return blocks[len(blocks) // 2]


@contextmanager
def _watched(block: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Collect what a block returns in each of its calls."""
    seen: list[list[Tensor]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append([part for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, Tensor)])

    handle = block.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _pooled(rule: CallRule, outputs: Sequence[Tensor], rows: int) -> Iterator[Tensor]:
    for output in outputs:
        if output.ndim not in (3, 4) or len(output) != rule.copies * rows:
            raise ValueError(
                f"features: the middle block gives {list(output.shape)} for {rule.copies * rows} samples, needed [samples, tokens, channels] or "
                "[samples, channels, height, width]; use an algorithm without a critic"
            )
        tokens = output.float() if output.ndim == 3 else output.float().flatten(2).transpose(1, 2)
        pooled = torch.cat([tokens.mean(1), tokens.std(1, correction=0)], 1)
        yield from pooled.chunk(rule.copies)
