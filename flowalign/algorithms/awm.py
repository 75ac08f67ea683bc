"""AWM: advantage weighted matching. The flow-matching loss of the model's own samples, weighted by their advantages.

Any sampler will do, because only the final images are trained on. Each is noised to a few stratified levels and the network is drawn
towards (positive advantage) or away from (negative) the velocity that leads back to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowalign.core.algorithm import REFERENCE, Experience, Loss, OnePolicy, Rows, Update, Velocity, share_of
from flowalign.core.decays import Decay, constant, linear
from flowalign.core.kernels import FlowSDE
from flowalign.core.links import linear as linear_link
from flowalign.core.links import ppo_clip
from flowalign.core.matching import image_advantage, matching_rows, uniform_rows
from flowalign.core.paths import interpolate
from flowalign.core.penalties import velocity_mse
from flowalign.core.plans import Plan, chain, ode
from flowalign.core.randomness import uniform
from flowalign.core.schedules import shift_sigmas
from flowalign.core.surrogates import WEIGHTINGS, matching_score

SLOW = "ema"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Advantage weighted matching (Xue et al., 2025); the defaults are the released code's form.

    The paper's form is ``weighting: uniform, advantage_max: 5 (as advantage_clip, so that advantages are not scaled), reference_penalty: 0.4,
    slow_penalty: 0, levels: uniform, num_levels: 4``.

    Attributes:
        weighting: Weight of the matching error: "ghuber" (released code, p = 0.25), "uniform" (paper), "sigma", "sigma_squared" or "huber".
        num_levels: Noise levels that every image is trained at in an update, one from each stratum.
        levels: "discrete" takes levels of the rollout's grid, never pure noise (released code for GenEval and OCR, where it is called
            "discrete_wo_init"); "discrete_from_noise" may take pure noise too (for PickScore, "discrete" there); "uniform" draws from [lowest_level, 1].
        own_levels: Draw levels for each image, not one set for all images of an update (released code): a gradient that is averaged over levels has less
            noise.
        level_fraction: With levels of the grid: the share of the grid, from the noisy end, that levels are taken from.
        lowest_level: With "uniform": the lowest level before the shift.
        level_shift: With "uniform": shift of the levels that are drawn; 1 for none.
        advantage_clip: Advantages are clipped to this size: what a recipe leaves unbounded would leave the loss unbounded below ...
        advantage_max: ... and scaled so that the clip becomes this.
        reference_penalty: Coefficient of the velocity's mean squared distance to the reference.
        slow_penalty: Coefficient of the same distance to the slow copy (released code: 1; not in the paper).
        slow_rate: The slow copy's decay after step n is ``min(slow_max, slow_rate * n)``.
        slow_max: See ``slow_rate``.
        clip: PPO clip of the ratio against the slow copy; None trains on-policy, where the ratio is 1.
        ratio: With a clip: "exp_first" takes a ratio at each level, "sum_first" one of the levels' mean score.
        num_epochs: Passes over the images of a rollout, with fresh levels and noise each.
        num_minibatches: Updates of a pass, each on its own groups.
        noise_level: Noise of the rollout's Flow-SDE; 0 samples by the ODE.
    """

    weighting: Literal["uniform", "sigma", "sigma_squared", "huber", "ghuber"] = "ghuber"
    num_levels: int = 6
    levels: Literal["discrete", "discrete_from_noise", "uniform"] = "discrete"
    own_levels: bool = False
    level_fraction: float = 0.9
    lowest_level: float = 0.2
    level_shift: float = 1.0
    advantage_clip: float = 5.0
    advantage_max: float = 1.0
    reference_penalty: float = 0.001
    slow_penalty: float = 1.0
    slow_rate: float = 0.001
    slow_max: float = 0.3
    clip: float | None = None
    ratio: Literal["exp_first", "sum_first"] = "exp_first"
    num_epochs: int = 1
    num_minibatches: int = 1
    noise_level: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if self.num_levels < 1:
            raise ValueError(f"num_levels: got {self.num_levels}, needed at least 1")
        if min(self.reference_penalty, self.slow_penalty, self.noise_level) < 0:
            raise ValueError("reference_penalty, slow_penalty and noise_level must not be negative")
        if self.advantage_clip <= 0 or self.advantage_max <= 0 or self.level_shift <= 0:
            raise ValueError("advantage_clip, advantage_max and level_shift must be positive")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip: got {self.clip}, needed a positive number, or null for no ratio")
        if self.num_epochs < 1 or self.num_minibatches < 1:
            raise ValueError("num_epochs and num_minibatches must be at least 1")
        if not 0 < self.level_fraction <= 1 or not 0 <= self.lowest_level < 1:
            raise ValueError("level_fraction must lie in (0, 1] and lowest_level in [0, 1)")

    def build(self) -> AWM:
        """Make the algorithm."""
        return AWM(self)


def discrete_levels(sigmas: Tensor, num_levels: int, fraction: float, draws: list[float], *, first: int = 1) -> Tensor:
    """Choose one level of the grid from each of ``num_levels`` bins.

    Args:
        sigmas: The rollout's grid, ``[steps + 1]``, decreasing.
        num_levels: Number of bins.
        fraction: Share of the steps, from the noisy end, that the bins cover.
        draws: One uniform number in [0, 1) for each bin.
        first: Where the first bin begins; 1 leaves pure noise out.

    Returns:
        Levels ``[num_levels]``.

    Raises:
        ValueError: If the grid has fewer steps than bins.

    References:
        Released AWM code, "discrete_wo_init" (``first`` 1) and "discrete" (0): bin edges ``int(linspace(first, int(steps * fraction), num_levels + 1))``.
        Deviation: its grid begins at 0.999, ours at pure noise.

    Examples:
        >>> grid = torch.linspace(1, 0, 15)
        >>> (discrete_levels(grid, 6, 0.9, [0.0] * 6) - grid[[1, 2, 4, 6, 8, 10]]).abs().max().item() < 1e-6
        True
    """
    num_steps = len(sigmas) - 1
    edges = [int(edge) for edge in torch.linspace(first, int(num_steps * fraction), num_levels + 1, dtype=torch.float64).tolist()]
    if len(set(edges)) <= num_levels:
        raise ValueError(
            f"num_levels: {num_levels} levels do not fit into {int(num_steps * fraction) - first} usable steps of the rollout "
            f"(num_steps {num_steps}, level_fraction {fraction}); lower num_levels, raise num_steps or use levels: uniform"
        )
    pairs = zip(edges[:-1], edges[1:], draws, strict=True)
    return sigmas[torch.tensor([low + int(draw * (high - low)) for low, high, draw in pairs])]


@dataclass(frozen=True)
class AWM(OnePolicy):
    """See ``Config``.

    References:
        Xue et al., "Advantage Weighted Matching", 2025, https://arxiv.org/abs/2509.25050, Algorithm 1, and its released code (be51372).
        Deviations: levels are drawn for the whole update, not for each micro-batch; any pipeline sampler stands in for SA-Solver; no step
        is skipped at the start (their first two carry wrong groups).
    """

    config: Config

    @property
    def roles(self) -> Mapping[str, Decay]:
        """Only the roles whose penalty or ratio is used: none costs a pass for nothing."""
        roles: dict[str, Decay] = {}
        if self.config.reference_penalty > 0:
            roles[REFERENCE] = constant(1.0)
        if self.config.slow_penalty > 0 or self.config.clip is not None:
            roles[SLOW] = linear(self.config.slow_rate, self.config.slow_max)
        return roles

    def plan(self, step: int, num_steps: int, seed: int = 0) -> Plan:
        """Sample by the ODE, or by the Flow-SDE where noise is wanted; no transition is kept."""
        if self.config.noise_level == 0:
            return ode(num_steps)
        return chain(FlowSDE(self.config.noise_level), num_steps).without_training()

    def _levels(self, sigmas: Tensor, draws: list[float]) -> Tensor:
        config = self.config
        if config.levels != "uniform":
            first = 0 if config.levels == "discrete_from_noise" else 1
            return discrete_levels(sigmas, config.num_levels, config.level_fraction, draws, first=first)
        strata = torch.tensor([(i + draw) / config.num_levels for i, draw in enumerate(draws)])
        return shift_sigmas(config.lowest_level + (1 - config.lowest_level) * strata, config.level_shift)

    def rows(self, experience: Experience, update: Update) -> Rows:
        """Lay out each image of the share at each level, the levels of an image together; noise is keyed by level, prompt and sample."""
        config, key = self.config, update.key(self.num_updates)
        chosen = share_of(experience, update, config.num_minibatches)
        advantage = image_advantage(experience, chosen, "awm", clip=config.advantage_clip) / config.advantage_clip * config.advantage_max
        if config.own_levels:
            table = uniform_rows(config.num_levels, experience, update, chosen, key=key, purpose="awm levels")
            levels = torch.stack([self._levels(experience.trajectory.sigmas, row) for row in table.tolist()])
        else:
            draws = [uniform(seed=update.seed, purpose="awm level", step=key, stratum=i) for i in range(config.num_levels)]
            levels = self._levels(experience.trajectory.sigmas, draws)
        return matching_rows(experience, update, levels, advantage, chosen=chosen, key=key, purpose="awm")

    def loss(self, player: str, rows: Rows, velocity: Velocity) -> Loss:
        """Weigh the matching score by the advantage; every role sees the same noise and level."""
        config = self.config
        x0, noise, sigma, advantage = rows["x0"], rows["noise"], rows["sigma"], rows["advantage"]
        x = interpolate(x0, noise, sigma)
        with torch.no_grad():
            others = {role: velocity(x, sigma, rows.sample, role) for role in self.roles}
        prediction = velocity(x, sigma, rows.sample, player)
        weighting = WEIGHTINGS[config.weighting]
        score = matching_score(prediction, noise, x0, sigma, weighting=weighting)
        metrics = {"score": score.detach()}
        if config.clip is None:
            value = linear_link(score, advantage)
        else:
            log_ratio = score - matching_score(others[SLOW], noise, x0, sigma, weighting=weighting)
            if config.ratio == "sum_first":
                log_ratio = log_ratio.view(-1, rows.block).mean(1).repeat_interleave(rows.block)
            value = ppo_clip(log_ratio, advantage, clip=config.clip)
            metrics["ratio"] = log_ratio.detach().exp()
        for role, coefficient in ((REFERENCE, config.reference_penalty), (SLOW, config.slow_penalty)):
            if role in others:
                distance = velocity_mse(prediction, others[role])
                metrics[f"distance/{role}"] = distance.detach()
                value = value + coefficient * distance
        return Loss(value=value, metrics=metrics)
