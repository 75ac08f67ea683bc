"""ReMax: the reward of the deterministic sample from the same noise as baseline."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import subtract_given
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_advantages
from flowalign.estimators.credit import broadcast_steps


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = r - r(ODE sample from the same initial noise)``; works for groups of one.

    The sign tells whether the noise of the SDE helped. Costs one more image per sample, or per shared initial noise.

    References:
        Li et al., "ReMax", 2023, https://arxiv.org/abs/2310.10505, algorithm 1. Deviation: the ODE sample takes the place of greedy decoding.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
    """

    claims: ClassVar[Claims] = Claims(
        shift=False,
        shift_per_group=False,
        scale=False,
        zero_mean=False,
        monotone=False,
        local=True,
        zero_when_flat=False,
        needs=("baseline",),
    )
    reward_weights: tuple[float, ...] | None = None

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            subtract_given(),
            combine_advantages(self.reward_weights, missing="drop"),
            broadcast_steps(),
        )
