"""DiffusionNFT: matching with a positive and a negative branch around the policy that sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from flowalign.core.algorithm import REFERENCE, Experience, Loss, OnePolicy, Rows, Update, Velocity, share_of
from flowalign.core.decays import Decay, constant, linear
from flowalign.core.matching import image_advantage, matching_rows, permuted_levels
from flowalign.core.matching_links import negative_aware
from flowalign.core.paths import interpolate
from flowalign.core.penalties import velocity_mse

OLD = "old"


@dataclass(frozen=True, kw_only=True)
class Config:
    """DiffusionNFT (Zheng et al., 2025).

    References:
        Zheng et al., "DiffusionNFT", 2025, https://arxiv.org/abs/2509.16117, and its released code (24af555).
        Deviations: the rollout follows the pipeline's Euler ODE, not a second-order one; one update for each minibatch of whole groups.

    Attributes:
        beta: Share of the new velocity in a branch; larger pulls harder towards the old policy.
        num_levels: Levels of the rollout's grid that every image is trained at, drawn for each without repetition; null for all but one.
        weighting: "adaptive" (released code) or "uniform".
        advantage_clip: Advantages are clipped to this size; it is what a certainly good image has.
        reference_penalty: Coefficient of the velocity's mean squared distance to the reference.
        old_rate: The old policy keeps ``min(old_max, old_rate * (n - old_start))`` of itself after step n; it samples.
        old_max: See ``old_rate``.
        old_start: See ``old_rate``; the published variants are (0.001, 0.5, 0) and (0.0075, 0.999, 75).
        num_epochs: Passes over the images of a rollout, with fresh levels and noise each.
        num_minibatches: Updates of a pass, each on its own groups.
    """

    beta: float = 1.0
    num_levels: int | None = None
    weighting: Literal["adaptive", "uniform"] = "adaptive"
    advantage_clip: float = 5.0
    reference_penalty: float = 1e-4
    old_rate: float = 0.001
    old_max: float = 0.5
    old_start: int = 0
    num_epochs: int = 1
    num_minibatches: int = 1

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if self.beta <= 0 or self.advantage_clip <= 0 or self.reference_penalty < 0:
            raise ValueError("beta and advantage_clip must be positive and reference_penalty not negative")
        if self.num_epochs < 1 or self.num_minibatches < 1:
            raise ValueError("num_epochs and num_minibatches must be at least 1")

    def build(self) -> DiffusionNFT:
        """Make the algorithm."""
        return DiffusionNFT(self)


@dataclass(frozen=True)
class DiffusionNFT(OnePolicy):
    """See ``Config``."""

    config: Config

    @property
    def behaviour(self) -> str:
        """Sample with the old policy."""
        return OLD

    @property
    def roles(self) -> Mapping[str, Decay]:
        """The old policy, and the reference where its penalty is not 0."""
        config = self.config
        old: dict[str, Decay] = {OLD: linear(config.old_rate, config.old_max, start=config.old_start)}
        return old | ({REFERENCE: constant(1.0)} if config.reference_penalty > 0 else {})

    def rows(self, experience: Experience, update: Update) -> Rows:
        """Lay out each image of the share at its own levels."""
        config, key = self.config, update.key(self.num_updates)
        chosen = share_of(experience, update, config.num_minibatches)
        num = max(1, len(experience.trajectory.sigmas) - 2) if config.num_levels is None else config.num_levels
        levels = permuted_levels(experience, update, chosen, num, key=key, purpose="nft")
        advantage = image_advantage(experience, chosen, "diffusion_nft", clip=config.advantage_clip)
        return matching_rows(experience, update, levels, advantage, chosen=chosen, key=key, purpose="nft")

    def loss(self, player: str, rows: Rows, velocity: Velocity) -> Loss:
        """Draw the two branches as the image's optimality says; every role sees the same noise and level."""
        config = self.config
        x = interpolate(rows["x0"], rows["noise"], rows["sigma"])
        with torch.no_grad():
            others = {role: velocity(x, rows["sigma"], rows.sample, role) for role in self.roles}
        prediction = velocity(x, rows["sigma"], rows.sample, player)
        optimality = (0.5 + rows["advantage"] / (2 * config.advantage_clip)).clamp(0, 1)
        value = negative_aware(
            prediction,
            others[OLD],
            x,
            rows["x0"],
            rows["noise"],
            rows["sigma"],
            optimality,
            beta=config.beta,
            scale=config.advantage_clip,
            weighting=config.weighting,
        )
        metrics = {"distance/old": velocity_mse(prediction, others[OLD]).detach()}
        if REFERENCE in others:
            distance = velocity_mse(prediction, others[REFERENCE])
            metrics["distance/reference"] = distance.detach()
            value = value + config.reference_penalty * distance
        return Loss(value=value, metrics=metrics)
