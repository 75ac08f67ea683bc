"""SPO-tree: each edge of a tree gets the change of value from its parent to its child."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.scale import scale_by_std
from flowalign.estimators.trees import Share, edges_to_steps, node_values, scale_edges, subtract_parent


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A(edge) = V(child) - V(parent)``, V the mean over the children; over the std of the batch's edges, or of the siblings, or over nothing.

    References:
        Guo et al., "Segment Policy Optimization", 2025, https://arxiv.org/abs/2505.23564: tree-based advantages.
        Deviations: what the released code calls "rloo" subtracts the parent's value, which contains the child, and is ``scale="none"`` or
        ``"batch"`` here (leave-one-out is ``tree_rpo`` with ``baseline="others"``); its "grpo" is ``scale="siblings"``. Edges of advantage 0
        are left out, as there (its prover term has the sign of the advantage, so it drops the same ones). Divided by the std over the
        batch's edges without subtracting a mean, so that flat siblings keep 0. An edge above n samples is trained once, not n times (``share``).

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        scale: What the differences are divided by.
        eps: Added to the standard deviation.
        share: How copies of a shared edge are weighed.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=True, zero_mean=False, monotone=False, local=False, zero_when_flat=True, needs=("tree",)
    )
    reward_weights: tuple[float, ...] | None = None
    scale: Literal["batch", "siblings", "none"] = "batch"
    eps: float = 1e-8
    share: Share = "mean"

    def build(self) -> Estimator:
        """Compose the stages."""
        compare = {
            "batch": [subtract_parent(), scale_edges(ddof=1, eps=self.eps)],
            # The mean of the children is their parent's value: centring siblings and subtracting the parent are the same.
            "siblings": [center("siblings"), scale_by_std("siblings", ddof=0, eps=self.eps)],
            "none": [subtract_parent()],
        }
        return chain(
            combine_rewards(self.reward_weights), node_values("children"), compare[self.scale], edges_to_steps(self.share, zeros="skip")
        )
