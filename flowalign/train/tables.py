"""The tables that an estimator may ask for besides rewards; each is made only if it does."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from flowalign.core.paths import velocity_to_x0
from flowalign.core.plans import Plan
from flowalign.core.rollout import Trajectory
from flowalign.estimators import Estimator, RewardBatch
from flowalign.train.forests import trained_steps

StepRewards = Literal["completion", "prediction"]
NOVELTY = "novelty"
_FEATURES = 8  # pixels of the small image that novelty is measured on


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What a step's rollout left on this rank.

    Shapes:
        images: ``[batch, 3, h, w]`` in [0, 1].
    """

    cond: Any  # of the images, as prompts and metadata are
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
    if "baseline" in needs and not plan.trained and all(step.kernel.is_deterministic for step in plan.steps):
        raise ValueError(
            "advantage: needs the ODE sample from the same noise as a baseline, but the algorithm samples by the ODE itself; " + mend
        )
    if "metric" in needs and not num_metrics:
        raise ValueError(f"advantage: needs a metric, but the run has none; add `metrics: [{NOVELTY}]` or `metrics: [{{reward: ...}}]`")
    if "step_judge" in needs and not judges_steps(plan):
        raise ValueError(
            "advantage: needs a judge's reward for each step, and this algorithm has only values of the states that steps start from; "
            "choose one whose every image judges one step, such as tempflow_grpo, or a recipe that takes differences, such as spo_chain"
        )
    for table in sorted({"anchor_id", "tree"} & set(needs)):
        if not plan.has_siblings:
            raise ValueError(
                f"advantage: needs {table}, which only a rollout that forks has; choose algorithm tempflow_grpo, flow_grpo with depths, or "
                "another recipe"
            )


def learns_alone(estimator: Estimator, num_rewards: int) -> bool:
    """Tell whether a sample that is alone in its group can get an advantage: from a baseline of its own, or from other groups.

    Examples:
        >>> from flowalign.estimators import recipe
        >>> [learns_alone(recipe(name), 1) for name in ("grpo", "reinforce_pp", "remax")]
        [False, True, True]
    """
    if estimator.needs:
        return "baseline" in estimator.needs
    # Whatever an estimator is made of, two groups of one show it.
    rewards = torch.tensor([[0.0], [1.0]]).expand(-1, num_rewards)
    trial = RewardBatch(rewards=rewards, group_id=torch.arange(2), sample_uid=torch.arange(2))
    return bool(estimator.update(trial, estimator.init())[0].advantage.any())


def judges_steps(plan: Plan) -> bool:
    """Tell whether every image trains exactly one step, so that its reward judges that step."""
    return bool(plan.trained) and bool((trained_steps(plan).sum(1) == 1).all())


def extra_tables(
    needs: Collection[str],
    complete: Callable[[Tensor, Tensor, int], Tensor],
    scored: Callable[[Tensor, Tensor], Tensor],
    sampled: Sampled,
    *,
    step_rewards: StepRewards,
) -> dict[str, Tensor]:
    """Make the tables of this rank's images that an estimator needs besides rewards and metrics.

    Args:
        needs: ``Estimator.needs``.
        complete: From states ``[rows, *event]``, the image that each leads to and a step to the ODE's final states.
        scored: From final states and the images whose prompts they have to rewards ``[rows, R]``.
        sampled: The rollout.
        step_rewards: "completion" scores the ODE's image from the state that each trained step starts from, as TurningPoint-GRPO and SPO do;
            it costs half the steps of a rollout for each trained step. "prediction" scores the clean image that the network predicts there,
            which costs no pass. A judge of
            steps, where one is asked for, is each image's own reward, which the collector fills in.

    Returns:
        ``log_prob`` ``[batch, T]``, ``baseline`` ``[batch, R]`` and ``step_rewards`` ``[batch, T, R]``, as far as they are needed; NaN at steps
        that do not lead to the image.
    """
    trajectory, plan = sampled.trajectory, sampled.plan
    found = {}
    if "baseline" in needs:
        first = plan.num_leaves * torch.arange(len(trajectory.x_init))
        found["baseline"] = scored(complete(trajectory.x_init, first, 0), first).repeat_interleave(plan.num_leaves, 0)
    if "log_prob" in needs or "tree" in needs:
        found["log_prob"] = _by_step(sampled, trajectory.transitions.mean_log_prob()[:, None].double().cpu())[..., 0]
    if "step_rewards" in needs and "step_judge" not in needs:
        found["step_rewards"] = _by_step(sampled, _state_values(sampled, complete, scored, step_rewards))
    return found


def _state_values(
    sampled: Sampled, complete: Callable[[Tensor, Tensor, int], Tensor], scored: Callable[[Tensor, Tensor], Tensor], way: StepRewards
) -> Tensor:
    """Value the state that each trained transition starts from, each state once: ``[rows, R]``."""
    rows = sampled.trajectory.transitions
    parts = []
    for step in sampled.plan.trained:
        here = rows.take((rows.step == step).nonzero().squeeze(1))
        _, which, counts = torch.unique_consecutive(here.state, return_inverse=True, return_counts=True)
        one = here.take(counts.cumsum(0) - counts)
        image = one.sample.cpu()
        x0 = complete(one.x, image, step) if way == "completion" else velocity_to_x0(one.velocity, one.x, one.sigma)
        parts.append(scored(x0, image)[which.cpu()])
    return torch.cat(parts)


def _by_step(sampled: Sampled, values: Tensor) -> Tensor:
    """Lay values of transitions ``[rows, columns]`` out as ``[batch, T, columns]``, NaN where a step does not lead to an image."""
    rows = sampled.trajectory.transitions
    transition, image = (index.cpu() for index in rows.leaves())
    column = torch.searchsorted(torch.tensor(sampled.plan.trained), rows.step.cpu())[transition]
    laid_out = torch.full((len(sampled.images), len(sampled.plan.trained), values.shape[1]), torch.nan, dtype=torch.float64)
    laid_out[image, column] = values[transition]
    return laid_out


def features(images: Tensor) -> Tensor:
    """Shrink images to a few numbers that tell them apart: ``[batch, 3 * 8 * 8]`` float64 on the CPU."""
    return adaptive_avg_pool2d(images.float(), _FEATURES).flatten(1).double().cpu()
