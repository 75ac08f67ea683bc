"""SPO-chain: each step gets the change of value that it made."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.credit import chain_differences
from flowalign.estimators.scale import scale_by_std


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A_t = (V(x_(t + 1)) - V(x_t)) / (std_batch + eps)``; the last step leads to the final reward.

    References:
        Guo et al., "Segment Policy Optimization", 2025, https://arxiv.org/abs/2505.23564: chain-based advantages.
        Deviations: ``step_rewards`` holds ``V``, the reward of a deterministic completion from the state that a step starts from, or the
        mean over several; NaN between cut points, and then the segment is credited as a whole. The released code whitens over the
        batch; here differences are divided by the batch std but their mean stays, so that flat samples keep 0. In place of the
        mask over probable tokens, give a ``step_mask`` without the steps whose noise is negligible.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        scale: Divide by the standard deviation over the batch, or leave the differences as they are.
        eps: Added to the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True,
        shift_per_group=True,
        scale=True,
        zero_mean=False,
        monotone=False,
        local=False,
        zero_when_flat=True,
        needs=("step_rewards",),
    )
    reward_weights: tuple[float, ...] | None = None
    scale: Literal["batch", "none"] = "batch"
    eps: float = 1e-8

    def build(self) -> Estimator:
        """Compose the stages."""
        scale = [scale_by_std("batch", of="residual", ddof=1, eps=self.eps)] if self.scale == "batch" else []
        return chain(chain_differences(self.reward_weights), scale)
