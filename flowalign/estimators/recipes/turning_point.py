"""TurningPoint-GRPO: steps rewarded by what they changed, turning points by all that followed."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.scale import scale_by_std
from flowalign.estimators.turning import Balance, Form, Points, turning_points


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A_t = (r_t - mean) / (std + eps)`` per group and step; ``r_t = R_T - R_t`` at turning points, else ``R_(t + 1) - R_t``.

    References:
        Tong et al., "TurningPoint-GRPO", 2026, https://arxiv.org/abs/2602.06422: the paper's form with its constraint, as in the script of the
        released code; the defaults of that code's configuration are ``form="bonus"``, ``points="all"``.
        Deviations: ``step_rewards`` holds ``R_t``, the reward of the deterministic completion from the state that step t starts from.
        Signs of differences within rounding are 0. Balancing is off unless asked, and then over the whole batch (the code: over a rank,
        so that its result depends on their number).

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        points: Which turning points count.
        form: What a turning point gets.
        balance: Whether as many gains as losses stay turning points.
        bonus: Factor, if the form is a bonus.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True,
        shift_per_group=True,
        scale=True,
        zero_mean=True,
        monotone=False,
        local=True,
        zero_when_flat=True,
        needs=("step_rewards",),
    )
    reward_weights: tuple[float, ...] | None = None
    points: Points = "constrained"
    form: Form = "replace"
    balance: Balance = "none"
    bonus: float = 1.0
    eps: float = 1e-4
    ddof: int = 0

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            turning_points(self.reward_weights, points=self.points, form=self.form, balance=self.balance, bonus=self.bonus),
            center("group_step"),
            scale_by_std("group_step", ddof=self.ddof, eps=self.eps),
        )
