"""The tables that an estimator may ask for besides rewards; each is made only if it does."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from flowalign.core.paths import velocity_to_x0
from flowalign.core.plans import Plan, ode
from flowalign.core.rollout import Trajectory
from flowalign.train.protocols import Pipeline
from flowalign.train.scoring import NamedReward, score

StepRewards = Literal["completion", "prediction"]
NOVELTY = "novelty"
_FEATURES = 8  # pixels of the small image that novelty is measured on


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What a step's rollout left on this rank.

    Shapes:
        images: ``[batch, 3, h, w]`` in [0, 1].
    """

    cond: Any
    plan: Plan
    trajectory: Trajectory
    images: Tensor
    prompts: list[str]
    metadata: list[dict[str, Any]]


def check_needs(needs: Collection[str], plan: Plan, num_metrics: int) -> None:
    """Refuse an estimator that needs what a run cannot give, before the run begins.

    Args:
        needs: ``Estimator.needs``.
        plan: How the algorithm samples.
        num_metrics: Number of metrics that the run measures.

    Raises:
        ValueError: Says what is missing and how to mend it.
    """
    mend = "choose an algorithm that trains the noisy steps of its sampler, such as flow_grpo"
    for table in sorted({"log_prob", "step_rewards"} & set(needs)):
        if not plan.trained:
            raise ValueError(f"advantage: needs {table} of trained steps, but the algorithm trains final images alone; {mend}")
    if "baseline" in needs and all(step.kernel.is_deterministic for step in plan.steps):
        raise ValueError(
            "advantage: needs the ODE sample from the same noise as a baseline, but the algorithm samples by the ODE itself; " + mend
        )
    if "metric" in needs and not num_metrics:
        raise ValueError(f"advantage: needs a metric, but the run has none; add `metrics: [{NOVELTY}]` or `metrics: [{{reward: ...}}]`")
    if "step_judge" in needs:
        raise ValueError(
            "advantage: needs a judge's reward for each step, and training has only values of the states that steps start from; "
            "choose a recipe that takes their differences, such as spo_chain or turning_point"
        )
    for table in sorted({"anchor_id", "tree"} & set(needs)):
        raise ValueError(f"advantage: needs {table}, which only a rollout that forks has; choose another recipe")


def extra_tables(
    needs: Collection[str],
    pipeline: Pipeline,
    rewards: Sequence[NamedReward],
    sampled: Sampled,
    *,
    batch_size: int,
    step_rewards: StepRewards,
) -> dict[str, Tensor]:
    """Make the tables of this rank's samples that an estimator needs besides rewards and metrics.

    Args:
        needs: ``Estimator.needs``.
        pipeline: Samples and decodes under the current weights.
        rewards: What scores baselines and steps.
        sampled: The rollout.
        batch_size: Samples of one call of the pipeline.
        step_rewards: "completion" scores the ODE's image from the state that each trained step starts from, as TurningPoint-GRPO and SPO do;
            it costs half the steps of a rollout for each trained step. "prediction" scores the clean image that the network predicts there,
            which costs no pass.

    Returns:
        ``log_prob`` ``[batch, T]``, ``baseline`` ``[batch, R]`` and ``step_rewards`` ``[batch, T, R]``, as far as they are needed.
    """
    trajectory, plan = sampled.trajectory, sampled.plan
    found = {}

    def scored(x0: Tensor) -> Tensor:
        return score(rewards, pipeline.decode(x0), sampled.prompts, sampled.metadata).values

    def completed(x: Tensor, start: int) -> Tensor:
        return pipeline.rollout(sampled.cond, ode(plan.num_steps), x_init=x, noise=_no_noise, batch_size=batch_size, start=start).x0

    if "baseline" in needs:
        found["baseline"] = scored(completed(trajectory.x_init, 0))
    rows = trajectory.transitions
    # One row for each sample at each trained step, in the order of the samples.
    steps = [rows.take((rows.step == step).nonzero().squeeze(1)) for step in plan.trained]
    if "log_prob" in needs:
        found["log_prob"] = torch.stack([part.mean_log_prob() for part in steps], 1)
    if "step_rewards" in needs:
        if step_rewards == "completion":
            clean = [completed(part.x, step) for step, part in zip(plan.trained, steps, strict=True)]
        else:
            clean = [velocity_to_x0(part.velocity, part.x, part.sigma) for part in steps]
        found["step_rewards"] = torch.stack([scored(x0) for x0 in clean], 1)
    return found


def features(images: Tensor) -> Tensor:
    """Shrink images to a few numbers that tell them apart: ``[batch, 3 * 8 * 8]`` float64 on the CPU."""
    return adaptive_avg_pool2d(images.float(), _FEATURES).flatten(1).double().cpu()


def _no_noise(step: int) -> Tensor:
    raise AssertionError(f"the ODE asked for noise at step {step}")
