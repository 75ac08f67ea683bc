"""Flow-GRPO: a policy gradient over the stochastic transitions of the sampler, clipped as in PPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from flowalign.core.algorithm import CURRENT, REFERENCE, Experience, Loss, Rows, Update, Velocity, share_of
from flowalign.core.decays import Decay, constant
from flowalign.core.kernels import CPS, DDIM, DanceSDE, FlowSDE, Kernel, gaussian_kl, gaussian_log_prob, reduce_event
from flowalign.core.links import bounded_ratio, clipped_mask, ppo_clip
from flowalign.core.penalties import scaled_kernel_kl
from flowalign.core.plans import Plan, chain

USUAL_NOISE: Mapping[str, float] = {"flow_sde": 0.7, "dance_sde": 0.3, "ddim": 1.0, "cps": 0.8}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flow-GRPO (Liu et al., 2025); DanceGRPO and CPS are the same with another kernel.

    Attributes:
        kernel: "flow_sde" (Flow-GRPO), "dance_sde" (DanceGRPO), "ddim" or "cps" (Flow-CPS).
        noise_level: The kernel's noise; null for what is usual: 0.7 for Flow-SDE, 0.3 (eta) for Dance, 1.0 (eta) for DDIM, 0.8 for CPS.
        link: "ppo_clip", or "bounded_ratio" for estimators that give ratios to reach (bpo, with eps_low and eps_high of the size of a clip).
        clip: PPO clip of the ratio of mean log-probs (a mean over latent elements: 1e-4 is a published value).
        advantage_clip: Advantages are clipped to this size.
        kl_penalty: Coefficient of the KL divergence to the reference, which is logged in the same unit.
        kl_unit: "gaussian" is the true Gaussian KL, a mean over elements; "scaled" multiplies it by the step's change of sigma, as the
            released code does (its 0.04 stands for about 0.004 of the true KL).
        log_prob: "gaussian" is the density; "unit" drops 1 / (2 std^2), as the released CPS code does.
        train_last: Train the last step too; for the kernels that have noise there, flow_sde and dance_sde.
        num_epochs: Passes over a rollout.
        num_minibatches: Updates of a pass, each on its own groups; released code: 2, so that the second is off-policy.
    """

    kernel: Literal["flow_sde", "dance_sde", "ddim", "cps"] = "flow_sde"
    noise_level: float | None = None
    link: Literal["ppo_clip", "bounded_ratio"] = "ppo_clip"
    clip: float = 1e-4
    advantage_clip: float = 5.0
    kl_penalty: float = 0.004
    kl_unit: Literal["gaussian", "scaled"] = "gaussian"
    log_prob: Literal["gaussian", "unit"] = "gaussian"
    train_last: bool = False
    num_epochs: int = 1
    num_minibatches: int = 2

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if self.noise_level is not None and self.noise_level <= 0:
            raise ValueError(f"noise_level: got {self.noise_level}, needed a positive value (without noise there is no log-prob; use awm)")
        if self.clip <= 0 or self.advantage_clip <= 0 or self.kl_penalty < 0:
            raise ValueError("clip and advantage_clip must be positive and kl_penalty not negative")
        if self.num_epochs < 1 or self.num_minibatches < 1:
            raise ValueError("num_epochs and num_minibatches must be at least 1")
        if self.train_last and self.kernel in ("ddim", "cps"):
            raise ValueError(f"train_last: the last step of {self.kernel} has no noise, so no log-prob; leave it false")

    def build(self) -> FlowGRPO:
        """Make the algorithm."""
        level = USUAL_NOISE[self.kernel] if self.noise_level is None else self.noise_level
        kernels: dict[str, Kernel] = {"flow_sde": FlowSDE(level), "dance_sde": DanceSDE(level), "ddim": DDIM(level), "cps": CPS(level)}
        return FlowGRPO(self, kernels[self.kernel])


@dataclass(frozen=True)
class FlowGRPO:
    """See ``Config``.

    References:
        Liu et al., "Flow-GRPO", 2025, https://arxiv.org/abs/2505.05470, equations 4 to 9, and its released code.
        Deviations: the KL is the true Gaussian KL unless asked otherwise; latents and log-probs are float32 throughout; minibatches are
        whole groups; the steps of an update are one batch, not one backward each with its own micro-batch statistics.
    """

    config: Config
    kernel: Kernel

    @property
    def players(self) -> tuple[str, ...]:
        """Train the current role alone."""
        return (CURRENT,)

    @property
    def num_updates(self) -> int:
        """Passes times minibatches."""
        return self.config.num_epochs * self.config.num_minibatches

    @property
    def roles(self) -> Mapping[str, Decay]:
        """The reference, where its penalty is not 0; the old policy's log-probs come from the rollout."""
        return {REFERENCE: constant(1.0)} if self.config.kl_penalty > 0 else {}

    def plan(self, step: int, num_steps: int) -> Plan:
        """Use the kernel at every step and train all but the last."""
        return chain(self.kernel, num_steps, train_last=self.config.train_last)

    def rows(self, experience: Experience, update: Update) -> Rows:
        """Lay out the transitions of the share, each with its sample's advantage."""
        transitions = experience.trajectory.transitions
        share = share_of(experience, update, self.config.num_minibatches)
        chosen = torch.isin(transitions.sample, share.to(transitions.sample)).nonzero().squeeze(1)
        taken = transitions.take(chosen)
        trained, column = torch.unique(taken.step, return_inverse=True)
        if experience.advantage.shape[1] not in (1, len(trained)):
            raise ValueError(
                f"advantage: got {experience.advantage.shape[1]} columns for {len(trained)} trained steps, needed 1 or as many as steps"
            )
        column = column if experience.advantage.shape[1] > 1 else torch.zeros_like(column)
        size = self.config.advantage_clip
        advantage = experience.advantage.to(taken.x.device)[taken.sample, column].clamp(-size, size)
        if (experience.target is not None) != (self.config.link == "bounded_ratio"):
            raise ValueError(
                f"algorithm.link: is {self.config.link}, but the estimator gives {'no ' if experience.target is None else ''}ratios to reach; "
                "bounded_ratio and an estimator such as bpo belong together, ppo_clip is for the others"
            )
        columns = {
            "x": taken.x,
            "x_next": taken.x_next,
            "mean": taken.mean,
            "std": taken.std,
            "sigma": taken.sigma,
            "sigma_next": taken.sigma_next,
            "advantage": advantage * experience.weight.to(advantage)[taken.sample, column],
        }
        if experience.target is not None:
            columns["target"] = experience.target.to(advantage)[taken.sample, column]
        return Rows(sample=taken.sample, columns=columns)

    def _log_prob(self, rows: Rows, mean: torch.Tensor) -> torch.Tensor:
        if self.config.log_prob == "unit":
            return -reduce_event((rows["x_next"] - mean).square(), "mean")
        return gaussian_log_prob(rows["x_next"], mean, rows["std"], reduction="mean")

    def loss(self, player: str, rows: Rows, velocity: Velocity) -> Loss:
        """Clip the ratio of the recorded transitions' mean log-probs and hold the mean near the reference's."""
        x, sigma, sigma_next = rows["x"], rows["sigma"], rows["sigma_next"]
        metrics = {}
        reference = None
        if REFERENCE in self.roles:
            with torch.no_grad():
                reference = self.kernel(x, velocity(x, sigma, rows.sample, REFERENCE), sigma, sigma_next).mean
        mean = self.kernel(x, velocity(x, sigma, rows.sample, player), sigma, sigma_next).mean
        log_ratio = self._log_prob(rows, mean) - self._log_prob(rows, rows["mean"])
        if self.config.link == "bounded_ratio":
            value = bounded_ratio(log_ratio, rows["target"], rows["advantage"])
        else:
            value = ppo_clip(log_ratio, rows["advantage"], clip=self.config.clip)
            metrics["clip_fraction"] = clipped_mask(log_ratio.detach(), rows["advantage"], clip=self.config.clip).to(value)
        metrics["ratio"] = log_ratio.detach().exp()
        metrics["ratio_gap"] = log_ratio.detach().abs()
        if reference is not None:
            if self.config.kl_unit == "scaled":
                divergence = scaled_kernel_kl(mean, reference, rows["std"], sigma, sigma_next, reduction="mean")
            else:
                divergence = gaussian_kl(mean, reference, rows["std"], reduction="mean")
            metrics["kl/reference"] = divergence.detach()
            value = value + self.config.kl_penalty * divergence
        return Loss(value=value, metrics=metrics)
