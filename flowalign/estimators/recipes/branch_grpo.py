"""BranchGRPO: values of nodes, normalised among all nodes of the same depth."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.scale import scale_by_std
from flowalign.estimators.trees import Average, Share, edges_to_steps, node_values


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A(edge) = (V - mean_depth) / (std_depth + eps)``, over a prompt's nodes of equal depth; V the mean over the leaves below.

    References:
        Li et al., "BranchGRPO", 2025, https://arxiv.org/abs/2509.06040: depth-wise advantages; ddof 1 and eps 1e-8 as in its released code.
        The paper fuses rewards by path probability: ``average="softmax"``, with mean log-probs (of summed ones the softmax is an argmax).
        Deviations: flat depths are found by their range (the code: std below 1e-6). Pruning is a ``step_mask`` or a tree without the edge.
        An edge above n samples is trained once (``share``).

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        average: How a node's value comes from what is below it.
        temperature: Of the softmax.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
        share: How copies of a shared edge are weighed.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=True, zero_mean=False, monotone=False, local=True, zero_when_flat=True, needs=("tree",)
    )
    reward_weights: tuple[float, ...] | None = None
    average: Average = "leaves"
    temperature: float = 1.0
    eps: float = 1e-8
    ddof: int = 1
    share: Share = "mean"

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            node_values(self.average, temperature=self.temperature),
            center("depth"),
            scale_by_std("depth", ddof=self.ddof, eps=self.eps),
            edges_to_steps(self.share),
        )
