"""EPO for images: the diversity of groups is held in a band around what is usual."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.diversity import keep_diversity_in_band
from flowalign.estimators.scale import scale_by_std


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A`` of ``grpo`` on ``r + strength * side * (novelty - diversity) / usual``; side 1 below the band, -1 above, 0 inside.

    References:
        Xu et al., "EPO", 2025, https://arxiv.org/abs/2509.22576: entropy kept within bounds around its history.
        Deviations: a sampler of fixed variance has an entropy without gradient (and the released penalty has none either), so diversity
        takes its place, and the penalty enters as a reward: the first-order effect of each sample on its group's diversity. The history
        includes the current step, so the first step is treated like all others.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        low: Lower edge of the band, as a share of the usual diversity.
        high: Upper edge.
        strength: Size of the added reward, in units of the reward.
        metric: Column of ``metric`` with the novelty.
        anneal_steps: Steps of the run, over which the strength falls; None to keep it.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=False, zero_mean=True, monotone=False, local=False, zero_when_flat=False, needs=("metric",)
    )
    reward_weights: tuple[float, ...] | None = None
    low: float = 0.8
    high: float = 1.2
    strength: float = 0.1
    metric: int = 0
    anneal_steps: int | None = None
    eps: float = 1e-4
    ddof: int = 0

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            keep_diversity_in_band(
                low=self.low, high=self.high, strength=self.strength, metric=self.metric, anneal_steps=self.anneal_steps
            ),
            center(),
            scale_by_std(ddof=self.ddof, eps=self.eps),
            broadcast_steps(),
        )
