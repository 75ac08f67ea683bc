"""DGPO: matching weighted by the advantage and by how little a group already prefers its good images. Groups are learnt as wholes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from flowalign.core.algorithm import REFERENCE, Experience, Loss, OnePolicy, Rows, Update, Velocity, sample_number, share_of
from flowalign.core.decays import Decay, constant, linear
from flowalign.core.matching import image_advantage
from flowalign.core.matching_links import group_sigmoid, matching_mask
from flowalign.core.paths import interpolate
from flowalign.core.penalties import velocity_mse
from flowalign.core.randomness import normal
from flowalign.core.surrogates import WEIGHTINGS, matching_score

OLD, SLOW = "old", "ema"


@dataclass(frozen=True, kw_only=True)
class Config:
    """DGPO (Luo et al., 2025); one process, because a loss compares a whole group.

    References:
        Luo et al., "DGPO", 2025, https://arxiv.org/abs/2510.08425, and its released code (01ceb4b).
        Deviations: the preference is against the base or against the slow copy throughout (the code changes from one to the other after 200
        or 500 steps); any ODE sampler stands in for DPM-Solver.

    Attributes:
        beta: Temperature of the group's sigmoid (released: 100; 10 for PickScore).
        num_levels: Levels of the rollout's grid that a group is trained at, the same noise and level for all its images.
        level_fraction: Levels are drawn from this share of the grid, from the noisy end.
        against: What the preference is measured against: "reference", or "ema", a slow copy.
        clip: Images whose matching error has changed this far since the rollout, in the advantage's direction, are left alone.
        reference_penalty: Coefficient of the velocity's mean squared distance to the reference.
        slow_rate: The slow copy's decay after step n is ``min(slow_max, slow_rate * n)``.
        slow_max: See ``slow_rate``.
        num_epochs: Passes over the images of a rollout, with fresh levels and noise each.
        num_minibatches: Updates of a pass, each on its own groups.
    """

    beta: float = 100.0
    num_levels: int = 4
    level_fraction: float = 0.6
    against: Literal["reference", "ema"] = "reference"
    clip: float = 1e-2
    reference_penalty: float = 0.02
    slow_rate: float = 0.001
    slow_max: float = 0.3
    num_epochs: int = 1
    num_minibatches: int = 1

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if min(self.beta, self.clip) <= 0 or self.reference_penalty < 0 or not 0 < self.level_fraction <= 1:
            raise ValueError("beta and clip must be positive, reference_penalty not negative and level_fraction in (0, 1]")
        if min(self.num_levels, self.num_epochs, self.num_minibatches) < 1:
            raise ValueError("num_levels, num_epochs and num_minibatches must be at least 1")

    def build(self) -> DGPO:
        """Make the algorithm."""
        return DGPO(self)


@dataclass(frozen=True)
class DGPO(OnePolicy):
    """See ``Config``."""

    config: Config

    @property
    def roles(self) -> Mapping[str, Decay]:
        """What the preference is against, the reference if it is penalised, and the policy of the rollout if it is left behind."""
        config = self.config
        roles: dict[str, Decay] = {}
        if config.against == "reference" or config.reference_penalty > 0:
            roles[REFERENCE] = constant(1.0)
        if config.against == "ema":
            roles[SLOW] = linear(config.slow_rate, config.slow_max)
        return roles | ({OLD: constant(0.0)} if self.num_updates > 1 else {})

    def rows(self, experience: Experience, update: Update) -> Rows:
        """Lay out each group at its own levels, the images of a group at a level together; they share level and noise."""
        config, key = self.config, update.key(self.num_updates)
        chosen = share_of(experience, update, config.num_minibatches)
        chosen = chosen[torch.argsort(experience.group[chosen], stable=True)]
        groups, sizes = torch.unique(experience.group[chosen], return_counts=True)
        if len(torch.unique(sizes)) > 1:
            raise ValueError(f"dgpo: got groups of {sorted(set(sizes.tolist()))} images, needed equal ones")
        members, each = int(sizes[0]), config.num_levels
        prompts, numbers = experience.prompt[chosen][::members], sample_number(groups, torch.zeros_like(groups))
        x0 = experience.trajectory.x0[chosen].view(len(groups), 1, members, *experience.trajectory.x0.shape[1:])

        def keyed(shape: tuple[int, ...], purpose: str) -> torch.Tensor:
            return normal(shape, seed=update.seed, purpose=purpose, step=key, prompts=prompts, samples=numbers)

        sigmas = experience.trajectory.sigmas[:-1]
        usable = sigmas[: max(1, int(len(sigmas) * config.level_fraction))]
        if each > len(usable):
            raise ValueError(
                f"num_levels: {each} levels do not fit into the {len(usable)} first steps of the rollout; lower it, or raise level_fraction"
            )
        sigma = usable[keyed((len(usable),), "dgpo levels").argsort(1)[:, :each].to(sigmas.device)]
        noise = torch.stack([keyed(x0.shape[3:], f"dgpo noise {level}") for level in range(each)], 1)[:, :, None].to(x0.device)
        advantage = image_advantage(experience, chosen, "dgpo").view(len(groups), 1, members)
        columns = {
            "x0": x0.expand(-1, each, -1, *x0.shape[3:]).flatten(0, 2),
            "noise": noise.expand(-1, -1, members, *x0.shape[3:]).flatten(0, 2),
            "sigma": sigma.to(x0)[..., None].expand(-1, -1, members).flatten(),
            "advantage": advantage.to(x0).expand(-1, each, -1).flatten(),
        }
        sample = chosen.view(len(groups), 1, members).expand(-1, each, -1).flatten()
        return Rows(sample=sample.to(x0.device), columns=columns, block=members, is_grouped=True)

    def loss(self, player: str, rows: Rows, velocity: Velocity) -> Loss:
        """Weigh each group's matching errors by one sigmoid; every role sees the same noise and level."""
        config = self.config
        x = interpolate(rows["x0"], rows["noise"], rows["sigma"])

        def error(prediction: torch.Tensor) -> torch.Tensor:
            return -matching_score(prediction, rows["noise"], rows["x0"], rows["sigma"], weighting=WEIGHTINGS["uniform"])

        with torch.no_grad():
            others = {role: velocity(x, rows["sigma"], rows.sample, role) for role in self.roles}
        prediction = velocity(x, rows["sigma"], rows.sample, player)
        now, reference = error(prediction), error(others[SLOW if config.against == "ema" else REFERENCE])
        value = group_sigmoid(now, reference, rows["advantage"], members=rows.block, beta=config.beta)
        metrics = {"preference": (rows["advantage"] * (reference - now)).detach()}
        if OLD in others:
            beyond = matching_mask(now, error(others[OLD]), rows["advantage"], clip=config.clip)
            value = torch.where(beyond, value.detach(), value)
            metrics["clip_fraction"] = beyond.to(value)
        if config.reference_penalty > 0:
            distance = velocity_mse(prediction, others[REFERENCE])
            metrics["distance/reference"] = distance.detach()
            value = value + config.reference_penalty * distance
        return Loss(value=value, metrics=metrics)
