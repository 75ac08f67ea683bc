"""Intervals from leaving one prompt, or one reference image, out at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from flowalign.evaluate.scores import Interval


def by_prompt(prompt_id: Sequence[int]) -> tuple[Tensor, int]:
    """Number the prompts from 0: the number of each row's, and how many there are."""
    found, place = torch.tensor(list(prompt_id)).unique(return_inverse=True)
    return place, len(found)


def jackknife(
    value: float,
    images: Tensor,
    reference: Tensor,
    *,
    pairs: Tensor | None = None,
    confidence: float = 0.95,
    least: float = -math.inf,
    most: float = math.inf,
) -> Interval:
    """Return a measure of two sets with its interval (normal approximation).

    The variance is that over both sets, which are independent; where they show the same prompts, that over prompts. For any symmetric measure the
    jackknife's variance is too large on average, never too small.

    Args:
        value: The measure.
        images: The measure without each prompt's images, ``[prompt]``.
        reference: The measure without each reference image, ``[reference]``.
        pairs: The prompt of each reference image, where the sets show the same prompts; a prompt leaves both sets then.
        confidence: Nominal coverage.
        least: Lower end of the measure's range.
        most: Upper end of it.

    References:
        Efron and Stein, "The Jackknife Estimate of Variance", Annals of Statistics 9, 1981 (the bias of the variance).
    """
    if pairs is None:
        parts = [images, reference]
    else:
        parts = [images + torch.zeros_like(images).index_add(0, pairs, reference - value)]
    variance = sum((len(part) - 1) ** 2 / len(part) * float(part.var()) for part in parts)
    reach = NormalDist().inv_cdf(0.5 + confidence / 2) * variance**0.5
    return Interval(mean=value, low=max(least, value - reach), high=min(most, value + reach))
