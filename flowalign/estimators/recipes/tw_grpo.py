"""TW-GRPO: GRPO with more weight on the steps at which the samples of a group differ."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.scale import scale_by_std
from flowalign.estimators.weigh import weigh_steps_by_spread


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A`` of ``grpo``, weight ``1 + (top - 1) n_t``, ``n_t`` the spread of a step's scalar over the group, between 0 and 1.

    Combined with an objective that weighs steps by noise level it may count the same thing twice.

    References:
        Dang et al., "TW-GRPO", 2025, https://arxiv.org/abs/2505.24718, and its released code. Deviation: there is no vocabulary,
        so the variance over the group of a scalar per step replaces the divergence between token distributions.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        top: Largest weight; the least is 1.
        of: Table whose spread tells how much a step matters.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True,
        shift_per_group=True,
        scale=True,
        zero_mean=True,
        monotone=True,
        local=True,
        zero_when_flat=True,
        needs=("step_rewards",),
    )
    reward_weights: tuple[float, ...] | None = None
    top: float = 1.7
    of: Literal["step_rewards", "log_prob"] = "step_rewards"
    eps: float = 1e-4
    ddof: int = 0

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            center(),
            scale_by_std(ddof=self.ddof, eps=self.eps),
            broadcast_steps(),
            weigh_steps_by_spread(self.top, of=self.of),
        )
