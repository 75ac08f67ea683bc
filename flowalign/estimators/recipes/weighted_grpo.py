"""Weighted GRPO: rare successes and rare failures only, of sizes chosen for each."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.shape import check_binary, signed_outcome
from flowalign.estimators.weigh import keep_pass_rates


@dataclass(frozen=True, kw_only=True)
class Config:
    """Prompts whose pass rate lies in a band; ``r = +positive`` or ``-negative``, ``A = r - mean_group``.

    One prompt with a rare success beside one with a rare failure teaches most. Without a standard deviation the sizes set the step; with one
    they would cancel, which the chain refuses.

    References:
        "Beyond Variance", 2026, https://arxiv.org/abs/2602.03452: bands 1/K to c/K and their mirror image. Deviations: the bands are rates,
        so that groups may be ragged; no standard deviation; prompts are filtered, and pairing them is the sampler's.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        positive: Size of a success.
        negative: Size of a failure.
        band: Groups pass with a rate above 0 and up to this, or from 1 less this and below 1.
        reward: Column of the rewards that decides the pass rate.
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
        filters=True,
    )
    reward_weights: tuple[float, ...] | None = None
    positive: float = 1.0
    negative: float = 1.0
    band: float = 0.25
    reward: int = 0

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            check_binary(recipe="weighted_grpo"),
            keep_pass_rates(((1e-6, self.band), (1 - self.band, 1 - 1e-6)), reward=self.reward, threshold=0.5),
            signed_outcome(self.positive, self.negative),
            center(),
            broadcast_steps(),
        )
