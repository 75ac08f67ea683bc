"""The networks that a run trains: the denoiser, and small heads that read the frozen base's features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flowalign.core.adamw import AdamW
from flowalign.core.algorithm import CURRENT, FEATURES, REFERENCE, HasHeads
from flowalign.core.discriminators import Discriminator
from flowalign.core.distillation import DISCRIMINATOR, FAKE, TEACHER
from flowalign.train import checkpoint
from flowalign.train.checkpoint import restore_optimizer
from flowalign.train.protocols import Pipeline


@dataclass(kw_only=True)
class Player:
    """A network with its optimizer.

    Attributes:
        module: What is called where gradients flow: wrapped where several processes train.
        parameters: What is trained of it.
        optimizer: Its own.
        learning_rate: After the warm-up.
    """

    module: nn.Module
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    learning_rate: float


@dataclass(kw_only=True)
class HeadPlayer(Player):
    """A head; ``bare`` is its unwrapped network, whose weights are stored."""

    bare: nn.Module

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer."""
        return {"weights": self.bare.state_dict(), "optimizer": checkpoint.optimizer_state(self.optimizer)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.bare.load_state_dict(state["weights"])
        restore_optimizer(self.optimizer, state["optimizer"])


def build_heads(algorithm: HasHeads, pipeline: Pipeline, accelerator: Accelerator, *, seed: int) -> dict[str, HeadPlayer]:
    """Make an algorithm's heads, as wide at the input as the pipeline's features."""
    num_features = pipeline.look(*_one(pipeline, accelerator), REFERENCE)[1].shape[1]
    return {name: _head(head.build(num_features, seed=seed, name=name), head, accelerator) for name, head in algorithm.heads.items()}


def build_discriminator(settings: Discriminator, pipeline: Pipeline, accelerator: Accelerator, *, seed: int) -> HeadPlayer:
    """Make a discriminator, as wide at the input as the blocks that it taps."""
    _, seen = pipeline.tap(*_one(pipeline, accelerator), settings.taps, whole=False)
    return _head(settings.build([tap.shape[2] for tap in seen], seed=seed), settings, accelerator)


def build_fake(settings: AdamW, pipeline: Pipeline, accelerator: Accelerator) -> Player:
    """Make the fake score's player: an adapter on the denoiser, or a network of its own where all weights are trained."""
    network = pipeline.roles.network(FAKE)
    if network is not pipeline.roles.network(CURRENT):
        pipeline.modules[FAKE] = accelerator.prepare(network)
    parameters = pipeline.roles.trainable_parameters(FAKE)
    module = pipeline.modules.get(FAKE, pipeline.module)
    return Player(module=module, parameters=parameters, optimizer=settings.over(parameters), learning_rate=settings.learning_rate)


def _one(pipeline: Pipeline, accelerator: Accelerator) -> tuple[Tensor, Tensor, Any]:
    """Return a state, a level and a conditioning, to see how wide things are."""
    one = torch.zeros(1, *pipeline.event_shape, device=accelerator.device)
    return one, torch.tensor(0.5, device=one.device), pipeline.encode(["a"])


def _head(bare: nn.Module, settings: AdamW, accelerator: Accelerator) -> HeadPlayer:
    bare = bare.to(accelerator.device)
    parameters = list(bare.parameters())
    return HeadPlayer(
        module=accelerator.prepare(bare),
        parameters=parameters,
        optimizer=settings.over(parameters),
        learning_rate=settings.learning_rate,
        bare=bare,
    )


@dataclass(kw_only=True)
class Networks:
    """The networks on the samples of a step, as algorithms call them.

    Attributes:
        pipeline: Has the denoiser.
        cond: Conditioning of the samples.
        heads: By name.
        count: Told of every evaluation of the denoiser: purpose and rows.
        teacher: The pipeline with the teacher's guidance, and its conditioning of the samples; None where it has none.
        taps: Blocks that a discriminator reads.
        squares: Of each pass with gradient the sum of its rows' mean squared velocities, and their number.
    """

    pipeline: Pipeline
    cond: Any
    heads: Mapping[str, HeadPlayer]
    count: Callable[[str, int], None]
    teacher: tuple[Pipeline, Any] | None = None
    taps: tuple[float | str, ...] = ()
    squares: list[tuple[Tensor, int]] = field(default_factory=list)
    _looked: tuple[Tensor, Tensor] | None = field(default=None, repr=False)  # the last latents of the reference, and their features
    _tapped: tuple[Tensor, list[Tensor]] | None = field(default=None, repr=False)
    _known: tuple[Tensor, Tensor] | None = field(default=None, repr=False)  # the last latents of the reference, and its velocity

    def __call__(self, x: Tensor, sigma: Tensor, sample: Tensor, role: str) -> Tensor:
        """Return a role's velocity, the features of latents, or what a head says of features."""
        if role == DISCRIMINATOR:
            return self._judge(x, sigma, sample)
        if role in self.heads:
            head = self.heads[role]
            # Not the wrapped module without gradient: DDP would talk to other ranks.
            said: Tensor = (head.module if torch.is_grad_enabled() else head.bare)(x)
            return said
        if role == FEATURES and self._looked is not None and self._looked[0] is x:
            return self._looked[1]
        if role == TEACHER and self.teacher is not None:
            pipeline, told = self.teacher
            one = self.pipeline.rows_per_evaluation
            if self._known is not None and self._known[0] is x:
                self.count(TEACHER, len(x) * (pipeline.rows_of_guidance // one))
                return pipeline.guide(x, sigma, told.take(sample), self._known[1])
            self.count(TEACHER, len(x) * (pipeline.rows_per_evaluation // one))
            return pipeline.velocity(x, sigma, told.take(sample), REFERENCE)
        cond = self.cond.take(sample)
        if role == REFERENCE and self.taps:
            self.count(REFERENCE, len(x))
            velocity, seen = self.pipeline.tap(x, sigma, cond, self.taps, whole=True)
            assert velocity is not None
            self._tapped, self._known = (x, seen), (x, velocity.detach())
            return velocity
        if role == FEATURES or (role == REFERENCE and self.heads):
            self.count(REFERENCE, len(x))
            velocity, features = self.pipeline.look(x, sigma, cond, REFERENCE)
            self._looked = x, features
            return features if role == FEATURES else velocity
        trained = torch.is_grad_enabled() and self.pipeline.roles.is_trained(role)
        self.count("train" if trained else role, len(x))
        velocity = self.pipeline.velocity(x, sigma, cond, role)
        if role == REFERENCE:
            self._known = x, velocity
        if trained:
            # Read once a step: nothing waits for the device.
            self.squares.append((velocity.detach().square().flatten(1).mean(1).sum(), len(x)))
        return velocity

    def _judge(self, x: Tensor, sigma: Tensor, sample: Tensor) -> Tensor:
        """Return the discriminator's logits; the last pass of the reference is used where it was on the same latents."""
        if self._tapped is not None and self._tapped[0] is x:
            seen = self._tapped[1]
        else:
            self.count("taps", len(x))
            seen = self.pipeline.tap(x, sigma, self.cond.take(sample), self.taps, whole=False)[1]
        self._tapped = None
        head = self.heads[DISCRIMINATOR]
        if torch.is_grad_enabled() and not x.requires_grad:
            judged: Tensor = head.module(seen)
            return judged
        # Whoever asks for the gradient at x must not leave one in the discriminator; nor does DDP talk to other ranks.
        frozen = {name: parameter.detach() for name, parameter in head.bare.named_parameters()}
        judged = torch.func.functional_call(head.bare, frozen, (seen,))
        return judged
