"""DAPO: GRPO without the groups that have no contrast."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.scale import scale_by_std
from flowalign.estimators.weigh import keep_contrast


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = (r - mean_group) / (std_group + eps)``; flat groups are dropped, after the statistics.

    References:
        Yu et al., "DAPO", 2025, https://arxiv.org/abs/2503.14476, dynamic sampling. Deviations: flat by range, not by
        ``std == 0``; groups of one are dropped too; nothing is resampled (draw prompts by difficulty or replay instead). The asymmetric
        clip belongs to the objective.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=True, zero_mean=True, monotone=True, local=True, zero_when_flat=True, filters=True
    )
    reward_weights: tuple[float, ...] | None = None
    eps: float = 1e-6
    ddof: int = 1

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            keep_contrast(),
            center(),
            scale_by_std(ddof=self.ddof, eps=self.eps),
            broadcast_steps(),
        )
