"""ADORA: damp the groups in which a second quality does not speak for the passes."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from flowalign.estimators.baseline import center
from flowalign.estimators.calibrate import damp_unless_elaborate
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.scale import scale_by_std


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A`` of ``grpo``, times ``damping`` unless the largest metric of the passes exceeds the mean metric of the failures.

    References:
        "ADORA: Adaptive Dynamic Rollout Advantage", 2025, released code (ddof 1, eps 1e-6). Its two implementations differ where a kind is
        absent: without passes "vl" keeps 1 and "llm" damps; without failures it is the other way round. Deviation: the metric is any
        measurement, not a length.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        damping: Factor of the damped groups.
        threshold: A sample passes above this reward.
        variant: What happens where a kind is absent.
        metric: Column of ``RewardBatch.metric``.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=False, shift_per_group=False, scale=False, zero_mean=True, monotone=True, local=True, zero_when_flat=True, needs=("metric",)
    )
    reward_weights: tuple[float, ...] | None = None
    damping: float = 0.1
    threshold: float = 0.5
    variant: Literal["vl", "llm"] = "vl"
    metric: int = 0
    eps: float = 1e-6
    ddof: int = 1

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            center(),
            scale_by_std(of="raw", ddof=self.ddof, eps=self.eps),
            damp_unless_elaborate(self.damping, threshold=self.threshold, variant=self.variant, metric=self.metric),
            broadcast_steps(),
        )
