"""Unlikeliness reward: right and novel is better than right and usual."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.scale import scale_by_std
from flowalign.estimators.shape import novelty_rank


@dataclass(frozen=True, kw_only=True)
class Config:
    """GRPO on ``r (1 - beta rank / K)``, rank 0 for the most novel image of the group.

    All-right groups get a signal too. Novelty is a column of the metric, for example the mean distance to the other images of the group;
    with ``by="log_prob"`` it is a low log-prob, which under a fixed variance is mostly the noise's norm.

    References:
        He et al., "Rewarding the Unlikely", 2025, https://arxiv.org/abs/2506.02355, and its released code (ddof 1, eps 1e-6).
        Deviations: novelty instead of log-probs; negative rewards are refused, since being usual would improve them.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        beta: Share that the most usual image nearly loses.
        by: What novelty is.
        metric: Column of ``RewardBatch.metric``; higher is more novel.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=False,
        shift_per_group=False,
        scale=True,
        zero_mean=True,
        monotone=False,
        local=True,
        zero_when_flat=False,
        domain="non_negative",
        needs=("metric",),
    )
    reward_weights: tuple[float, ...] | None = None
    beta: float = 0.25
    by: Literal["metric", "log_prob"] = "metric"
    metric: int = 0
    eps: float = 1e-6
    ddof: int = 1

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            novelty_rank(self.beta, by=self.by, metric=self.metric),
            center(),
            scale_by_std(ddof=self.ddof, eps=self.eps),
            broadcast_steps(),
        )
