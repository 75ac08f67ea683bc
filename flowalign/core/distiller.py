"""What DMD2 and f-distill share: their rows, what several networks make of them, and the players' losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowalign.core.adversarial import approximate_r1, discriminator_loss, generator_loss
from flowalign.core.algorithm import CURRENT, REFERENCE, Loss, Rows, Update, Velocity, sample_number
from flowalign.core.decays import Decay, constant
from flowalign.core.distillation import DISCRIMINATOR, FAKE, TEACHER, Levels, Pairs, Settings, State
from flowalign.core.distribution_matching import dmd_scale, guidance_direction, matching_direction, pseudo_huber, push, regress
from flowalign.core.matching import uniform_rows
from flowalign.core.paths import interpolate, velocity_to_x0
from flowalign.core.plans import Plan, ode
from flowalign.core.randomness import normal, uniform
from flowalign.core.ratios import Reduce, bins_of, quantile_edges


@dataclass(frozen=True)
class Distiller:
    """Everything of DMD2 and f-distill but the weights.

    A step has ``critic_updates`` updates of the critics and then one of the student, each on samples and noise of its own. In a
    warm-up all of them are the student's.
    """

    config: Any  # a Settings; frozen dataclasses of algorithms narrow it

    @property
    def judges(self) -> bool:
        """Whether there is a discriminator: a student that ignores it needs none."""
        return bool(self.config.adversarial_weight > 0)

    @property
    def weighs_batch(self) -> bool:
        """Whether weights are of the whole batch."""
        return False

    @property
    def weighs_guidance(self) -> bool:
        """Whether a sample's weight holds for the part that the teacher's guidance adds."""
        return False

    @property
    def behaviour(self) -> str:
        """The student samples."""
        return CURRENT

    @property
    def num_updates(self) -> int:
        """The critics', and one of the student."""
        return int(self.config.critic_updates) + 1

    @property
    def roles(self) -> Mapping[str, Decay]:
        """The teacher, which stays; nothing follows the student."""
        return {REFERENCE: constant(1.0)}

    def plan(self, step: int, num_steps: int, seed: int = 0) -> Plan:
        """Sample by the ODE."""
        return ode(num_steps)

    def _is_warmup(self, update: Update) -> bool:
        return update.step < self.config.warmup_steps

    def _is_critics(self, update: Update) -> bool:
        return update.index < self.config.critic_updates

    def turns(self, update: Update, *, ready: bool) -> tuple[str, ...]:
        """The student in a warm-up; else the critics, and at the end of the step the student, if it may."""
        if self._is_warmup(update):
            return (CURRENT,)
        if self._is_critics(update):
            return (FAKE, DISCRIMINATOR) if self.judges else (FAKE,)
        return (CURRENT,) if ready else ()

    def learning_rate(self, update: Update, usual: float) -> float:
        """In a warm-up its own, where it has one, moving linearly to the usual one: what a large rate leaves unsettled costs more than it gained."""
        own: float | None = self.config.warmup_learning_rate
        if own is None or not self._is_warmup(update):
            return usual
        return own + (usual - own) * update.key(self.num_updates) / (self.config.warmup_steps * self.num_updates)

    def start(self) -> State:
        """Nothing is remembered."""
        return {}

    def is_ready(self, state: State, held_back: int) -> bool:
        """Let the student begin after the critics' own steps."""
        return bool(held_back >= self.config.warmup_steps + self.config.least_steps)

    # -- rows ---------------------------------------------------------------------------------------------------------------------

    def rows(self, experience: Pairs, update: Update) -> Rows:
        """Lay out the update's share: pairs in a warm-up, else fresh noise for the student, a rung, and a noise level to compare at."""
        config, key = self.config, update.key(self.num_updates)
        chosen = (experience.share == update.index).nonzero().squeeze(1)
        device, event = experience.x0.device, experience.x0.shape[1:]
        sample = chosen.to(device)
        sigmas = experience.sigmas.to(experience.x0)
        x0 = experience.x0[sample]
        path = {"sigmas": sigmas.expand(len(chosen), -1), "finish": torch.full((len(chosen),), experience.finish).to(x0)}
        if self._is_warmup(update):
            first = torch.zeros(len(chosen), dtype=torch.int64, device=device)
            columns = {"first": experience.noise[sample] * experience.spread, "rung": first, "target": x0}
            return Rows(sample=sample, columns=columns | path)
        samples = sample_number(experience.group[chosen], experience.sample[chosen])

        def drawn(purpose: str) -> Tensor:
            noise = normal(event, seed=update.seed, purpose=purpose, step=key, prompts=experience.prompt[chosen], samples=samples)
            return noise.to(experience.x0)

        def level(levels: Levels, purpose: str) -> Tensor:
            return levels.of(uniform_rows(1, experience, update, chosen, key=key, purpose=purpose).flatten()).to(experience.x0)

        rung = int(uniform(seed=update.seed, purpose="student rung", step=key) * (len(sigmas) - 1))
        columns = {
            "first": drawn("student noise") * experience.spread,
            "noise": drawn("matching noise"),
            "sigma": level(config.levels, "matching level"),
            "rung": torch.full((len(chosen),), rung, device=device),
            **path,
        }
        if not self._is_critics(update):
            return Rows(sample=sample, columns=columns | {"student": torch.ones_like(columns["sigma"])})
        if config.fake.levels is not None:
            columns["fake_sigma"] = level(config.fake.levels, "fake level")
        if self.judges:
            columns["real"] = x0
            if config.discriminator.r1 > 0:
                columns["disturbance"] = drawn("r1 noise")
        return Rows(sample=sample, columns=columns)

    # -- networks -----------------------------------------------------------------------------------------------------------------

    def generate(self, rows: Rows, velocity: Velocity) -> Tensor:
        """Run the student to the rows' rung without gradient, and let it finish from there in one step.

        The steps are Euler's on the pipeline's own grid, to its end and into its own coordinates, so that at the last rung the result is what a
        pipeline of K steps decodes ("backward simulation" of DMD2).
        """
        x, sigmas, rung = rows["first"], rows["sigmas"][0], int(rows["rung"][0])
        for step in range(rung):
            with torch.no_grad():
                moved = velocity(x, rows["sigmas"][:, step], rows.sample, CURRENT)
            x = x + (sigmas[step + 1] - sigmas[step]) * moved
        last = x + (sigmas[-1] - sigmas[rung]) * velocity(x, rows["sigmas"][:, rung], rows.sample, CURRENT)
        return last * _column(rows["finish"], last)

    def look(self, rows: Rows, velocity: Velocity) -> Rows:
        """Let the student generate; for its own update ask teacher, fake score and discriminator what they make of it.

        Where gradients are on, the student's pass is kept for its loss, so that it is made once.
        """
        if "target" in rows.columns:
            return rows
        if "student" not in rows.columns:
            with torch.no_grad():
                return replace(rows, columns={**rows.columns, "x0": self.generate(rows, velocity)})
        x0 = self.generate(rows, velocity)
        x, sigma = interpolate(x0, rows["noise"], rows["sigma"]), rows["sigma"]
        columns = {**rows.columns, "x0": x0}
        seen = x if self.judges else x.detach()
        teacher = velocity(seen, sigma, rows.sample, REFERENCE).detach()
        if self.judges:
            columns["logits"] = velocity(x, sigma, rows.sample, DISCRIMINATOR)
        x = x.detach()
        with torch.no_grad():
            fake = velocity_to_x0(velocity(x, sigma, rows.sample, FAKE), x, sigma)
            own = velocity_to_x0(teacher, x, sigma)
            guided = own
            if self.config.guidance_scale > 1:
                # Of the very same latents, so that the conditional half need not be computed again.
                guided = velocity_to_x0(velocity(seen, sigma, rows.sample, TEACHER), x, sigma)
                columns["guidance"] = guidance_direction(own, guided)
            columns["matching"] = matching_direction(fake, own)
            columns["scale"] = dmd_scale(x0, guided)
            columns["whole"] = (torch.isfinite(own) & torch.isfinite(guided)).flatten(1).all(1).to(sigma)
        return replace(rows, columns=columns)

    def broken(self, rows: Rows) -> dict[str, bool]:
        """Tell whose output is not finite, of what ``look`` added; in the order of blame, for one makes the next one so."""
        # What the teacher says is in all that follows: the fake score is compared with it, and its blocks are what the discriminator reads.
        by = {CURRENT: "x0", TEACHER: "whole", DISCRIMINATOR: "logits", FAKE: "matching"}
        told = {player: name in rows.columns and not bool(torch.isfinite(rows[name]).all()) for player, name in by.items()}
        return told | {TEACHER: "whole" in rows.columns and not bool(rows["whole"].all())}

    def weigh(self, parts: Sequence[Rows], state: State, reduce: Reduce) -> tuple[list[Rows], State, dict[str, float]]:
        """Weigh every sample alike."""
        if "student" not in parts[0].columns:
            return list(parts), state, {}
        ones = [replace(part, columns={**part.columns, "weight": torch.ones_like(part["scale"])}) for part in parts]
        return ones, state, {}

    # -- losses -------------------------------------------------------------------------------------------------------------------

    def loss(self, player: str, rows: Rows, velocity: Velocity) -> Loss:
        """Return a player's loss of its update's rows."""
        if player == FAKE:
            return self._fake_loss(rows, velocity)
        if player == DISCRIMINATOR:
            return self._discriminator_loss(rows, velocity)
        if "target" in rows.columns:
            made = self.generate(rows, velocity)
            return Loss(value=pseudo_huber(made, rows["target"]), metrics={"pair_error": regress(made, rows["target"]).detach()})
        return self._student_loss(rows, velocity)

    def _fake_loss(self, rows: Rows, velocity: Velocity) -> Loss:
        """Match the velocity of the student's own samples: plain flow matching."""
        sigma = rows["fake_sigma" if "fake_sigma" in rows.columns else "sigma"]
        x = interpolate(rows["x0"], rows["noise"], sigma)
        value = regress(velocity(x, sigma, rows.sample, FAKE), rows["noise"] - rows["x0"])
        return Loss(value=value, metrics={f"{FAKE}/error": value.detach()})

    def _discriminator_loss(self, rows: Rows, velocity: Velocity) -> Loss:
        """Tell the teacher's samples from the student's, noised to the same level by the same noise."""
        settings, sigma = self.config.discriminator, rows["sigma"]
        kinds = [interpolate(rows[name], rows["noise"], sigma) for name in ("real", "x0")]
        if settings.r1 > 0:
            kinds.append(kinds[0] + settings.r1_noise * rows["disturbance"])
        num = len(kinds)
        logits = velocity(torch.cat(kinds), sigma.repeat(num), rows.sample.repeat(num), DISCRIMINATOR).chunk(num)
        real, made = discriminator_loss(logits[0], logits[1])
        value = real + made
        right = ((logits[0] > 0).float() + (logits[1] < 0).float()).mean(1).detach() / 2
        metrics = {f"{DISCRIMINATOR}/accuracy": right}
        quarter = bins_of(sigma.cpu(), level_edges(self.config, _QUARTERS)).to(sigma.device)
        for number in range(_QUARTERS):
            metrics[f"{DISCRIMINATOR}/accuracy_{number}"] = torch.where(quarter == number, right, torch.nan)
        if settings.r1 > 0:
            penalty = approximate_r1(logits[0], logits[2])
            value = value + settings.r1 * penalty
            metrics[f"{DISCRIMINATOR}/r1"] = penalty.detach()
        return Loss(value=value, metrics=metrics)

    def _student_loss(self, rows: Rows, velocity: Velocity) -> Loss:
        """Push samples from where the fake score sees them to where the teacher does, and towards what the discriminator holds for real."""
        kept = rows["x0"].requires_grad
        x0 = rows["x0"] if kept else self.generate(rows, velocity)
        weight = _column(rows["weight"], x0)
        direction = rows["matching"] * weight
        if "guidance" in rows.columns:
            direction = direction + rows["guidance"] * (weight if self.weighs_guidance else 1)
        value = push(x0, direction, rows["scale"])
        metrics = {"push": (rows["matching"].square().flatten(1).mean(1).sqrt() * rows["scale"]).detach()}
        if self.judges:
            logits = rows["logits"]
            if not kept:
                x = interpolate(x0, rows["noise"], rows["sigma"])
                logits = velocity(x, rows["sigma"], rows.sample, DISCRIMINATOR)
            adversarial = generator_loss(logits)
            metrics["adversarial"] = adversarial.detach()
            value = value + self.config.adversarial_weight * adversarial
        return Loss(value=value, metrics=metrics)


def level_edges(config: Settings, num_bins: int) -> Tensor:
    """Return the edges of bins that hold equal shares of the noise levels that are drawn."""
    share = (torch.arange(_EDGE_DRAWS, dtype=torch.float64) + 0.5) / _EDGE_DRAWS
    return quantile_edges(config.levels.of(share), num_bins)


_EDGE_DRAWS, _QUARTERS = 1024, 4


def _column(weight: Tensor, like: Tensor) -> Tensor:
    return weight.to(like).reshape(-1, *[1] * (like.ndim - 1))
