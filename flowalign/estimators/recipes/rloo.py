"""RLOO: the mean of the other samples of the group as baseline."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.stages import broadcast_steps, combine_rewards, leave_one_out


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = r - mean of the others = K / (K - 1) * (r - mean_group)``: unbiased.

    References:
        Ahmadian et al., "Back to Basics", 2024, https://arxiv.org/abs/2402.14740, equation 8.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=False, zero_mean=True, monotone=True, local=True, zero_when_flat=True
    )
    reward_weights: tuple[float, ...] | None = None

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(combine_rewards(self.reward_weights), leave_one_out(), broadcast_steps())
