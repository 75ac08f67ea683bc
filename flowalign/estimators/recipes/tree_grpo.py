"""Tree-GRPO: GRPO over the prompt plus GRPO over the tree."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.trees import Share, compare_in_groups_and_trees, share_steps


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = (r - mean_group) / (std_group + eps) + (r - mean_tree) / (std_tree + eps)``.

    References:
        Ji et al., "Tree Search for LLM Agent Reinforcement Learning", 2025, https://arxiv.org/abs/2509.21240: intra-tree plus inter-tree; ddof 1 and
        eps 1e-6 as in its released code. A tree is what has one root; a prompt should have several, or both terms are the same.
        Deviations: a tree of one sample adds 0 (the code: its raw reward). Steps that n samples share weigh 1 / n each (``share``).

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        eps: Added to both standard deviations.
        ddof: Delta degrees of freedom of both.
        share: How copies of a shared step are weighed.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=True, zero_mean=False, monotone=False, local=True, zero_when_flat=True, needs=("tree",)
    )
    reward_weights: tuple[float, ...] | None = None
    eps: float = 1e-6
    ddof: int = 1
    share: Share = "mean"

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            compare_in_groups_and_trees(ddof=self.ddof, eps=self.eps),
            broadcast_steps(),
            share_steps(self.share),
        )
