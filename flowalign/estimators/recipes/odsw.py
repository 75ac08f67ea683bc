"""VL-Cogito: GRPO with each group weighted by its difficulty."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.scale import scale_by_std
from flowalign.estimators.weigh import Schedule, weigh_by_difficulty


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A`` of ``grpo``, weight a function of the group's accuracy; train with ``s_3`` (easy), then ``s_2``, then ``s_1`` (hard).

    References:
        Yuan et al., "VL-Cogito", 2025, https://arxiv.org/abs/2507.22607, online difficulty soft weighting, and its released code. Deviation: the weight stands
        beside the advantage instead of being multiplied in.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        schedule: Curve from accuracy to weight, see ``weigh.difficulty_weight``.
        reward: Column of the rewards that is the accuracy, in [0, 1].
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=False, shift_per_group=False, scale=False, zero_mean=True, monotone=True, local=True, zero_when_flat=True, domain="unit"
    )
    reward_weights: tuple[float, ...] | None = None
    schedule: Schedule = "s_2"
    reward: int = 0
    eps: float = 1e-4
    ddof: int = 0

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            center(),
            scale_by_std(ddof=self.ddof, eps=self.eps),
            weigh_by_difficulty(self.schedule, reward=self.reward),
            broadcast_steps(),
        )
