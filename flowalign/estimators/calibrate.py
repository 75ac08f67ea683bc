"""What happens to advantages after scaling: clipping, renormalising, maps to probabilities and to target ratios."""

from dataclasses import replace

import torch

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.chain import Signal, Stage, pure
from flowalign.estimators.kinds import Signature


def clip(size: float) -> Stage:
    """Clip to ``[-size, size]``."""
    if size <= 0:
        raise ValueError(f"clip: got {size}, needed a positive size")

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        known = signal.x[~torch.isnan(signal.x)]
        share = float((known.abs() > size).double().mean()) if known.numel() else 0.0
        return replace(signal, x=signal.x.clamp(-size, size)).note(clipped=share)

    return pure(f"clip({size:g})", Signature(phase="centred | scaled | calibrated -> calibrated", rewards="one"), apply)
