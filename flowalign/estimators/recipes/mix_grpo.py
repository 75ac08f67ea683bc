"""MixGRPO: normalise each reward within its group and add up; only a window of steps trains."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_advantages
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.scale import scale_by_std


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = sum_k w_k (r_k - mean_group) / (std_group + eps)``, at the steps of the window.

    References:
        Li et al., "MixGRPO", 2025, https://arxiv.org/abs/2507.21802, and its released code (``advantage_aggr``: ddof 1, eps 1e-8).
        Deviation: the window is ``RewardBatch.step_mask``, which the sampler sets.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=True, zero_mean=True, monotone=True, local=True, zero_when_flat=True, num_rewards=2
    )
    reward_weights: tuple[float, ...] | None = None
    eps: float = 1e-8
    ddof: int = 1

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            center(),
            scale_by_std(ddof=self.ddof, eps=self.eps),
            combine_advantages(self.reward_weights),
            broadcast_steps(),
        )
