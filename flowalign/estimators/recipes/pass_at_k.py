"""Pass@k: only the best sample of a group learns, from its lead over the second."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.pairs import best_over_second
from flowalign.estimators.scale import scale_by_std


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = (r_1 - r_2) / (std_group + eps)`` for the best sample, 0 for the others: for best-of-K use.

    References:
        Tang et al., "Optimizing Language Models for Inference Time Objectives", 2025, https://arxiv.org/abs/2503.19595, as in verl
        (``compute_grpo_passk_outcome_advantage``). Deviation: ties for the best give 0 instead of an arbitrary winner's 0.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=True, zero_mean=False, monotone=True, local=True, zero_when_flat=True
    )
    reward_weights: tuple[float, ...] | None = None
    eps: float = 1e-6
    ddof: int = 1

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            best_over_second(),
            scale_by_std(of="raw", ddof=self.ddof, eps=self.eps),
            broadcast_steps(),
        )
