"""STEER for images: less weight where an advantage would cost the group its diversity."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.diversity import Curve, weigh_by_diversity
from flowalign.estimators.scale import scale_by_std


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A`` of ``grpo``; weight ``1 / (1 + strength * max(0, loss))``, ``loss = -A * (novelty - diversity) / diversity``.

    References:
        Hao et al., "Rethinking Entropy Interventions in RLVR", 2025, https://arxiv.org/abs/2510.10150, which weighs tokens by the predicted
        change of the policy's entropy. Deviation: a sampler of fixed variance has an entropy without gradient, so the predicted change of
        the group's diversity stands in its place; ``metric`` holds each sample's mean distance to the others of its group. The
        released code's curves are ``linear`` and ``exponential`` with strength 0.2, here over the whole batch (there: a micro-batch).

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        curve: From the loss of diversity to the weight.
        strength: Of the curve.
        metric: Column of ``metric`` with the novelty.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=True, zero_mean=False, monotone=False, local=True, zero_when_flat=True, needs=("metric",)
    )
    reward_weights: tuple[float, ...] | None = None
    curve: Curve = "inverse"
    strength: float = 1.0
    metric: int = 0
    eps: float = 1e-4
    ddof: int = 0

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            center(),
            scale_by_std(ddof=self.ddof, eps=self.eps),
            weigh_by_diversity(self.curve, strength=self.strength, metric=self.metric),
            broadcast_steps(),
        )
