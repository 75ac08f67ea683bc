"""GiGPO: samples compared within their group, and steps with those that start from the same state."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.credit import two_level_anchors


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A_t = (r - mean_group) + weight * (R_t - mean of R over the steps from the same state)``, ``R_t = sum of discount**k * r_(t + k)``.

    References:
        Feng et al., "Group-in-Group Policy Optimization", 2025, https://arxiv.org/abs/2505.10978, in its default form
        without std.
        Deviations: a sample counts once in the mean of its group (the released code counts rows, so long episodes count more). Without
        ``step_rewards`` the final reward is discounted. States are the same where ``anchor_id`` says so: common initial noise, common
        prefix or branch point; similar latents are not, and would bias the baseline. Where no state is shared this is ``dr_grpo``.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        weight: Of the comparison between steps.
        discount: Factor per trained step.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=False, zero_mean=True, monotone=False, local=True, zero_when_flat=True, needs=("anchor_id",)
    )
    reward_weights: tuple[float, ...] | None = None
    weight: float = 1.0
    discount: float = 0.95

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(two_level_anchors(self.reward_weights, weight=self.weight, discount=self.discount))
