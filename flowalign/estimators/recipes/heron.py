"""HERON: rewards in order of importance, without weights."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.compare import hierarchy
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.scale import scale_by_std


@dataclass(frozen=True, kw_only=True)
class Config:
    """GRPO on ``(wins - losses) / (K - 1)``; of two images the first reward that differs by its margin decides.

    For example strict GenEval before OCR before PickScore before aesthetics. With margins above 0 the comparison is not transitive.

    References:
        Bukharin et al., "Deep Reinforcement Learning from Hierarchical Preference Design", 2023, https://arxiv.org/abs/2309.02632.
        Deviations: comparisons within the group instead of a reward model trained on them; each level has its own margin (the code reuses the
        second for levels three and four).

    Attributes:
        reward_weights: 1 for rewards that count and 0 for those that are only logged; None for all.
        order: Columns of the rewards, most important first; None for the order in which they come.
        margins: In standard deviations of the reward within the group; one for all or one per level.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=True, zero_mean=True, monotone=True, local=True, zero_when_flat=True, num_rewards=2
    )
    reward_weights: tuple[float, ...] | None = None
    order: tuple[int, ...] | None = None
    margins: float | tuple[float, ...] = 0.0
    eps: float = 1e-4
    ddof: int = 1

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            hierarchy(self.order, margins=self.margins, rewards=self.reward_weights),
            center(),
            scale_by_std(ddof=self.ddof, eps=self.eps),
            broadcast_steps(),
        )
