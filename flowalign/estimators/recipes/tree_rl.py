"""TreeRL: each edge gets its node's value and what it gained over the parent's."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from flowalign.estimators.baseline import leave_one_out
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.trees import Share, add_gain, edges_to_steps, node_values


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A(edge) = (V + (V - V(parent))) / sqrt(leaves below)``, V the mean over the leaves of ``r - mean of the prompt's other leaves``.

    References:
        Hou et al., "TreeRL", 2025, https://arxiv.org/abs/2506.11902: global plus local advantage, reweighted.
        Deviations: the paper's form, as summaries quote it. The released code divides values by the root before it takes the difference, and
        subtracts a mean weighted by token counts, which has no counterpart where edges own steps. Copies of a shared edge all count
        (``share="each"``), because the root of the number of leaves is already in the advantage.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        divide: By the root of the number of leaves, or not.
        share: How copies of a shared edge are weighed.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=False, zero_mean=False, monotone=False, local=True, zero_when_flat=True, needs=("tree",)
    )
    reward_weights: tuple[float, ...] | None = None
    divide: Literal["sqrt_leaves", "none"] = "sqrt_leaves"
    share: Share = "each"

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            leave_one_out(),
            node_values("leaves"),
            add_gain(divide=self.divide),
            edges_to_steps(self.share),
        )
