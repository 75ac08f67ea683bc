"""Process supervision: a reward for every step, and for each step the sum of what follows."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import reward_to_go, take_step_rewards
from flowalign.estimators.scale import scale_by_std


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A_t = sum over u >= t of (r_u - mean) / (std + eps)``, mean and std over all step rewards of the group.

    References:
        Shao et al., "DeepSeekMath", 2024, https://arxiv.org/abs/2402.03300, section 4.1.3.
        Deviation: ddof 0 and eps 1e-4 as in ``grpo``. The size grows with the number of steps that follow; ``divide="remaining"`` undoes
        that. A group of one compares its own steps. ``step_rewards`` holds a reward for each trained step; those of samples are only logged.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
        divide: By the number of steps that are summed, or not.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True,
        shift_per_group=True,
        scale=True,
        zero_mean=False,
        monotone=False,
        local=True,
        zero_when_flat=True,
        needs=("step_rewards",),
    )
    reward_weights: tuple[float, ...] | None = None
    eps: float = 1e-4
    ddof: int = 0
    divide: Literal["none", "remaining"] = "none"

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            take_step_rewards(),
            combine_rewards(self.reward_weights),
            center(),
            scale_by_std(ddof=self.ddof, eps=self.eps),
            reward_to_go(divide=self.divide),
        )
