"""DRPO: share +1 among passes by preference and -1 among failures by likelihood."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.pairs import decouple_outcomes
from flowalign.estimators.shape import check_binary


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = softmax(preference / sharpness)`` over passes, ``-softmax(S / temperature)`` over failures of the group.

    A pass is never punished for being plain. ``S`` is the mean log-prob, the preference (for example the aesthetic rank in [0, 1]) is a
    column of the metric. Advantages sum to 0 and are of order 1 / K: they are coefficients of a sum over samples.

    References:
        Li et al., "DRPO", 2025, https://arxiv.org/abs/2510.04474, and its released code. Deviations: passing is "within 1e-6 of 1" and
        anything else but 0 is refused; log-probs are those of the batch, so the softmax lags by one update.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        temperature: Of the shares among failures.
        sharpness: Difference of preference that gives e times the share.
        metric: Column of ``RewardBatch.metric`` with the preference, in [0, 1].
    """

    claims: ClassVar[Claims] = Claims(
        shift=False,
        shift_per_group=False,
        scale=False,
        zero_mean=True,
        monotone=True,
        local=True,
        zero_when_flat=True,
        domain="binary",
        needs=("metric", "log_prob"),
        filters=True,
    )
    reward_weights: tuple[float, ...] | None = None
    temperature: float = 10.0
    sharpness: float = 0.1
    metric: int = 0

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            check_binary(recipe="drpo"),
            decouple_outcomes(temperature=self.temperature, sharpness=self.sharpness, metric=self.metric),
            broadcast_steps(),
        )
