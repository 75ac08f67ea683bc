"""Several rewards become one number: before they are compared, or after."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.chain import Signal, Stage, pure
from flowalign.estimators.kinds import Signature


def combine_rewards(weights: Sequence[float] | None = None) -> Stage:
    """Add the rewards up, weighted, before anything is compared.

    A sample that lacks one of its rewards cannot be compared and becomes NaN; counting the missing one as 0 would punish it.

    Args:
        weights: One for each reward; None for 1 each.
    """

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        num = signal.x.shape[1]
        chosen = [1.0] * num if weights is None else list(weights)
        if len(chosen) != num:
            raise ValueError(f"reward_weights: got {len(chosen)} weights for {num} rewards, needed one each")
        used = [i for i, weight in enumerate(chosen) if weight != 0]  # a reward of weight 0 is only logged
        return replace(signal, x=(signal.x[:, used] * torch.tensor([chosen[i] for i in used], dtype=torch.float64)).sum(1, keepdim=True))

    name = "combine_rewards" if weights is None else f"combine_rewards({', '.join(map(str, weights))})"
    return pure(name, Signature(rewards="several -> one", phase="reward"), apply)
