"""How two sets of images cover each other by their features: precision, recall, density and coverage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.evaluate.jackknife import by_prompt, jackknife
from flowalign.evaluate.scores import Interval
from flowalign.rewards.parts import cut

_ROWS = 2048  # rows of a distance matrix held at once, but that a prompt's are held together


@dataclass(frozen=True, kw_only=True)
class Manifold:
    """How two sets of features cover each other.

    Attributes:
        precision: Share of the images that lie within reach of a reference image.
        recall: Share of the reference images that lie within reach of an image.
        density: Reference images that reach an image, over the number of neighbours; above 1 where images crowd where references do.
        coverage: Share of the reference images with an image within their own reach.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(features: Tensor, reference: Tensor, *, neighbours: int = 5) -> Manifold:
    """Measure precision, recall, density and coverage; see :func:`manifold_intervals`."""
    found = manifold_intervals(features, reference, range(len(features)), neighbours=neighbours)
    return Manifold(**{name: interval.mean for name, interval in found.items()})


def manifold_intervals(
    features: Tensor, reference: Tensor, prompt_id: Sequence[int], *, neighbours: int = 5, is_paired: bool = False, confidence: float = 0.95
) -> dict[str, Interval]:
    """Measure precision, recall, density and coverage; the reach of a point is the distance to its ``neighbours``-th neighbour in its own set.

    Precision and recall follow outliers of either set; density and coverage do not. All depend on the numbers of images: compare sets of equal size.

    Intervals are the jackknife's over prompts and over reference images, with reaches held as they are: they cover other prompts of the same kinds, other noise
    and other reference images, not how the measures move with the numbers of images. Each is exact from counts of who is covered by one alone, at the cost of the measures themselves; a
    bootstrap's resamples repeat images and cover less.

    Args:
        features: ``[image, d]``.
        reference: ``[reference, d]``.
        prompt_id: The prompt of each row of ``features``.
        neighbours: 5 for density and coverage as published, 3 for precision and recall as published.
        is_paired: Whether row i of the reference shows the prompt of row i of ``features``; else reference images are independent.
        confidence: Nominal coverage of the intervals (normal approximation); of fewer than 3 prompts there are none.

    Returns:
        The fields of :class:`Manifold`.

    Raises:
        ValueError: If a set has no more than ``neighbours`` rows, or the shapes do not fit.

    References:
        Kynkaanniemi et al., "Improved Precision and Recall Metric", 2019, https://arxiv.org/abs/1904.06991; Naeem et al., "Reliable Fidelity and Diversity Metrics for
        Generative Models", 2020, https://arxiv.org/abs/2002.09797.
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1] or len(prompt_id) != len(features):
        raise ValueError(
            f"got shapes {tuple(features.shape)} and {tuple(reference.shape)} and {len(prompt_id)} prompt ids, needed [image, d], [reference, d] and one "
            "id for each image"
        )
    if neighbours < 1 or min(len(features), len(reference)) <= neighbours:
        raise ValueError(
            f"neighbours: got {neighbours} for {len(features)} and {len(reference)} rows, needed at least 1, and more rows than that"
        )
    x, y = features.double(), reference.double()
    prompts, num = by_prompt(prompt_id)
    reach_x, reach_y = _reach(x, neighbours), _reach(y, neighbours)
    reached = torch.zeros(len(x), dtype=torch.float64)  # by how many reference images
    reaches, alone = torch.zeros(2, len(y), dtype=torch.float64)  # how many images, and how many that no other reference image reaches
    covered, recalled = _Union(num, len(y)), _Union(num, len(y))
    for rows in cut(prompts.tolist(), _ROWS):
        distance = torch.cdist(x[rows], y)
        inside = distance < reach_y
        reached[rows] = inside.sum(1).double()
        reaches += inside.sum(0)
        alone += inside[reached[rows] == 1].sum(0)
        covered.add(inside, prompts[rows])
        recalled.add(distance < reach_x[rows, None], prompts[rows])
    size = torch.bincount(prompts, minlength=num)

    def over_images(values: Tensor, lost: Tensor, most: float = 1.0) -> Interval:
        """Average over images; ``lost`` is what all of them lose without a reference image."""
        total = values.sum()
        without = (total - torch.bincount(prompts, values, num)) / (len(x) - size)
        return interval(float(total / len(x)), without, (total - lost) / len(x), most)

    def over_references(union: _Union) -> Interval:
        """Average over reference images what some image gives them."""
        total = union.held.sum()
        return interval(float(total / len(y)), (total - union.lost()) / len(y), (total - union.held) / (len(y) - 1), 1.0)

    def interval(mean: float, images: Tensor, references: Tensor, most: float) -> Interval:
        if num < 3:
            return Interval(mean=mean)
        return jackknife(mean, images, references, pairs=prompts if is_paired else None, confidence=confidence, least=0.0, most=most)

    return {
        "precision": over_images((reached > 0).double(), alone),
        "recall": over_references(recalled),
        "density": over_images(reached / neighbours, reaches / neighbours, torch.inf),
        "coverage": over_references(covered),
    }


class _Union:
    """Which reference images are held by some prompt, and which by one prompt alone."""

    def __init__(self, num_prompts: int, num_references: int) -> None:
        self.num_prompts = num_prompts
        self.count = torch.zeros(num_references, dtype=torch.int64)
        self.sum = torch.zeros(num_references, dtype=torch.int64)  # of the numbers of the prompts that hold it; of one, its number

    def add(self, held: Tensor, prompts: Tensor) -> None:
        """Add all images of some prompts: ``held`` ``[image, reference]``."""
        which, place = prompts.unique(return_inverse=True)
        table = torch.zeros(len(which), held.shape[1], dtype=torch.int32).index_add_(0, place, held.int()) > 0
        self.count += table.sum(0)
        self.sum += (table * which[:, None]).sum(0)

    @property
    def held(self) -> Tensor:
        return (self.count > 0).double()

    def lost(self) -> Tensor:
        """Return how many nobody would hold without each prompt."""
        return torch.bincount(self.sum[self.count == 1], minlength=self.num_prompts)


def _reach(points: Tensor, neighbours: int) -> Tensor:
    """Return the distance of each point to its n-th neighbour; the nearest of all is the point itself."""
    parts = [torch.cdist(rows, points).kthvalue(neighbours + 1, dim=1).values for rows in points.split(_ROWS)]
    return torch.cat(parts)
