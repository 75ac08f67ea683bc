"""Dynamic reward weighting by gradients: rewards that agree with the others gain weight."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.controllers import combine_by_gradients
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.scale import scale_by_std


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = R sum_k w_k (r_k - mean_group) / (std_group + eps)``, then ``w <- softmax(log w + rate sum_j <g_k, g_j> / scale)``.

    Measured inner products of the rewards' gradients go in by ``controllers.observe_gradients``; without them those of the advantages stand
    in.

    References:
        Lu et al., "Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting", 2025, https://arxiv.org/abs/2509.11452,
        gradient-based, and its released code. Deviations: see ``controllers.combine_by_gradients``.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        rate: Step size of the weights.
        scale: What inner products are divided by.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=True, zero_mean=True, monotone=True, local=True, zero_when_flat=True, num_rewards=2
    )
    reward_weights: tuple[float, ...] | None = None
    rate: float = 0.1
    scale: float = 1.0
    eps: float = 1e-4
    ddof: int = 0

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            center(),
            scale_by_std(ddof=self.ddof, eps=self.eps),
            combine_by_gradients(self.reward_weights, rate=self.rate, scale=self.scale),
            broadcast_steps(),
        )
