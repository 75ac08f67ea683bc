"""Trust-GRPO: a learned reward helps a verifiable one as far as it can be trusted."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.scale import scale_by_std
from flowalign.estimators.shape import trust_gate


@dataclass(frozen=True, kw_only=True)
class Config:
    """GRPO on ``o + scale exp(-step / decay_steps) gamma think``; the rewards are ``(o, think)``, both in [0, 1].

    ``gamma = exp(mean think of the right - of the wrong)`` where failures of a group score higher than passes, else 1: a detector of reward
    hacking per prompt. Groups that are all right or all wrong get ``o`` alone.

    References:
        Fan et al., "SophiaVL-R1", 2025, https://arxiv.org/abs/2505.17018, and its released code. Deviation: failures are
        scored too; the code gives them think = 0, so that gamma is always 1 for binary rewards.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        scale: Factor of the learned reward.
        decay_steps: Steps after which it has fallen by e.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=False,
        shift_per_group=False,
        scale=False,
        zero_mean=True,
        monotone=True,
        local=True,
        zero_when_flat=True,
        domain="unit",
        num_rewards=2,
    )
    reward_weights: tuple[float, ...] | None = None
    scale: float = 0.3
    decay_steps: float = 500.0
    eps: float = 1e-4
    ddof: int = 1

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            trust_gate(self.reward_weights, scale=self.scale, decay_steps=self.decay_steps),
            center(),
            scale_by_std(ddof=self.ddof, eps=self.eps),
            broadcast_steps(),
        )
