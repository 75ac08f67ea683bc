"""BNPO: divide by a Beta density that follows the pass rates."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import average_advantages
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.scale import scale_by_beta_density
from flowalign.estimators.shape import affine


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = (s - p) / Beta(p; alpha, beta)`` with ``s = (r - low) / (high - low)`` and ``p`` the group mean of ``s``.

    The parameters come from mean and variance of ``p`` over the prompts, so that the estimator moves between ``dr_grpo`` (``alpha = beta =
    1``) and ``grpo`` (3/2, up to pi / 8) as training goes on. Several rewards are averaged after each got its own density.

    References:
        Xiao et al., "BNPO", 2025, https://arxiv.org/abs/2506.02864, and its released code. Deviations: pass rates without variance give
        ``alpha = beta = 1`` (there nan), groups of one give 0 (there 1e6 r), and the moments can move from step to step.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        low: Least reward, one for all or one each.
        high: Largest reward, one for all or one each.
        momentum: What a step leaves of the earlier moments; with fewer than 16 prompts a step, 0.9 calms them.
    """

    claims: ClassVar[Claims] = Claims(
        shift=False, shift_per_group=False, scale=False, zero_mean=True, monotone=True, local=False, zero_when_flat=True, domain="unit"
    )
    reward_weights: tuple[float, ...] | None = None
    low: float | tuple[float, ...] = 0.0
    high: float | tuple[float, ...] = 1.0
    momentum: float = 0.0

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            affine(self.low, self.high, recipe="bnpo"),
            center(),
            scale_by_beta_density(momentum=self.momentum),
            average_advantages(self.reward_weights),
            broadcast_steps(),
        )
