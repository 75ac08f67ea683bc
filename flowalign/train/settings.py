"""Sizes and rates of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from flowalign.train.tables import StepRewards


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run trains. Sizes are of the whole job; how many devices share the work changes no result beyond rounding.

    Attributes:
        groups: Prompts of a step; each is the group of its samples.
        group_size: Samples of a prompt; 1 only for estimators with a baseline of their own (remax) or over the batch (reinforce_pp); a multiple
            of the number of processes, which share each group equally.
        rollout_batch_size: Samples of one call of the pipeline, on each device.
        micro_batch_size: Rows of one forward and backward, on each device; changes nothing beyond rounding.
        shard: Processes share weights, gradients and moments among each other (FSDP2), instead of each having them all (DDP); one process has them all.
        learning_rate: Of AdamW, constant after the warm-up.
        warmup: Optimizer updates with a linearly rising learning rate.
        betas: Of AdamW.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are clipped to this norm.
        ema_decay: Decay of an average of the weights that is saved instead of the last ones; null for none.
        step_rewards: How estimators that reward steps value a state: "completion" scores the ODE's image from it, "prediction" the clean image
            that the network predicts from it, which costs no pass but is blurred early.
        checkpoint_every: Steps between checkpoints (the last step is always written).
        keep_checkpoints: How many stay.
        keep_best_by: Name of a reward, metric or monitor (such as diversity), best one that is not trained on (a reward with weight 0, a metric): the step with its best mean over
            five steps is kept, and written to ``best_weights`` at the end; null for none.
        stop_on_alarm: Stop, with the state saved, at the first alarm: a sign of reward hacking, or of a student that falls apart.
        sample_every: Steps between grids of samples, of four prompts from the same noise each time; the last step has one too. Of the first five steps and the
            five up to the newest grid the scores of single images are kept too, with the best and worst pictures, for the report. 0 for none.
        peak_tflops: Peak of a device, which the logged utilisation is a share of; "measured" times matrix products at the start, null looks the device
            up. CPUs and devices that are not known have no share; what they do in a second is logged all the same.
        trackers: Further logs through accelerate: "tensorboard", "wandb", "trackio".
    """

    groups: int = 8
    group_size: int = 16
    rollout_batch_size: int = 64
    micro_batch_size: int = 64
    shard: bool = False
    learning_rate: float = 3e-4
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema_decay: float | None = None
    step_rewards: StepRewards = "completion"
    checkpoint_every: int = 1
    keep_checkpoints: int = 2
    keep_best_by: str | None = None
    stop_on_alarm: bool = False
    sample_every: int = 20
    peak_tflops: float | Literal["measured"] | None = None
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()

    def __post_init__(self) -> None:
        """Refuse sizes and rates that cannot be meant."""
        for name in ("groups", "group_size", "rollout_batch_size", "micro_batch_size", "checkpoint_every", "keep_checkpoints"):
            if vars(self)[name] < 1:
                raise ValueError(f"train.{name}: got {vars(self)[name]}, needed at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < vars(self)[name] < math.inf:
                raise ValueError(f"train.{name}: got {vars(self)[name]}, needed a positive number")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"train.weight_decay: got {self.weight_decay}, needed a number of at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas: got {list(self.betas)}, needed two values in [0, 1)")
        if isinstance(self.peak_tflops, float) and not 0 < self.peak_tflops < math.inf:
            raise ValueError(f'train.peak_tflops: got {self.peak_tflops}, needed a positive number, "measured" or null')
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"train.ema_decay: got {self.ema_decay}, needed a value in (0, 1) or null")

    def check_processes(self, num_processes: int) -> None:
        """Refuse groups that processes cannot share equally."""
        if self.group_size % num_processes:
            raise ValueError(
                f"train.group_size: {self.group_size} samples of a prompt cannot be shared equally by {num_processes} processes; "
                f"use a multiple of {num_processes}"
            )
