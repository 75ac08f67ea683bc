"""MixGRPO: Flow-GRPO in a window that moves along the schedule as training goes on; the ODE elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flowalign.core.plans import progressive_start
from flowalign.core.policy import PolicyConfig, PolicyGradient, windowed
from flowalign.core.randomness import uniform
from flowalign.core.ratio_links import PPOClip


@dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig):
    """MixGRPO (Li et al., 2025); use it with the estimator mix_grpo, which adds up rewards after normalising each.

    References:
        Li et al., "MixGRPO", 2025, https://arxiv.org/abs/2507.21802: windows of 4, moved by 1 every 25 steps, 12 samples of one initial noise.
        Deviations: the window stays whole up to the last step but one, and then begins anew (the released scheduler keeps it below step
        ``num_steps - 2``, one earlier, and lets it shrink to nothing there); samples of one noise share what comes before the window (the code samples it for each), and by default every
        sample has its own noise (``num_children`` 1 and ``train.group_size`` samples; published: 12 of one noise).

    Attributes:
        clip: PPO clip of the ratio of mean log-probs, a mean over latent elements.
        strategy: "progressive" moves the window along and back to the start, "random" draws it anew each step, "fixed" leaves it at the start.
        window: Number of steps with noise.
        every: Training steps between moves.
        stride: Steps of a move.
        num_children: Samples of an initial noise, which part where the window begins; ``train.group_size`` counts initial noises.
    """

    kl_penalty: float = 0.0
    clip: float = 1e-4
    strategy: Literal["progressive", "random", "fixed"] = "progressive"
    window: int = 4
    every: int = 25
    stride: int = 1
    num_children: int = 1

    def place(self, step: int, num_steps: int, seed: int) -> int:
        """Return where the window begins; the last step of the schedule is never in it.

        Raises:
            ValueError: If it does not fit.
        """
        first = progressive_start(step, size=self.window, limit=num_steps - 1, every=self.every, stride=self.stride)
        if self.strategy == "random":
            return int((num_steps - self.window) * uniform(seed=seed, purpose="window", step=step))
        return first if self.strategy == "progressive" else 0

    def build(self) -> PolicyGradient:
        """Make the algorithm."""
        return windowed(self, self.place, size=self.window, num_children=self.num_children, link=PPOClip(clip=self.clip))
