"""AC-Flow: matching weighted by what an image was worth beyond what a critic saw coming in its noised state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from flowalign.core.algorithm import (
    CURRENT,
    FEATURES,
    REFERENCE,
    WINDOW,
    Experience,
    Loss,
    NeverReady,
    OnePolicy,
    Rows,
    Update,
    Velocity,
    share_of,
)
from flowalign.core.decays import Decay, constant
from flowalign.core.heads import Evidence, Head
from flowalign.core.matching import image_advantage, matching_rows, permuted_levels
from flowalign.core.paths import interpolate
from flowalign.core.penalties import velocity_mse
from flowalign.core.surrogates import WEIGHTINGS, matching_score

CRITIC = "critic"


@dataclass(frozen=True, kw_only=True)
class Config:
    """AC-Flow (2025), in its spirit: the paper leaves sizes, schedules and the weight open, and no code is public.

    What was chosen:

    - The shaped reward R of an image is what the estimator makes of it (normalised within its prompt, clipped).
    - The critic V(x, sigma, prompt) is a small perceptron on the frozen base's features of the noised image; it regresses R on the very rows
      that the policy is trained on, after the policy has used them: a critic that had learnt an image would take its signal away. With several
      epochs the later ones come back to images, under other noise, that it has learnt.
    - Deviation: these rows are re-noised images, not the rollout's own intermediate states. On the states of a deterministic sampler the end is a
      function of the state, and a good critic would leave no advantage at all.
    - The advantage of a row is R - V, clipped; its weight is the advantage itself (signed), or an exponential of it (positive). Where the signed
      weight lies below minus the penalty's coefficient the loss of that row is not bounded below, as in AWM; only its mean over an exact
      critic's rows vanishes.
    - The policy begins to move once the critic has explained some of the variance of R, beyond doubt, on samples that it had not seen: over the last
      steps, at least ``least_steps`` of them, by three standard errors. From then on it goes on.

    References:
        "AC-Flow", 2025, https://arxiv.org/abs/2510.18072 (abstract and project page): intermediate feedback, clipped advantages, critic warm-up,
        generalised critic weighting, Wasserstein penalty. The exponential weight and the penalty are those of Fan et al., "Online
        Reward-Weighted Fine-Tuning of Flow Matching with Wasserstein Regularization", 2025, https://arxiv.org/abs/2502.06061.

    Attributes:
        weight: "linear" or "exponential".
        temperature: With "exponential": weights are ``exp(temperature * advantage)``, which tilts the data law by ``exp(temperature * R)`` where V = 0.
        advantage_clip: Shaped rewards and advantages are clipped to this size.
        num_levels: Levels of the rollout's grid that every image is trained at, drawn for each without repetition.
        wasserstein_penalty: Coefficient of the velocity's mean squared distance to the reference.
        critic: Size and rate of the critic.
        critic_updates: Updates of the critic for each of the policy.
        least_steps: Steps that the critic learns alone, at least; 0 lets the policy move at once, whatever the critic knows.
        least_explained: Share of the variance that the critic must explain for the policy to begin.
        patience: The run stops with an error if the policy was held back for this many steps.
        num_epochs: Passes over the images of a rollout, with fresh levels and noise each.
        num_minibatches: Updates of a pass, each on its own groups.
    """

    weight: Literal["linear", "exponential"] = "linear"
    temperature: float = 1.0
    advantage_clip: float = 5.0
    num_levels: int = 3
    wasserstein_penalty: float = 0.1
    critic: Head = field(default_factory=Head)
    critic_updates: int = 1
    least_steps: int = 10
    least_explained: float = 0.0
    patience: int = 50
    num_epochs: int = 1
    num_minibatches: int = 1

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if self.advantage_clip <= 0 or self.temperature <= 0 or self.wasserstein_penalty < 0:
            raise ValueError("advantage_clip and temperature must be positive and wasserstein_penalty not negative")
        if not self.least_explained < 1:
            raise ValueError(f"least_explained: got {self.least_explained}, needed less than 1: no critic explains everything")
        if not 0 <= self.least_steps <= min(WINDOW, self.patience):
            raise ValueError(
                f"least_steps: got {self.least_steps}, needed 0 to {min(WINDOW, self.patience)} (evidence is of {WINDOW} steps, patience {self.patience})"
            )
        if min(self.num_levels, self.critic_updates, self.patience, self.num_epochs, self.num_minibatches) < 1:
            raise ValueError("num_levels, critic_updates, patience, num_epochs and num_minibatches must be at least 1")

    def build(self) -> ACFlow:
        """Make the algorithm."""
        return ACFlow(self)


@dataclass(frozen=True)
class ACFlow(OnePolicy):
    """See ``Config``."""

    config: Config

    def turns(self, update: Update, *, ready: bool) -> tuple[str, ...]:
        """The policy first: its baseline must not have learnt the rows that it is trained on."""
        return (CURRENT,) * ready + (CRITIC,) * self.config.critic_updates

    @property
    def heads(self) -> Mapping[str, Head]:
        """The critic."""
        return {CRITIC: self.config.critic}

    @property
    def roles(self) -> Mapping[str, Decay]:
        """The reference: the penalty's, and the critic's eyes."""
        return {REFERENCE: constant(1.0)}

    def is_ready(self, evidence: Mapping[str, Evidence], held_back: int) -> bool:
        """Let the policy begin once the critic has explained enough of what it had not seen.

        Raises:
            NeverReady: If it was held back for ``patience`` steps.
        """
        config, seen = self.config, evidence[CRITIC]
        if config.least_steps == 0 or (len(seen) >= config.least_steps and seen.is_better_than(config.least_explained)):
            return True
        if held_back >= config.patience:
            raise NeverReady(
                f"ac_flow: in {held_back} steps the critic has not shown that it explains more than {config.least_explained:g} of the variance of "
                f"rewards that it had not seen (over the last {len(seen)}: {seen.explained():.3f}), so the policy never moved; begin a run in another "
                "folder with a higher critic.learning_rate or more train.groups, or with awm, which needs no critic"
            )
        return False

    def look(self, rows: Rows, velocity: Velocity) -> Rows:
        """Add the base's features of the noised images, and its velocity where it is penalised: one pass for both."""
        x = interpolate(rows["x0"], rows["noise"], rows["sigma"])
        columns = dict(rows.columns)
        if self.config.wasserstein_penalty > 0:
            columns["reference"] = velocity(x, rows["sigma"], rows.sample, REFERENCE)
        columns["features"] = velocity(x, rows["sigma"], rows.sample, FEATURES)
        return replace(rows, columns=columns)

    def rows(self, experience: Experience, update: Update) -> Rows:
        """Lay out each image of the share at its own levels; critic and policy see the same rows."""
        config, key = self.config, update.key(self.num_updates)
        chosen = share_of(experience, update, config.num_minibatches)
        levels = permuted_levels(experience, update, chosen, config.num_levels, key=key, purpose="ac_flow")
        shaped = image_advantage(experience, chosen, "ac_flow", clip=config.advantage_clip)
        rows = matching_rows(experience, update, levels, shaped, chosen=chosen, key=key, purpose="ac_flow")
        # In later epochs the critic has learnt these images: what it says of them then is no evidence.
        fresh = torch.full_like(rows["sigma"], float(update.index < config.num_minibatches))
        return replace(rows, columns={**rows.columns, "fresh": fresh})

    def loss(self, player: str, rows: Rows, velocity: Velocity) -> Loss:
        """Regress the critic, or weigh the matching error by what it did not see coming."""
        sigma, shaped = rows["sigma"], rows["advantage"]
        if player == CRITIC:
            error = (velocity(rows["features"], sigma, rows.sample, CRITIC) - shaped).square()
            told = {"error": error.detach(), "target": shaped, "square": shaped.square()}
            return Loss(
                value=error, metrics={f"critic/{name}": torch.where(rows["fresh"] > 0, value, torch.nan) for name, value in told.items()}
            )
        config = self.config
        with torch.no_grad():
            value = velocity(rows["features"], sigma, rows.sample, CRITIC)
        advantage = (shaped - value).clamp(-config.advantage_clip, config.advantage_clip)
        weight = torch.exp(config.temperature * advantage) if config.weight == "exponential" else advantage
        x = interpolate(rows["x0"], rows["noise"], sigma)
        prediction = velocity(x, sigma, rows.sample, player)
        score = matching_score(prediction, rows["noise"], rows["x0"], sigma, weighting=WEIGHTINGS["uniform"])
        loss, metrics = -weight * score, {"score": score.detach(), "policy_advantage": advantage.abs()}
        if config.wasserstein_penalty > 0:
            distance = velocity_mse(prediction, rows["reference"])
            metrics["distance/reference"] = distance.detach()
            loss = loss + config.wasserstein_penalty * distance
        return Loss(value=loss, metrics=metrics)
