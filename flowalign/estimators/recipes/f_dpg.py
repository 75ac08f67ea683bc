"""f-DPG: minimise an f-divergence to the tilted reference."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.links import FLink
from flowalign.estimators.shape import f_link


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = -f'(u) + mean_group f'(u)``, ``u = Z exp(-r / beta)``, ``Z`` the group mean of ``exp(r / beta)``.

    The target is ``reference * exp(r / beta) / Z``. Reverse KL gives ``dr_grpo / beta``, forward KL ``K softmax(r / beta) - 1`` (keeps
    diversity), Jensen-Shannon and total variation are bounded between them, chi-square is the sharpest.

    References:
        Go et al., "f-DPG", 2023, https://arxiv.org/abs/2302.08215. Deviations: ``Z`` and the baseline are means over
        the group; samples are the policy's own, so the importance ratio is 1.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        divergence: Name that ``links.link`` knows.
        beta: Strength of the tie to the reference, in units of the reward.
        log_ratio_metric: Column of the metric with log policy - log reference; None while they are equal.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=False, zero_mean=True, monotone=True, local=True, zero_when_flat=True
    )
    reward_weights: tuple[float, ...] | None = None
    divergence: FLink = "reverse_kl"
    beta: float = 1.0
    log_ratio_metric: int | None = None

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            f_link(self.divergence, temperature=self.beta, log_ratio_metric=self.log_ratio_metric),
            center(),
            broadcast_steps(),
        )
