"""OPO: the baseline that minimises the variance, a mean weighted by gradient size."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center_by_weighted_mean
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = r - sum(w r) / sum(w)`` over the group, with ``w`` proportional to the squared gradient norm of a sample.

    References:
        Hao et al., "On-Policy RL with Optimal Reward Baseline", 2025, https://arxiv.org/abs/2505.23585: ``w`` is the length.
        Deviation: ``w`` is the number of trained steps of the sample, or a column of ``RewardBatch.metric`` such as squared score norms.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        metric: Column of the metric with positive weights; None for the number of trained steps.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=False, zero_mean=False, monotone=True, local=True, zero_when_flat=True
    )
    reward_weights: tuple[float, ...] | None = None
    metric: int | None = None

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            center_by_weighted_mean(metric=self.metric),
            broadcast_steps(),
        )
