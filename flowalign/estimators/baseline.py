"""What a reward is compared with. Flat segments (by their range) and segments of one give exactly 0."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.chain import Signal, Stage, pure, segment_key
from flowalign.estimators.kinds import Signature
from flowalign.estimators.segments import segment_stats


def _baseline(name: str, over: str, deviation: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Stage:
    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        stats = segment_stats(signal.x, segment_key(signal, batch, over))
        mean, count = stats.rows(stats.mean), stats.rows(stats.count)
        # By range and not by value: rounding must not become an advantage, and a group of one carries no comparison.
        flat = stats.rows(stats.is_flat())
        centred = torch.where(flat & ~torch.isnan(signal.x), 0.0, deviation(signal.x, mean, count))
        share = float(stats.is_flat().any(1).double().mean()) if len(stats.mean) else 0.0
        return replace(signal, x=centred, raw=signal.x).note(flat_groups=share, groups=float(len(stats.mean)))

    return pure(name, Signature(phase="reward -> centred"), apply)


def center(over: str = "group") -> Stage:
    """Subtract the mean of the segment; flat segments and segments of one give 0."""
    return _baseline(f"center(over={over})", over, lambda x, mean, count: x - mean)


def leave_one_out(over: str = "group") -> Stage:
    """Subtract the mean of the *other* values of the segment: ``K / (K - 1)`` times what ``center`` gives."""
    return _baseline(f"leave_one_out(over={over})", over, lambda x, mean, count: (x - mean) * count / (count - 1).clamp(min=1))
