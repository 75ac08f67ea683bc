"""Flow-GRPO-Fast: Flow-GRPO with noise, storage and training in a random window of early steps; the ODE elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from flowalign.core.policy import KernelName, PolicyConfig, PolicyGradient, windowed
from flowalign.core.randomness import uniform
from flowalign.core.ratio_links import PPOClip


@dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig):
    """Flow-GRPO-Fast, as in Flow-GRPO's released code.

    References:
        Liu et al., "Flow-GRPO", 2025, https://arxiv.org/abs/2505.05470, released code: windows of 3 of the first 5 of 10 steps, CPS 0.8.
        Deviations: one window for each training step and all processes, drawn by the run's seed (the code: for each batch and process; its
        first version drew the same one at every step); CPS's log-prob is the density unless ``log_prob: unit`` says otherwise.

    Attributes:
        clip: PPO clip of the ratio of mean log-probs (a mean over latent elements; 1e-5 is the published value).
        window: Number of steps with noise.
        first: The window lies at or after this step ...
        limit: ... and below this one; null for half of the steps.
        num_children: Samples of an initial noise, which part where the window begins; ``train.group_size`` counts initial noises.
    """

    kernel: KernelName = "cps"
    kl_penalty: float = 0.0
    clip: float = 1e-5
    window: int = 3
    first: int = 0
    limit: int | None = None
    num_children: int = 1

    def place(self, step: int, num_steps: int, seed: int) -> int:
        """Draw where the window begins.

        Raises:
            ValueError: If it does not fit.
        """
        limit = num_steps // 2 if self.limit is None else self.limit
        places = limit - self.window - self.first + 1
        if limit == num_steps and self.kernel in ("cps", "ddim"):
            raise ValueError(
                f"limit: got {limit} of {num_steps} steps, but {self.kernel} has no noise in the last one; lower limit, or use flow_sde"
            )
        if self.window < 1 or self.first < 0 or places < 1 or limit > num_steps:
            raise ValueError(
                f"window: {self.window} steps do not fit between step {self.first} and step {limit} of {num_steps} (lower window, or raise limit "
                "or the number of steps)"
            )
        return self.first + int(places * uniform(seed=seed, purpose="window", step=step))

    def build(self) -> PolicyGradient:
        """Make the algorithm."""
        return windowed(self, self.place, size=self.window, num_children=self.num_children, link=PPOClip(clip=self.clip))
