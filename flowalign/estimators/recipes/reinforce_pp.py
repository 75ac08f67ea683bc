"""REINFORCE++: mean and standard deviation of the whole batch."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.scale import scale_by_std


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = (r - mean_batch) / sqrt(var_batch + eps)``, no comparison within a prompt.

    Prompts with high scores are always "good": for rewards whose level depends on the prompt take ``reinforce_pp_baseline``.

    References:
        Hu et al., "REINFORCE++", 2025, https://arxiv.org/abs/2501.03262, as in verl (``compute_reinforce_plus_plus_outcome_advantage``).
        Deviation: statistics over samples (ddof 1), not over tokens; every image trains the same steps. The KL term belongs to the objective.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        eps: Added to the variance.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=False, scale=True, zero_mean=False, monotone=True, local=False, zero_when_flat=False
    )
    reward_weights: tuple[float, ...] | None = None
    eps: float = 1e-8

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            center("batch"),
            scale_by_std("batch", of="raw", ddof=1, eps=self.eps, rule="rsqrt"),
            broadcast_steps(),
        )
