"""GBPO: regress the ratio on a bounded target around the median."""

from dataclasses import dataclass
from typing import ClassVar

from flowalign.estimators.baseline import center
from flowalign.estimators.calibrate import target_ratio
from flowalign.estimators.chain import Estimator, chain
from flowalign.estimators.claims import Claims
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.scale import scale_by_std


@dataclass(frozen=True, kw_only=True)
class Config:
    """``A = (r - mean_group) / (std_group + eps)``, target ``1 - eps_low + (eps_low + eps_high) sigmoid(t)``.

    ``t = (r - median_group) / (std_group + eps) / temperature``; the loss is ``|ratio - target| |A|``. Choose ``eps_low`` and ``eps_high``
    like a clip range, near 1e-3 where log-probs are means over latent dimensions; otherwise the target is out of reach.

    References:
        "Bounded Ratio Reinforcement Learning", 2026, released code (``core_algos.py``, ddof 1, eps 1e-6). Deviation: flat groups and groups
        of one have the target 1; the median of an even group is the midpoint.

    Attributes:
        reward_weights: One weight for each reward; None for 1 each.
        eps_low: How far below 1 the target may be.
        eps_high: How far above 1.
        temperature: Of the target.
        eps: Added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation.
    """

    claims: ClassVar[Claims] = Claims(
        shift=True, shift_per_group=True, scale=True, zero_mean=True, monotone=True, local=True, zero_when_flat=True
    )
    reward_weights: tuple[float, ...] | None = None
    eps_low: float = 0.2
    eps_high: float = 0.2
    temperature: float = 1.0
    eps: float = 1e-6
    ddof: int = 1

    def build(self) -> Estimator:
        """Compose the stages."""
        return chain(
            combine_rewards(self.reward_weights),
            center(),
            scale_by_std(ddof=self.ddof, eps=self.eps),
            target_ratio(self.eps_low, self.eps_high, temperature=self.temperature, ddof=self.ddof, eps=self.eps),
            broadcast_steps(),
        )
