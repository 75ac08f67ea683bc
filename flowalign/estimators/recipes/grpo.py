"""GRPO: group mean, group standard deviation."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.stages import broadcast_steps, center, combine_rewards, scale_by_std


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = (r - mean_group) / (std_group + eps)``.

    References:
        Shao et al., "DeepSeekMath", 2024, https://arxiv.org/abs/2402.03300, section 4.1.1.
        Deviation: ddof 0 and eps 1e-4 added, as in flow_grpo (TRL: ddof 1); groups of one and flat groups (by range) give exactly 0.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=True, zero_mean=True, monotone=True, local=True, zero_when_flat=True
    )
    reward_weights: tuple[float, ...] | None = None
    eps: float = 1e-4
    ddof: int = 0

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(combine_rewards(self.reward_weights), center(), scale_by_std(ddof=self.ddof, eps=self.eps), broadcast_steps())
