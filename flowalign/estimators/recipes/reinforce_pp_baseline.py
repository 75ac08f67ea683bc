"""REINFORCE++-baseline: group mean, standard deviation of the residuals of the batch."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.scale import scale_by_std


@dataclass(frozen=True, kw_only=True)
class Config:
    """``c = r - mean_group``, ``A = c / sqrt(var_batch(c) + eps)``: near-flat groups are not blown up.

    References:
        Hu et al., "REINFORCE++", 2025, https://arxiv.org/abs/2501.03262, the variant with baseline, as in verl.
        Deviation: statistics over samples (ddof 1), not over tokens; every image trains the same steps.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        eps: Added to the variance.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=True, zero_mean=True, monotone=True, local=False, zero_when_flat=True
    )
    reward_weights: tuple[float, ...] | None = None
    eps: float = 1e-8

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            center(),
            scale_by_std("batch", of="residual", ddof=1, eps=self.eps, rule="rsqrt"),
            broadcast_steps(),
        )
