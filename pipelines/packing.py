"""How a pipeline takes the latents that it is given: as its scheduler sees them, or laid out in another way that it packs by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flowalign.pipelines import watch
from flowalign.pipelines.record import Probe
from flowalign.pipelines.replay import latents_of

if TYPE_CHECKING:
    from flowalign.pipelines.base import FlowPipeline

_BASE = 256  # of the digits that places are told by: bfloat16 holds no larger whole numbers


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Latents of one sample, as the scheduler sees them and as the pipeline takes them.

    Attributes:
        event: The scheduler's shape.
        given: The pipeline's shape.
        order: For each value of ``given`` its place in ``event``, both flat; None where they are the same.
    """

    event: tuple[int, ...]
    given: tuple[int, ...]
    order: Tensor | None = field(default=None, repr=False)

    def unpacked(self, x: Tensor) -> Tensor:
        """Lay latents ``[batch, *event]`` out as the pipeline takes them."""
        return x if self.order is None else x.flatten(1)[:, self.order.to(x.device)].reshape(len(x), *self.given)


class _Draws(TorchFunctionMode):
    """Keeps the shapes that are drawn from a normal distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.randn:
            self.shapes.append(tuple(made.shape))
        return made


def learn_packing(flow: FlowPipeline) -> Packing:
    """Let a pipeline draw its latents, see what its scheduler gets, and find out what it takes in their place.

    Raises:
        ValueError: If given latents reach the scheduler neither as they are nor in another order.
    """
    with _Draws() as draws:
        seen = watch.call(flow, Probe(num_steps=1), ["a"], flow.num_steps, latents=None)
    event = tuple(seen.steps[0].sample.shape[1:])
    drawn = [shape[1:] for shape in draws.shapes if shape[0] == 1]
    if event in drawn or _arrives(flow, event):
        return Packing(event=event, given=event)
    size = torch.Size(event).numel()
    for shape in dict.fromkeys(shape for shape in drawn if torch.Size(shape).numel() == size):
        order = _order(flow, shape, size)
        if order is not None:
            return Packing(event=event, given=shape, order=order)
    raise ValueError(
        f"the scheduler sees latents of the shape {list(event)}, but the pipeline does not take such as `latents`, nor any that it draws "
        f"({', '.join(str(list(shape)) for shape in drawn) or 'none'}) to put them into another order"
    )


def _arrives(flow: FlowPipeline, event: tuple[int, ...]) -> bool:
    """Tell whether latents of the scheduler's shape are taken, and shown to the denoiser as they are."""
    latents = torch.randn(1, *event, generator=torch.Generator().manual_seed(0)).to(flow.device, flow.dtype)
    try:
        latents_of(watch.call(flow, Probe(num_steps=1, num_calls=1), ["a"], flow.num_steps, latents=latents).calls[0], latents)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a shape that it does not take: whatever other people's code says to that
        return False
    return True


def _order(flow: FlowPipeline, given: tuple[int, ...], size: int) -> Tensor | None:
    """Give every value its place as digits, a sample for each, and read them where they arrive; None where they do not."""
    places, num = torch.arange(size), 1
    while _BASE**num < size:
        num += 1
    digits = torch.stack([places // _BASE**power % _BASE for power in range(num)]).reshape(num, *given)
    seen = watch.call(flow, Probe(num_steps=1), ["a"] * num, flow.num_steps, latents=digits.to(flow.device, flow.dtype))
    arrived = seen.steps[0].sample.flatten(1).double().cpu()
    if arrived.shape != (num, size):
        return None
    source = sum(arrived[power] * _BASE**power for power in range(num))
    assert isinstance(source, Tensor)
    order = source.argsort()  # where each place has gone
    return order if torch.equal(source[order], places.double()) else None
