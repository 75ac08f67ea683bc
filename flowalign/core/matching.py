"""Rows of the matching family: final images noised to some levels. Only images and advantages are needed, whatever sampler made them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowalign.core.algorithm import Experience, Rows, Update, sample_number
from flowalign.core.distillation import Pairs
from flowalign.core.randomness import normal


def matching_rows(
    experience: Experience,
    update: Update,
    levels: Tensor,
    advantage: Tensor,
    *,
    chosen: Tensor,
    key: int,
    purpose: str,
) -> Rows:
    """Lay out images at noise levels, the levels of an image together; noise is keyed by level, prompt and sample.

    Args:
        experience: The step's data.
        update: Which update this is.
        levels: ``[levels]`` for all images alike, or ``[images, levels]``.
        advantage: ``[images]``.
        chosen: Rows of the experience, ``[images]``.
        key: Number of the update in the whole run.
        purpose: Whose noise it is.

    Returns:
        Rows with the columns x0, noise, sigma and advantage; a block is an image.
    """
    x0 = experience.trajectory.x0[chosen]
    each = levels.shape[-1]
    samples = sample_number(experience.group[chosen], experience.sample[chosen])
    noise = [
        normal(
            x0.shape[1:], seed=update.seed, purpose=f"{purpose} noise {level}", step=key, prompts=experience.prompt[chosen], samples=samples
        )
        for level in range(each)
    ]
    columns = {
        "x0": x0.repeat_interleave(each, 0),
        "noise": torch.stack(noise, dim=1).flatten(0, 1).to(x0.device),
        "sigma": levels.to(x0).expand(len(x0), each).flatten(),
        "advantage": advantage.to(x0).repeat_interleave(each),
    }
    return Rows(sample=chosen.to(x0.device).repeat_interleave(each), columns=columns, block=each)


def image_advantage(experience: Experience, chosen: Tensor, name: str, *, clip: float = math.inf) -> Tensor:
    """Return one weighted advantage for each image, clipped before it is weighted; several of different steps are averaged.

    Raises:
        ValueError: If the estimator gives ratios to reach, which matching has no use for.
    """
    if experience.target is not None:
        raise ValueError(f"advantage: gives ratios to reach, which {name} has no use for; use algorithm flow_grpo with link: bounded_ratio")
    return experience.advantage[chosen].mean(1).clamp(-clip, clip) * experience.weight[chosen].mean(1)


def uniform_rows(num: int, experience: Experience | Pairs, update: Update, chosen: Tensor, *, key: int, purpose: str) -> Tensor:
    """Draw ``num`` numbers in [0, 1) for each image, keyed by prompt and sample, ``[images, num]`` float64."""
    samples = sample_number(experience.group[chosen], experience.sample[chosen])
    draws = normal((num,), seed=update.seed, purpose=purpose, step=key, prompts=experience.prompt[chosen], samples=samples)
    below = torch.special.ndtr(draws.double())  # the normal law's own distribution function makes it uniform
    return below.clamp(max=1 - torch.finfo(torch.float64).eps)


def permuted_levels(experience: Experience, update: Update, chosen: Tensor, num_levels: int, *, key: int, purpose: str) -> Tensor:
    """Draw for each image ``num_levels`` different levels of the rollout's grid, ``[images, num_levels]``.

    Raises:
        ValueError: If the grid has fewer.
    """
    sigmas = experience.trajectory.sigmas[:-1]
    if not 1 <= num_levels <= len(sigmas):
        raise ValueError(f"num_levels: got {num_levels}, needed 1 to {len(sigmas)}, the steps of the rollout")
    samples = sample_number(experience.group[chosen], experience.sample[chosen])
    draws = normal(
        (len(sigmas),), seed=update.seed, purpose=f"{purpose} levels", step=key, prompts=experience.prompt[chosen], samples=samples
    )
    return sigmas[draws.argsort(1)[:, :num_levels].to(sigmas.device)]
