"""Flow-GRPO: group mean, standard deviation of all raw rewards of the batch, clipped."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.stages import broadcast_steps, center, clip, combine_rewards, scale_by_std


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = clip((r - mean_group) / (std_batch(r) + eps), +-5)``; easy and hard prompts keep their natural weight.

    References:
        Liu et al., "Flow-GRPO", 2025, https://arxiv.org/abs/2505.05470, and its released code with ``global_std`` (its default).
        The std is over the raw rewards of the batch, between-prompt spread included. Deviation: ids, not decoded prompt texts, make groups.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        eps: Added to the standard deviation.
        clip: Advantages are clipped to this size.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=False, scale=True, zero_mean=True, monotone=True, local=False, zero_when_flat=True
    )
    reward_weights: tuple[float, ...] | None = None
    eps: float = 1e-4
    clip: float = 5.0

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            center(),
            scale_by_std("batch", of="raw", ddof=0, eps=self.eps),
            clip(self.clip),
            broadcast_steps(),
        )
