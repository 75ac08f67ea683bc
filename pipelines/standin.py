"""Let a pipeline's own ``__call__`` run without its text encoders, or without its denoiser, where only the rest of it is wanted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from flowalign.pipelines.conditioning import Leaf, Spec, join, learn, split
from flowalign.pipelines.replay import Replay
from flowalign.pipelines.schedulers import Schedule


@dataclass
class Encoder:
    """The pipeline's own ``encode_prompt``, watched.

    Attributes:
        original: The method.
        returned: What each call gave.
    """

    original: Callable[..., Any]
    returned: list[Any] = field(default_factory=list)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Encode and keep."""
        self.returned.append(self.original(*args, **options))
        return self.returned[-1]


def watched(pipe: DiffusionPipeline) -> Encoder:
    """Return the pipeline's encoder of texts, to be watched during a probe.

    Raises:
        ValueError: If it has none.
    """
    method = inspect.getattr_static(type(pipe), "encode_prompt", None)
    if method is None:
        raise ValueError(f"{type(pipe).__name__}: has no encode_prompt; its family must say how embeddings are passed (`embeds`)")
    return Encoder(method.__get__(pipe))


@dataclass(frozen=True)
class StandIn:
    """Texts that were encoded once and are given again for any number of samples.

    Attributes:
        specs: Of each call of ``encode_prompt``, how its result depends on the number of samples.
        leaves: The parts of the results for one sample.
    """

    specs: tuple[Spec, ...]
    leaves: tuple[tuple[Leaf, ...], ...]

    def __call__(self, num: int) -> Callable[..., Any]:
        """Return what answers in the place of ``encode_prompt`` for ``num`` samples."""
        results = iter(
            [join(spec, (_repeated(leaf, num) for leaf in leaves)) for spec, leaves in zip(self.specs, self.leaves, strict=True)]
        )
        return lambda *args, **options: next(results)


def learn_stand_in(one: Encoder, two: Encoder) -> StandIn:
    """Work a stand-in out from what one and two samples gave.

    Raises:
        ValueError: If it cannot be found where the batch is.
    """
    if len(one.returned) != len(two.returned):
        raise ValueError(f"encode_prompt is called {len(one.returned)} times for one sample and {len(two.returned)} for two")
    specs = tuple(learn(f"encode_prompt, call {i}", a, b) for i, (a, b) in enumerate(zip(one.returned, two.returned, strict=True)))
    leaves = tuple(tuple(split("encode_prompt", spec, value, 1)) for spec, value in zip(specs, one.returned, strict=True))
    return StandIn(specs, leaves)


def _repeated(leaf: Leaf, num: int) -> Leaf:
    return leaf.expand(num, *leaf.shape[1:]).contiguous() if isinstance(leaf, Tensor) else leaf * num


@dataclass
class Decoder:
    """A driver of the last step alone, whose result is given: what follows is the pipeline's own decoding.

    Attributes:
        start: The last step.
        latents: What the last step shall return, as the pipeline keeps it.
    """

    start: int
    latents: Tensor

    def begin(self, schedule: Schedule) -> None:
        """Need nothing."""

    def call(self, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """Leave the arguments as they are."""

    def answer(self, output: Any) -> None:
        """Let the pipeline combine it."""

    def step(self, index: int, model_output: Tensor, sample: Tensor) -> Tensor:
        """Return the latents."""
        # Z-Image keeps float32 latents in half precision and asserts it, whatever it was given.
        return self.latents.to(torch.promote_types(sample.dtype, model_output.dtype))


@contextmanager
def silenced(network: nn.Module, replay: Replay) -> Iterator[None]:
    """Let a denoiser answer 0 without computing, for as long as only the rest of its pipeline is wanted."""
    name = replay.calls[0].latents
    signature = inspect.signature(network.forward)

    def zeros(*args: Any, **kwargs: Any) -> tuple[Any]:
        given = signature.bind(*args, **kwargs).arguments[name]
        return ([torch.zeros_like(item) for item in given] if isinstance(given, list) else torch.zeros_like(given),)

    before = {"forward": vars(network)["forward"]} if "forward" in vars(network) else {}  # accelerate patches the method of the instance
    object.__setattr__(network, "forward", zeros)
    try:
        yield
    finally:
        vars(network).pop("forward")
        vars(network).update(before)
