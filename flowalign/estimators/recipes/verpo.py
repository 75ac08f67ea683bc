"""VeRPO: dense rewards from clauses, weighted by how hard each is now."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.clauses import clause_rewards
from flowalign.estimators.combine import combine_advantages
from flowalign.estimators.credit import broadcast_steps


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = center(all clauses pass) + beta center(sum of the weights of the clauses that pass)``.

    The weight of a clause is ``exp(-alpha rate) / (size of its neighbourhood of pass rates + delta)``, so that counting the easy object
    does not pay. It works from ``RewardBatch.clauses``; the reward column is only logged.

    References:
        "VeRPO", 2026, https://arxiv.org/abs/2601.03525. alpha, sigma, delta and beta of the paper are not known to us. Deviations: no discount
        by turns, since an image has one; a clause that was not evaluated counts as failed.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        beta: Weight of the dense part.
        alpha: How much harder clauses count more.
        sigma: Width of the neighbourhood of pass rates.
        delta: Added to the size of a neighbourhood.
        prior: Passes and failures added to each pass rate; 1 for groups of at most 8.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=True, zero_mean=True, monotone=True, local=True, zero_when_flat=True, needs=("clauses",)
    )
    reward_weights: tuple[float, ...] | None = None
    beta: float = 1.0
    alpha: float = 1.0
    sigma: float = 0.1
    delta: float = 1e-6
    prior: float = 0.0

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            clause_rewards(alpha=self.alpha, sigma=self.sigma, delta=self.delta, prior=self.prior, rewards=self.reward_weights),
            center(),
            combine_advantages((1.0, self.beta)),
            broadcast_steps(),
        )
