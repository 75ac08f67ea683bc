"""Pareto: learn from the front that an image lies on."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.compare import keep_front, pareto_rank
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.scale import scale_by_std


@dataclass(frozen=True, kw_only=True)
class Config:
    """GRPO on minus the rank of the non-dominated front within the group.

    With four rewards or more hardly anything is dominated: set ``box``. ``select="front"`` trains only on the front of the whole batch.

    References:
        Deb et al., NSGA-II, 2002, https://doi.org/10.1109/4235.996017, for the ranks; Lee et al., "Parrot", 2024,
        https://arxiv.org/abs/2401.05675, for the selection. Deviation: ranks are centred and scaled within the group.

    Attributes:
        reward_weights: 1 for rewards that count and 0 for those that are only logged; None for all.
        box: Rewards are compared in steps of this size.
        select: Train on all samples, or on those that no other of the batch dominates.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=True, zero_mean=True, monotone=True, local=True, zero_when_flat=True, num_rewards=2
    )
    reward_weights: tuple[float, ...] | None = None
    box: float = 0.0
    select: Literal["all", "front"] = "all"
    eps: float = 1e-4
    ddof: int = 0

    def build(self) -> Estimator:
        """Compose the stages."""
        keep = [keep_front(box=self.box, rewards=self.reward_weights)] if self.select == "front" else []
        return chain(
            pareto_rank(box=self.box, rewards=self.reward_weights),
            center(),
            scale_by_std(ddof=self.ddof, eps=self.eps),
            keep,
            broadcast_steps(),
        )
