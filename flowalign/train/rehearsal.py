"""A step without a network: what an algorithm would refuse after its first rollout, it refuses before."""

from __future__ import annotations

import torch
from torch import Tensor

from flowalign.core.algorithm import Algorithm, Experience, Update
from flowalign.core.rollout import rollout


def rehearse(
    algorithm: Algorithm, sigmas: Tensor, *, groups: int, group_size: int, gives_targets: bool = False, num_processes: int = 1
) -> None:
    """Lay out the rows of a rollout of one number a sample, by a velocity of 0: sizes are as they will be, and nothing is computed.

    Args:
        algorithm: The algorithm.
        sigmas: The rollout's grid, ``[steps + 1]``.
        groups: Prompts of a rollout.
        group_size: Initial states of each.
        gives_targets: Whether the estimator gives ratios to reach.
        num_processes: Processes that share each group.

    Raises:
        ValueError: What the algorithm says of its own settings; or if it compares whole groups, which several processes share.
    """
    for decay in algorithm.roles.values():
        decay(0)  # a schedule refuses its own numbers when it is first asked
    plan = algorithm.plan(0, len(sigmas) - 1, 0)
    num = groups * group_size
    zeros = torch.zeros(num, 1)
    done = rollout(
        lambda x, sigma: torch.zeros_like(x), zeros, sigmas.float(), plan, lambda step: torch.zeros(num * len(plan.drawn(step)), 1)
    )
    leaves = num * plan.num_leaves
    group = torch.arange(groups).repeat_interleave(group_size * plan.num_leaves)
    experience = Experience(
        trajectory=done,
        advantage=torch.zeros(leaves, 1),
        weight=torch.ones(leaves, 1),
        keep=torch.ones(leaves, dtype=torch.bool),
        target=torch.ones(leaves, 1) if gives_targets else None,
        prompt=group,
        group=group,
        sample=torch.arange(leaves) % (group_size * plan.num_leaves),
    )
    rows = algorithm.rows(experience, Update(seed=0, step=0, index=0))
    if rows.is_grouped and num_processes > 1:
        raise ValueError(
            f"algorithm: its loss compares whole groups, but {num_processes} processes share each; run one process, or choose an algorithm that works row by "
            "row, such as diffusion_nft"
        )
