"""All that a run trains and averages: the denoiser's roles, its critics, their optimizers, and how processes share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from flowalign.core.algorithm import CURRENT, Algorithm, HasHeads
from flowalign.core.distillation import DISCRIMINATOR, FAKE, Distillation
from flowalign.train import checkpoint, engines, sharding
from flowalign.train.loss_scale import scale_for
from flowalign.train.players import HeadPlayer, Player, build_discriminator, build_fake, build_heads
from flowalign.train.protocols import Pipeline
from flowalign.train.settings import TrainConfig
from flowalign.train.zero import Zero, is_zero

AVERAGE = "average"


class Cast:
    """The players of a run; making one adds the algorithm's roles to the pipeline and wraps its network for the processes.

    Attributes:
        players: By name; the denoiser is "current".
        heads: Those of them that are small networks on features.
        parameters: Trained weights of the denoiser.
        optimizer: Of the denoiser.
        scale: Of the loss, where weights are float16.
        zero: DeepSpeed's engine, where it trains.
        state: Statistics of a distillation.
    """

    def __init__(self, pipeline: Pipeline, algorithm: Algorithm, config: TrainConfig, accelerator: Accelerator, *, seed: int) -> None:
        """Set up roles, optimizers and the wrapped network."""
        self.pipeline = pipeline
        for role in algorithm.roles:
            pipeline.roles.add(role)
        if config.ema_decay is not None:
            pipeline.roles.add(AVERAGE)
        engines.check(accelerator, algorithm, shard=config.shard, dtype=pipeline.dtype)
        self.scale = scale_for(pipeline.dtype, algorithm)
        self.is_sharded = config.shard and accelerator.num_processes > 1
        for network in pipeline.roles.networks() if self.is_sharded else ():
            sharding.shard(network)
        self.parameters = pipeline.roles.trainable_parameters()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
        self.heads: dict[str, HeadPlayer] = {}
        self.state: dict[str, Tensor] = {}
        if isinstance(algorithm, HasHeads):
            self.heads = build_heads(algorithm, pipeline, accelerator, seed=seed)
        elif isinstance(algorithm, Distillation):
            self.state = algorithm.start()
            if algorithm.judges:
                self.heads = {DISCRIMINATOR: build_discriminator(algorithm.config.discriminator, pipeline, accelerator, seed=seed)}
            pipeline.roles.add(FAKE, trained=True)
        self.zero: Zero | None = None
        if is_zero(accelerator):
            self.zero = Zero(accelerator, pipeline.module, self.parameters, self.optimizer, clip=config.max_grad_norm)
            pipeline.module = self.zero.engine
        elif not self.is_sharded:
            pipeline.module = accelerator.prepare(pipeline.module)
        denoiser = Player(module=pipeline.module, parameters=self.parameters, optimizer=self.optimizer, learning_rate=config.learning_rate)
        self.players: dict[str, Player] = {CURRENT: denoiser, **self.heads}
        if isinstance(algorithm, Distillation):
            self.players[FAKE] = build_fake(algorithm.config.fake, pipeline, accelerator)

    @property
    def gathers(self) -> bool:
        """Whether a state is put together from what processes share: all must ask for it."""
        return self.is_sharded or self.zero is not None

    def state_dict(self) -> dict[str, Any]:
        """Weights of all roles and players, and their optimizers; where weights are shared, all processes must ask."""
        return {
            "roles": sharding.whole(self.pipeline.roles.state_dict()),
            "optimizer": sharding.whole(checkpoint.optimizer_state(self.optimizer)) if self.zero is None else self.zero.state_dict(),
            "heads": {name: head.state_dict() for name, head in self.heads.items()},
            "scale": None if self.scale is None else self.scale.state_dict(),
            "state": self.state,
            "fake": checkpoint.optimizer_state(self.players[FAKE].optimizer) if FAKE in self.players else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.pipeline.roles.load_state_dict(sharding.share(state["roles"], self.pipeline.roles.state_dict()))
        if self.zero is None:
            checkpoint.restore_optimizer(self.optimizer, sharding.share_moments(state["optimizer"], self.optimizer))
        else:
            self.zero.load_state_dict(state["optimizer"])
        for name, head in self.heads.items():
            head.load_state_dict(state["heads"][name])
        if self.scale is not None and state.get("scale") is not None:
            self.scale.load_state_dict(state["scale"])
        if FAKE in self.players:
            self.state = dict(state["state"])
            checkpoint.restore_optimizer(self.players[FAKE].optimizer, state["fake"])
