"""TempFlow-GRPO: one noisy step at a time. Children fork off a deterministic path and are compared where they forked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flowalign.core.plans import Compare, fork
from flowalign.core.policy import PolicyConfig, PolicyGradient
from flowalign.core.ratio_links import PPOClip
from flowalign.core.step_weights import noise_aware, uniform


@dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig):
    """TempFlow-GRPO (He et al., 2025): ``train.group_size`` initial noises of a prompt, ``num_children`` images of each at each step.

    References:
        He et al., "TempFlow-GRPO", 2025, https://arxiv.org/abs/2508.04324, equations 5 to 8, and its released code.
        Deviations: the children of a state share one evaluation in training too, with the gradient of repeating it; groups are taken
        over all processes; the step weight is computed from the plan and not a constant. Published: 4 noises x 6 children; use it with
        an estimator that divides by the std of the group, such as grpo.

    Attributes:
        clip: PPO clip of the ratio of mean log-probs (a mean over latent elements: 1e-4 is a published value).
        num_children: Children of the path at each of its steps but the last.
        compare: A child's group: "state" (same prompt, initial noise and step), "step" (same prompt and step), or "prompt".
        step_weight: "noise" weighs a step by its std over the mean std of the trained steps; "uniform" does not.
    """

    clip: float = 1e-4
    num_children: int = 6
    compare: Compare = "state"
    step_weight: Literal["noise", "uniform"] = "noise"

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        super().__post_init__()
        PPOClip(clip=self.clip)  # refuses a band without extent
        if self.num_children < 2 and self.compare == "state":
            raise ValueError(
                f"num_children: got {self.num_children}; the children of a state are compared with each other, so needed at least 2 "
                "(for 1, compare: step, or algorithm flow_grpo)"
            )

    def build(self) -> PolicyGradient:
        """Make the algorithm."""
        kernel = self.built_kernel()
        return PolicyGradient(
            config=self,
            kernel=kernel,
            plan_of=lambda step, num_steps, seed: fork(kernel, num_steps, num_children=self.num_children, compare=self.compare),
            link=PPOClip(clip=self.clip),
            step_weight=noise_aware if self.step_weight == "noise" else uniform,
        )
