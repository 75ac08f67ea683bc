"""Flow-GRPO: a policy gradient over the stochastic transitions of the sampler, clipped as in PPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flowalign.core.plans import chain, tree
from flowalign.core.policy import PolicyConfig, PolicyGradient
from flowalign.core.ratio_links import BoundedRatio, PPOClip


@dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig):
    """Flow-GRPO (Liu et al., 2025); DanceGRPO and CPS are the same with another kernel, BranchGRPO the same with a tree.

    DanceGRPO's released code further trains a random 60 % of the steps, gives a group one initial noise and divides by a std with ddof 1; here all steps
    but the last are trained and noises differ.

    References:
        Liu et al., "Flow-GRPO", 2025, https://arxiv.org/abs/2505.05470, equations 4 to 9, and its released code.
        Deviations: the KL is the true Gaussian KL unless asked otherwise; latents and log-probs are float32 throughout; minibatches are
        whole groups; the steps of an update are one batch, not one backward each with its own micro-batch statistics.

    Attributes:
        clip: PPO clip of the ratio of mean log-probs (a mean over latent elements: 1e-4 is a published value).
        link: "ppo_clip", or "bounded_ratio" for estimators that give ratios to reach (bpo, with eps_low and eps_high of the size of a clip).
        train_last: Train the last step too; for the kernels that have noise there, flow_sde and dance_sde.
        depths: Steps at which every state splits, for estimators over trees (branch_grpo and others); none for a chain.
        num_children: Children of a state where it splits; ``train.group_size`` counts initial states, each with
            ``num_children ** len(depths)`` images.
    """

    clip: float = 1e-4
    link: Literal["ppo_clip", "bounded_ratio"] = "ppo_clip"
    train_last: bool = False
    depths: tuple[int, ...] = ()
    num_children: int = 2

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        super().__post_init__()
        PPOClip(clip=self.clip)  # refuses a band without extent
        if self.num_children < 2 and self.depths:
            raise ValueError(f"num_children: got {self.num_children}, needed at least 2 where states split")
        if self.num_children != 2 and not self.depths:
            raise ValueError(f"num_children: got {self.num_children}, but nothing splits; name the steps with depths, or leave it out")
        if self.train_last and (self.kernel in ("ddim", "cps") or self.depths):
            raise ValueError(f"train_last: the last step of {self.kernel} has no noise, or of a tree is not trained; leave it false")

    def build(self) -> PolicyGradient:
        """Make the algorithm."""
        kernel = self.built_kernel()
        return PolicyGradient(
            config=self,
            kernel=kernel,
            plan_of=lambda step, num_steps, seed: (
                tree(kernel, num_steps, depths=self.depths, num_children=self.num_children)
                if self.depths
                else chain(kernel, num_steps, train_last=self.train_last)
            ),
            link=PPOClip(clip=self.clip) if self.link == "ppo_clip" else BoundedRatio(),
        )
