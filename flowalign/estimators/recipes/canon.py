"""CANON: compare across and within halves of the group, split by a second quality."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from flowalign.estimators.baseline import center_across_halves
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = mu (r - mean of the other half) + (1 - mu) (r - mean of the own half)``, halves by the rank of a metric.

    The metric (aesthetic score, contrast, distance to the group's centre) acts only in the direction that helps the reward. ``mu = 1/2``
    with groups of even size is ``dr_grpo``.

    References:
        Chen et al., "Conditional Advantage Estimation", 2025, https://arxiv.org/abs/2509.23962, and its released code.
        Deviations: no division by a maximal length; ties are broken by ``sample_uid``; flat groups and groups of one give 0.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        mu: Share of the comparison across halves.
        alpha: Discount of one half where halves are compared.
        discounted: Which half that is: the code's entropy variant says low, its length variant high.
        metric: Column of ``RewardBatch.metric``.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=False, zero_mean=False, monotone=False, local=True, zero_when_flat=True, needs=("metric",)
    )
    reward_weights: tuple[float, ...] | None = None
    mu: float = 1.0
    alpha: float = 1.0
    discounted: Literal["low", "high"] = "low"
    metric: int = 0

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            center_across_halves(self.mu, metric=self.metric, discount=self.alpha, discounted=self.discounted),
            broadcast_steps(),
        )
