"""GPG: group mean, corrected for the groups that teach nothing."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.scale import scale_by_contrast


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = N / N_contrast * (r - mean_group)``, ``N_contrast`` the samples whose group is not flat.

    References:
        Chu et al., "GPG", 2025, https://arxiv.org/abs/2504.02546. Deviation: the released code counts rewards that are not 0,
        which is the same number only for binary rewards; here it is the samples of groups that are not flat.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=False, zero_mean=True, monotone=True, local=False, zero_when_flat=True
    )
    reward_weights: tuple[float, ...] | None = None

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            center(),
            scale_by_contrast(),
            broadcast_steps(),
        )
