"""Dr. GRPO: group mean and no standard deviation."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.stages import broadcast_steps, center, combine_rewards


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = r - mean_group``: no difficulty bias; the reward's scale is the learning rate's business.

    References:
        Liu et al., "Understanding R1-Zero-Like Training", 2025, https://arxiv.org/abs/2503.20783, section 3.2.
        The length term of the paper has no counterpart where every image trains the same number of steps.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=False, zero_mean=True, monotone=True, local=True, zero_when_flat=True
    )
    reward_weights: tuple[float, ...] | None = None

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(combine_rewards(self.reward_weights), center(), broadcast_steps())
