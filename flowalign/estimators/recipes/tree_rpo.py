"""TreeRPO: GRPO among siblings; with ``baseline="others"`` d-TreeRPO."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from flowalign.estimators.baseline import center, leave_one_out
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.scale import scale_by_std
from flowalign.estimators.trees import Share, edges_to_steps, node_values


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A(edge) = (V - mean of siblings) / (std of siblings + eps)``, V the mean over the children.

    References:
        Yang et al., "TreeRPO", 2025, https://arxiv.org/abs/2506.05183. Deviation: ddof 0 and eps 1e-4 as in ``grpo``, because the
        rule of the paper's std could not be confirmed. An edge above n samples is trained once (``share``).
        Pan et al., "d-TreeRPO", 2025, https://arxiv.org/abs/2512.09675: ``baseline="others"``, value minus the mean of the other siblings,
        no std. Deviation: a node without siblings gets 0, not its value.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        baseline: TreeRPO, or d-TreeRPO.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
        share: How copies of a shared edge are weighed.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=True, zero_mean=False, monotone=False, local=True, zero_when_flat=True, needs=("tree",)
    )
    reward_weights: tuple[float, ...] | None = None
    baseline: Literal["siblings", "others"] = "siblings"
    eps: float = 1e-4
    ddof: int = 0
    share: Share = "mean"

    def build(self) -> Estimator:
        """Compose the stages."""
        compare = {
            "siblings": [center("siblings"), scale_by_std("siblings", ddof=self.ddof, eps=self.eps)],
            "others": [leave_one_out("siblings")],
        }
        return chain(combine_rewards(self.reward_weights), node_values("children"), compare[self.baseline], edges_to_steps(self.share))
