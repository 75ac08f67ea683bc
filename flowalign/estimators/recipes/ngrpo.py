"""NGRPO: a virtual sample with the best reward lets groups learn that all are wrong."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center_with_virtual
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.scale import scale_with_virtual
from flowalign.estimators.shape import check_range


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = (r - mean') / (std' + eps)`` over the group and ``num`` virtual samples with reward ``r_max``.

    All-wrong groups of K get ``-1 / sqrt(K + 1)`` each; all-right groups get 0. The sum over a group is negative: clip failures tighter than
    successes (the paper: 0.16 low, 0.24 high).

    References:
        Nan et al., "NGRPO", 2025, https://arxiv.org/abs/2509.18851, and its released code (ddof 1, eps 1e-6).
        Deviation: groups of one give 0.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        r_max: The largest possible reward; a larger one is refused.
        num: Virtual samples per group; 0 is GRPO.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=False,
        shift_per_group=False,
        scale=False,
        zero_mean=False,
        monotone=True,
        local=True,
        zero_when_flat=False,
        domain="at_most_one",
    )
    reward_weights: tuple[float, ...] | None = None
    r_max: float = 1.0
    num: int = 1
    eps: float = 1e-6
    ddof: int = 1

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            check_range(high=self.r_max, recipe="ngrpo"),
            center_with_virtual(self.r_max, num=self.num),
            scale_with_virtual(self.r_max, num=self.num, ddof=self.ddof, eps=self.eps),
            broadcast_steps(),
        )
