"""Which step of a sample gets which part of its advantage."""

from dataclasses import replace

import torch

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.chain import Signal, Stage, pure
from flowalign.estimators.kinds import Signature


def broadcast_steps() -> Stage:
    """Give every trained step of a sample the sample's advantage."""

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        steps = batch.num_steps
        spread = {
            name: value.repeat_interleave(steps, 0)
            for name, value in (("x", signal.x), ("sample", signal.sample), ("weight", signal.weight), ("target", signal.target))
            if value is not None
        }
        step = torch.arange(steps).repeat(len(signal.sample))
        return replace(signal, **spread, step=step, raw=None)  # type: ignore[arg-type]

    return pure("broadcast_steps", Signature(rows="sample -> step", rewards="one"), apply)
