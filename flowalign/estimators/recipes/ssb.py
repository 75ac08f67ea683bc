"""SSB: GRPO that remembers the samples it could learn from."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.replay import remember
from flowalign.estimators.scale import scale_by_std
from flowalign.estimators.weigh import keep_contrast


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A`` of ``grpo`` without flat groups; samples with ``A != 0`` go into a buffer, drawn with probability proportional to ``|A|**alpha``.

    Replay is nearly free for objectives that need only the image (AWM, DiffusionNFT); others must have stored the latents. See ``replay.draw``.

    References:
        "Skywork R1V2", 2025, https://arxiv.org/abs/2504.16656; the drawing rule is that of VL-Rethinker,
        https://arxiv.org/abs/2504.08837. Deviations: a bound on the age; the buffer holds ids, the trainer the samples.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        capacity: Samples that are remembered.
        max_age: Steps for which they are.
        alpha: Exponent of the priority.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=True, zero_mean=True, monotone=True, local=True, zero_when_flat=True, filters=True
    )
    reward_weights: tuple[float, ...] | None = None
    capacity: int = 1024
    max_age: int = 3
    alpha: float = 1.0
    eps: float = 1e-4
    ddof: int = 0

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            keep_contrast(),
            center(),
            scale_by_std(ddof=self.ddof, eps=self.eps),
            remember(self.capacity, max_age=self.max_age, alpha=self.alpha),
            broadcast_steps(),
        )
