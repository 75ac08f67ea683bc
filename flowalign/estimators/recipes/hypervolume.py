"""Dynamic reward weighting by hypervolume: steps that push the front count more."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.controllers import weigh_by_hypervolume
from flowalign.estimators.credit import broadcast_steps


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = (r - mean_group) * (0.5 + 1.5 tanh(growth of the hypervolume))``, with the front of the mean rewards so far as state.

    Exact for up to three rewards, beyond that to about 1 % (see ``controllers.hypervolume``). No standard deviation: it would cancel the factor.

    References:
        Lu et al., "Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting", 2025, https://arxiv.org/abs/2509.11452,
        hypervolume-guided. Deviation: the released code applies the factor before a standard deviation, where it does nothing.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        reference: Rewards up to this count nothing for the volume.
        size: Points of the front that are kept.
    """

    claims: ClassVar[Claims] = Claims(
        shift=False, shift_per_group=False, scale=False, zero_mean=True, monotone=True, local=False, zero_when_flat=True, num_rewards=2
    )
    reward_weights: tuple[float, ...] | None = None
    reference: float = 0.0
    size: int = 64

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            center(),
            weigh_by_hypervolume(reference=self.reference, size=self.size, rewards=self.reward_weights),
            broadcast_steps(),
        )
