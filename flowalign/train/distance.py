"""How far a policy has moved from its base, on a handful of states: for runs whose algorithm does not measure it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flowalign.core.algorithm import CURRENT, REFERENCE, Experience
from flowalign.core.paths import interpolate
from flowalign.core.penalties import velocity_mse
from flowalign.core.randomness import normal
from flowalign.train.players import Networks

PURPOSE = "monitor"
_ROWS, _LEVELS = 8, (0.3, 0.6, 0.9)
_MEASURED = ("distance/reference", "kl/reference")


def is_measured(metrics: Mapping[str, float]) -> bool:
    """Tell whether a penalty has measured it."""
    return any(name in metrics for name in _MEASURED)


def distance_to_base(networks: Networks, experience: Experience, *, seed: int, step: int) -> Tensor:
    """Return the mean squared difference of the policy's and the base's velocities, a mean over elements and states, 0-dim.

    States are this rank's first images of as many prompts as there are, at most eight in all, noised to the levels 0.3, 0.6 and 0.9 in turn; their evaluations
    count under "monitor".

    Args:
        networks: Of the step.
        experience: What the step has sampled.
        seed: Seed of the run.
        step: The step.
    """
    order = torch.argsort(experience.sample, stable=True)[:_ROWS]
    x0 = experience.trajectory.x0[order.to(experience.trajectory.x0.device)]
    prompts, samples = experience.prompt[order], experience.sample[order]
    noise = normal(x0.shape[1:], seed=seed, purpose="distance to the base", step=step, prompts=prompts, samples=samples).to(x0.device)
    sigma = torch.tensor([_LEVELS[row % len(_LEVELS)] for row in range(len(order))], device=x0.device)
    x, cond = interpolate(x0, noise, sigma), networks.cond.take(order)
    networks.count(PURPOSE, 2 * len(order))
    with torch.no_grad():
        mine, base = (networks.pipeline.velocity(x, sigma, cond, role) for role in (CURRENT, REFERENCE))
        return velocity_mse(mine, base).mean()
