"""Flow-GRPO: a policy gradient over the stochastic transitions of the sampler, clipped as in PPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from flowalign.core.plans import Plan, chain, tree
from flowalign.core.policy import PolicyConfig, PolicyGradient
from flowalign.core.randomness import generator
from flowalign.core.ratio_links import BoundedRatio, PPOClip


@dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig):
    """Flow-GRPO (Liu et al., 2025); DanceGRPO and CPS are the same with another kernel, BranchGRPO the same with a tree.

    DanceGRPO's released code further trains a random 60 % of the steps (see ``num_trained``), gives a group one initial noise and divides by a std with
    ddof 1; here noises differ.

    References:
        Liu et al., "Flow-GRPO", 2025, https://arxiv.org/abs/2505.05470, equations 4 to 9, and its released code.
        Deviations: the KL is the true Gaussian KL unless asked otherwise; latents and log-probs are float32 throughout; minibatches are
        whole groups; the steps of an update are one batch, not one backward each with its own micro-batch statistics.

    Attributes:
        clip: PPO clip of the ratio of mean log-probs (a mean over latent elements: 1e-4 is a published value).
        link: "ppo_clip", or "bounded_ratio" for estimators that give ratios to reach (bpo, with eps_low and eps_high of the size of a clip).
        num_trained: Number of steps that are trained, drawn at random anew for each rollout; null for all but the last. All steps have noise. Released
            DanceGRPO draws for each sample; here all samples of a rollout share the draw.
        train_last: Train the last step too; for the kernels that have noise there, flow_sde and dance_sde.
        depths: Steps at which every state splits, for estimators over trees (branch_grpo and others); none for a chain.
        num_children: Children of a state where it splits; ``train.group_size`` counts initial states, each with
            ``num_children ** len(depths)`` images.
    """

    clip: float = 1e-4
    link: Literal["ppo_clip", "bounded_ratio"] = "ppo_clip"
    num_trained: int | None = None
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
        if self.num_trained is not None and (self.num_trained < 1 or self.depths):
            raise ValueError(
                f"num_trained: got {self.num_trained}, needed at least 1 step of a chain, or null (a tree trains all but the last)"
            )
        if self.train_last and (self.kernel in ("ddim", "cps") or self.depths):
            raise ValueError(f"train_last: the last step of {self.kernel} has no noise, or of a tree is not trained; leave it false")

    def build(self) -> PolicyGradient:
        """Make the algorithm."""
        return PolicyGradient(
            config=self,
            kernel=self.built_kernel(),
            plan_of=self._plan,
            link=PPOClip(clip=self.clip) if self.link == "ppo_clip" else BoundedRatio(),
        )

    def _plan(self, step: int, num_steps: int, seed: int) -> Plan:
        kernel = self.built_kernel()
        if self.depths:
            return tree(kernel, num_steps, depths=self.depths, num_children=self.num_children)
        if self.num_trained is None:
            return chain(kernel, num_steps, train_last=self.train_last)
        possible = num_steps if self.train_last else num_steps - 1
        if self.num_trained > possible:
            raise ValueError(f"num_trained: got {self.num_trained}, needed at most {possible} of {num_steps} steps")
        drawn = torch.randperm(possible, generator=generator(seed, "trained steps", step))[: self.num_trained]
        return chain(kernel, num_steps, train_last=self.train_last, trained=drawn.tolist())
