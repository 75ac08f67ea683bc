"""Flow-DPPO: Flow-GRPO whose trust region is the exact KL of each step instead of a clip of the ratio."""

from __future__ import annotations

from dataclasses import dataclass

from flowalign.core.plans import chain
from flowalign.core.policy import PolicyConfig, PolicyGradient
from flowalign.core.ratio_links import KLMask


@dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig):
    """Flow-DPPO (2026); its region bounds the divergence itself, so several passes over a rollout (``num_epochs``) are fine.

    References:
        "Flow-DPPO", 2026, https://arxiv.org/abs/2606.11025: rows with ``A (ratio - 1) > 0`` and ``KL > delta`` are left alone.
        Deviation: no KL to the reference unless asked for (``kl_penalty``). The KL of the region is a mean over latent elements, as the published deltas 1e-5 to 1e-7 suppose.

    Attributes:
        delta: Largest KL of a step to the old policy in the direction of the advantage, a mean over latent elements.
    """

    kl_penalty: float = 0.0
    delta: float = 1e-6

    def build(self) -> PolicyGradient:
        """Make the algorithm."""
        kernel = self.built_kernel()
        return PolicyGradient(
            config=self, kernel=kernel, plan_of=lambda step, num_steps, seed: chain(kernel, num_steps), link=KLMask(delta=self.delta)
        )
