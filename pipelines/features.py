"""What a denoiser makes of noised samples on its way, as a few numbers for each: what critics read."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowalign.pipelines.conditioning import Conditioning
from flowalign.pipelines.replay import CallRule
from flowalign.pipelines.roles import REFERENCE

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
    blocks = longest_list(network)
    return blocks[len(blocks) // 2]


def longest_list(network: nn.Module) -> nn.ModuleList:
    """Return the denoiser's longest list of blocks.

    Raises:
        ValueError: If it has none.
    """
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList) and len(child)]
    if not lists:
        raise ValueError(
            f"features: {type(network).__name__} has no list of blocks to read a critic's features from; name modules, or use an algorithm without one"
        )
    return max(lists, key=len)


class _Enough(Exception):
    """Leaves a pass after the last tap."""


def tap(
    flow: FlowPipeline, x: Tensor, sigma: Tensor, cond: Conditioning, places: Sequence[float | str], *, whole: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Return what some blocks of the reference make of latents, token by token: what a discriminator reads.

    Gradient flows to ``x`` where it asks for one. Without ``whole`` the pass ends after the last tap.

    Args:
        flow: The pipeline, without guidance.
        x: ``[batch, *event]`` float32.
        sigma: Noise level, ``[batch]`` or 0-dim.
        cond: Conditioning of ``batch`` samples.
        places: Shares of the depth in [0, 1), or names of modules.
        whole: Whether the velocity is wanted too.

    Returns:
        Velocity ``[batch, *event]`` or None, and for each place ``[batch, tokens, channels]`` float32: the last tensor that the block returns,
        which in transformers with two streams is the image's.

    Raises:
        ValueError: If a place does not exist or does not keep samples apart, or the pipeline is guided.
    """
    rules = flow.learnt().replay.calls
    if len(rules) != 1 or rules[0].copies != 1:
        raise ValueError(
            "taps: the pipeline is guided, so that its blocks see every sample twice; set pipeline.guidance_scale to no guidance"
        )
    seen: dict[int, Tensor] = {}
    velocity = None
    with flow.roles.use(REFERENCE) as network, torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad), _plain(network):
        blocks = blocks_at(network, places)

        def keep(number: int, output: Any) -> None:
            parts = _tensors(output)
            if not parts or not _is_laid_out(parts[-1], len(x)):
                raise ValueError(
                    f"discriminator.taps: the block at {places[number]!r} gives {[list(part.shape) for part in parts]} for {len(x)} samples, needed last "
                    "[samples, tokens, channels] or [samples, channels, height, width]; choose another block, or algorithm dmd2 with adversarial_weight 0"
                )
            seen[number] = _tokens(parts[-1])
            if not whole and len(seen) == len(blocks):
                raise _Enough

        handles = [block.register_forward_hook(lambda module, args, output, at=at: keep(at, output)) for at, block in enumerate(blocks)]
        try:
            with suppress(_Enough):  # raised by `keep` alone, after the last tap
                velocity = flow.replayed(network, x, sigma, cond)
        finally:
            for handle in handles:
                handle.remove()
    missing = [str(place) for number, place in enumerate(places) if number not in seen]
    if missing:
        raise ValueError(f"discriminator.taps: {', '.join(missing)}: not called in a pass of the denoiser; choose blocks that are")
    return velocity, [seen[number] for number in range(len(places))]


def blocks_at(network: nn.Module, places: Sequence[float | str]) -> list[nn.Module]:
    """Look blocks up by their share of the depth, or by name.

    Raises:
        ValueError: If a name is not there, with the nearest ones.
    """
    names = dict(network.named_modules()) if any(isinstance(place, str) for place in places) else {}
    found = []
    for place in places:
        if not isinstance(place, str):
            blocks = longest_list(network)
            found.append(blocks[int(place * len(blocks))])
        elif place in names and place:
            found.append(names[place])
        else:
            near = difflib.get_close_matches(place, names, n=5, cutoff=0.3) or [name for name in names if name][:5]
            raise ValueError(f"discriminator.taps: {type(network).__name__} has no module {place!r}; there are {', '.join(near)}")
    return found


@contextmanager
def _plain(network: nn.Module) -> Iterator[None]:
    """Keep activations for this pass: one that is computed again in the backward pass would be another role's by then."""
    checkpointing = getattr(network, "is_gradient_checkpointing", False) and torch.is_grad_enabled()
    if checkpointing:
        network.disable_gradient_checkpointing()
    try:
        yield
    finally:
        if checkpointing:
            network.enable_gradient_checkpointing()


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors among what a block gives."""
    return [part for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, Tensor)]


def _is_laid_out(output: Tensor, rows: int) -> bool:
    """Tell whether an output holds so many samples apart: ``[samples, tokens, channels]`` or ``[samples, channels, height, width]``."""
    return output.ndim in (3, 4) and len(output) == rows


def _tokens(output: Tensor) -> Tensor:
    """Lay an output out as ``[samples, tokens, channels]``."""
    return output.float() if output.ndim == 3 else output.float().flatten(2).transpose(1, 2)


@contextmanager
def _watched(block: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Collect what a block returns in each of its calls."""
    seen: list[list[Tensor]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(_tensors(output))

    handle = block.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _pooled(rule: CallRule, outputs: Sequence[Tensor], rows: int) -> Iterator[Tensor]:
    for output in outputs:
        if not _is_laid_out(output, rule.copies * rows):
            raise ValueError(
                f"features: the middle block gives {list(output.shape)} for {rule.copies * rows} samples, needed [samples, tokens, channels] or "
                "[samples, channels, height, width]; use an algorithm without a critic"
            )
        tokens = _tokens(output)
        pooled = torch.cat([tokens.mean(1), tokens.std(1, correction=0)], 1)
        yield from pooled.chunk(rule.copies)
