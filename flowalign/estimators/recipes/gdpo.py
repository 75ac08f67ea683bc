"""GDPO: normalise each reward within its group, add up, normalise over the batch."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.calibrate import renormalise
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_advantages
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.scale import scale_by_std


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = norm_batch(sum_k w_k (r_k - mean_group) / (std_group + eps))``: no reward drowns in another's variance.

    References:
        Liu et al., "GDPO", 2026, https://arxiv.org/abs/2601.05242, and its released code (TRL flavour: ddof 1, eps 1e-4, over samples).
        Deviation: none; a reward that a sample lacks adds 0 for it.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        eps: Added to both standard deviations.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=True, zero_mean=True, monotone=True, local=False, zero_when_flat=True, num_rewards=2
    )
    reward_weights: tuple[float, ...] | None = None
    eps: float = 1e-4
    ddof: int = 1

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            center(),
            scale_by_std(ddof=self.ddof, eps=self.eps),
            combine_advantages(self.reward_weights),
            renormalise("batch", ddof=self.ddof, eps=self.eps),
            broadcast_steps(),
        )
