"""Policy gradients over recorded transitions: one composition of plan, kernel, link, step weight and penalty for a whole family.

The rows of an update are pairs of a trained transition and a final state that it leads to. All rows that start from the same state share
one evaluation of the network: the gradient is that of evaluating it for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from flowalign.core.algorithm import REFERENCE, Experience, Loss, OnePolicy, Rows, Update, Velocity, share_of
from flowalign.core.decays import Decay, constant
from flowalign.core.gaussians import gaussian_kl, gaussian_log_prob, reduce_event
from flowalign.core.kernels import CPS, DDIM, DanceSDE, FlowSDE, Kernel
from flowalign.core.penalties import scaled_kernel_kl
from flowalign.core.plans import Plan, window
from flowalign.core.ratio_links import RatioLink, RatioRows
from flowalign.core.step_weights import StepWeight, uniform

KernelName: TypeAlias = Literal["flow_sde", "dance_sde", "ddim", "cps"]
PlanOf: TypeAlias = Callable[[int, int, int], Plan]
"""From training step, number of steps and the run's seed to a plan."""

_KERNELS: Mapping[str, Callable[[float], Kernel]] = {"flow_sde": FlowSDE, "dance_sde": DanceSDE, "ddim": DDIM, "cps": CPS}
USUAL_NOISE: Mapping[str, float] = {"flow_sde": 0.7, "dance_sde": 0.3, "ddim": 1.0, "cps": 0.8}


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What every policy gradient over transitions can be told; algorithms add to it and change defaults.

    Attributes:
        kernel: "flow_sde" (Flow-GRPO), "dance_sde" (DanceGRPO), "ddim" or "cps" (Flow-CPS).
        noise_level: The kernel's noise; null for what is usual: 0.7 for Flow-SDE, 0.3 (eta) for Dance, 1.0 (eta) for DDIM, 0.8 for CPS.
        kl_penalty: Coefficient of the KL divergence to the reference, which is logged in the same unit.
        kl_unit: "gaussian" is the true Gaussian KL, a mean over elements; "scaled" multiplies it by the step's change of sigma, as the
            released code of Flow-GRPO does (its 0.04 stands for about 0.004 of the true KL).
        log_prob: "gaussian" is the density; "unit" drops 1 / (2 std^2), as the released CPS code does.
        num_epochs: Passes over a rollout.
        num_minibatches: Updates of a pass, each on its own groups; released code: 2, so that the second is off-policy.
    """

    kernel: KernelName = "flow_sde"
    noise_level: float | None = None
    kl_penalty: float = 0.004
    kl_unit: Literal["gaussian", "scaled"] = "gaussian"
    log_prob: Literal["gaussian", "unit"] = "gaussian"
    num_epochs: int = 1
    num_minibatches: int = 2

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if self.noise_level is not None and self.noise_level <= 0:
            raise ValueError(f"noise_level: got {self.noise_level}, needed a positive value (without noise there is no log-prob; use awm)")
        if self.kl_penalty < 0:
            raise ValueError(f"kl_penalty: got {self.kl_penalty}, needed at least 0")
        if self.num_epochs < 1 or self.num_minibatches < 1:
            raise ValueError("num_epochs and num_minibatches must be at least 1")

    def built_kernel(self) -> Kernel:
        """Make the kernel."""
        level = USUAL_NOISE[self.kernel] if self.noise_level is None else self.noise_level
        return _KERNELS[self.kernel](level)


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(OnePolicy):
    """A policy gradient over the stochastic transitions of the sampler.

    Attributes:
        config: Sizes and coefficients.
        kernel: Kernel of the trained transitions.
        plan_of: Makes the plan of a rollout.
        link: From ratio and advantage to the loss of a row.
        step_weight: How much each trained step counts.
    """

    config: PolicyConfig
    kernel: Kernel
    plan_of: PlanOf
    link: RatioLink
    step_weight: StepWeight = uniform

    @property
    def roles(self) -> Mapping[str, Decay]:
        """The reference, where its penalty is not 0; the old policy's log-probs come from the rollout."""
        return {REFERENCE: constant(1.0)} if self.config.kl_penalty > 0 else {}

    def plan(self, step: int, num_steps: int, seed: int = 0) -> Plan:
        """Make the plan of a rollout.

        Raises:
            ValueError: If it trains no transition.
        """
        made = self.plan_of(step, num_steps, seed)
        if not made.trained:
            raise ValueError(f"plan: trains none of its {num_steps} steps, so there is no log-prob to follow; use awm, which needs none")
        return made

    def rows(self, experience: Experience, update: Update) -> Rows:
        """Lay out the transitions that lead to the share's final states, each with the advantage of its final state at its step."""
        table = experience.trajectory.transitions
        transition, leaf = table.leaves()
        share = torch.isin(leaf, share_of(experience, update, self.config.num_minibatches).to(leaf))
        transition, leaf = transition[share], leaf[share]
        trained, column = torch.unique(table.step, return_inverse=True)
        if experience.advantage.shape[1] not in (1, len(trained)):
            raise ValueError(
                f"advantage: got {experience.advantage.shape[1]} columns for {len(trained)} trained steps, needed 1 or as many as steps"
            )
        if (experience.target is not None) != self.link.reaches_target:
            raise ValueError(
                f"algorithm.link: is {self.link.name}, but the estimator gives {'no ' if experience.target is None else ''}ratios to reach; "
                "bounded_ratio and an estimator such as bpo belong together, ppo_clip is for the others"
            )
        place = column[transition] if experience.advantage.shape[1] > 1 else torch.zeros_like(leaf)
        first = _first_rows(column, len(trained))
        weight = self.step_weight(table.std[first], table.sigma[first], table.sigma_next[first])
        advantage = experience.advantage.to(table.x.device)[leaf, place]
        names = ("x", "x_next", "mean", "std", "sigma", "sigma_next")
        columns = {name: vars(table)[name][transition] for name in names}
        columns["advantage"] = advantage * experience.weight.to(advantage)[leaf, place] * weight.to(advantage)[column[transition]]
        if experience.target is not None:
            columns["target"] = experience.target.to(advantage)[leaf, place]
        return Rows(sample=leaf, columns=columns, state=table.state[transition])

    def _log_prob(self, rows: Rows, mean: Tensor) -> Tensor:
        if self.config.log_prob == "unit":
            return -reduce_event((rows["x_next"] - mean).square(), "mean")
        return gaussian_log_prob(rows["x_next"], mean, rows["std"], reduction="mean")

    def loss(self, player: str, rows: Rows, velocity: Velocity) -> Loss:
        """Link the ratio of the recorded transitions' mean log-probs to the advantage, and hold the mean near the reference's."""
        first, which = rows.states()

        def mean_of(role: str) -> Tensor:
            x, sigma, sigma_next = rows["x"][first], rows["sigma"][first], rows["sigma_next"][first]
            return self.kernel(x, velocity(x, sigma, rows.sample[first], role), sigma, sigma_next).mean[which]

        reference = None
        if REFERENCE in self.roles:
            with torch.no_grad():
                reference = mean_of(REFERENCE)
        mean = mean_of(player)
        log_ratio = self._log_prob(rows, mean) - self._log_prob(rows, rows["mean"])
        value, metrics = self.link(RatioRows(log_ratio=log_ratio, mean=mean, table=rows))
        metrics = {**metrics, "ratio": log_ratio.detach().exp(), "ratio_gap": log_ratio.detach().abs()}
        if reference is not None:
            divergence = self._divergence(rows, mean, reference)
            metrics["kl/reference"] = divergence.detach()
            value = value + self.config.kl_penalty * divergence
        return Loss(value=value, metrics=metrics)

    def _divergence(self, rows: Rows, mean: Tensor, reference: Tensor) -> Tensor:
        if self.config.kl_unit == "scaled":
            return scaled_kernel_kl(mean, reference, rows["std"], rows["sigma"], rows["sigma_next"], reduction="mean")
        return gaussian_kl(mean, reference, rows["std"], reduction="mean")


def windowed(
    config: PolicyConfig, place: Callable[[int, int, int], int], *, size: int, num_children: int, link: RatioLink
) -> PolicyGradient:
    """Make a policy gradient in a window of steps, with the ODE outside.

    Args:
        config: Sizes and coefficients.
        place: From training step, number of steps and the run's seed to where the window begins.
        size: Steps in the window.
        num_children: Samples of an initial noise, which part where the window begins.
        link: From ratio and advantage to the loss of a row.
    """
    kernel = config.built_kernel()

    def plan(step: int, num_steps: int, seed: int) -> Plan:
        return window(kernel, num_steps, start=place(step, num_steps, seed), size=size, num_children=num_children)

    return PolicyGradient(config=config, kernel=kernel, plan_of=plan, link=link)


def _first_rows(column: Tensor, num: int) -> Tensor:
    """Return a row of each column; std and levels are the same for all rows of a step."""
    found = column.new_zeros(num)
    found[column] = torch.arange(len(column), device=column.device)
    return found
