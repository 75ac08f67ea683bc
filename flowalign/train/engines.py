"""What accelerate's engines can train, said before anything is loaded onto devices."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from flowalign.core.algorithm import Algorithm, HasHeads
from flowalign.core.distillation import Distillation


def check(accelerator: Accelerator, algorithm: Algorithm, *, shard: bool, dtype: torch.dtype = torch.float32) -> None:
    """Refuse what an engine cannot train.

    Args:
        accelerator: Says which engine accelerate was launched with.
        algorithm: The run's.
        shard: Whether processes share weights.
        dtype: What the network computes in.

    Raises:
        ValueError: With the engine that can.
    """
    kind, several = accelerator.distributed_type, isinstance(algorithm, HasHeads | Distillation)
    if kind == DistributedType.FSDP:
        raise ValueError("accelerate: its own FSDP is switched on; launch several plain processes instead and say --train.shard true")
    if kind == DistributedType.DEEPSPEED and several:
        raise ValueError(
            "accelerate: DeepSpeed trains one network, but this algorithm trains several (a critic, or student, fake score and discriminator); "
            "launch with configs/engines/ddp.yaml"
        )
    if kind == DistributedType.DEEPSPEED and shard:
        raise ValueError(
            "train.shard: got true, but DeepSpeed shares gradients and moments itself; leave it false, or launch with configs/engines/fsdp2.yaml"
        )
    if kind == DistributedType.DEEPSPEED and dtype == torch.float16:
        raise ValueError(
            "pipeline.dtype: got float16, but DeepSpeed would scale losses itself; take bfloat16 or float32, or launch with configs/engines/ddp.yaml"
        )
    if shard and several:
        raise ValueError(
            "train.shard: got true, but this algorithm trains several networks, which share one copy each; leave it false (DDP)"
        )
