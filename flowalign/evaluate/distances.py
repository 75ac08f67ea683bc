"""Distances between two sets of images by their features: Frechet distance, and precision, recall, density and coverage.

Any feature extractor will do (`features_of` in :mod:`flowalign.evaluate.fidelity` runs one in batches): images in, ``[image, d]`` out. Values belong to the extractor, its
resize and the number of images: compare none across these. The kernel distance (KID) needs no minimum of images and has an interval: :func:`two_sample_distance`, and
where real images show the same prompts, the closer :func:`flowalign.evaluate.fidelity.kernel_distance`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowalign.evaluate.scores import Interval

_ROWS = 2048  # rows of a distance matrix held at once


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Number, mean and scatter of features; batches and ranks add up, in any order, to rounding.

    Deviations are squared about the mean of each part and merged (Chan et al.): raw second moments lose all digits where the mean is large beside the spread.

    Shapes:
        mean: ``[d]`` float64. scatter: ``[d, d]`` float64, the sum of outer products of deviations from the mean.

    Examples:
        >>> x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> whole, parts = Moments.of(x), Moments.of(x[:4]) + Moments.of(x[4:])
        >>> parts.num, bool(torch.allclose(parts.scatter, whole.scatter))
        (9, True)
    """

    num: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def of(features: Tensor) -> Moments:
        """Take the moments of features ``[image, d]``.

        Raises:
            ValueError: If there are none, or a value is not finite.
        """
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(f"features: got shape {tuple(features.shape)}, needed [image, d] with at least one image")
        rows = features.double()
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("features: got values that are not finite")
        mean = rows.mean(0)
        return Moments(num=len(rows), mean=mean, scatter=(rows - mean).T @ (rows - mean))

    def __add__(self, other: Moments) -> Moments:
        """Merge two parts of a set."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"moments: got features of {len(self.mean)} and {len(other.mean)} numbers; needed the same extractor for both")
        num, apart = self.num + other.num, other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(apart, apart) * (self.num * other.num / num)
        return Moments(num=num, mean=self.mean + apart * (other.num / num), scatter=scatter)

    def covariance(self) -> Tensor:
        """Divide by one less than the number, ``[d, d]``."""
        return self.scatter / (self.num - 1)

    def save(self, path: Path, *, extractor: str, resize: str) -> None:
        """Write a safetensors file that knows what it is of.

        Args:
            path: The file.
            extractor: What made the features, and the hash of its weights.
            resize: How images were brought to its size.
        """
        about = {"extractor": extractor, "resize": resize, "num": str(self.num)}
        save_file({"mean": self.mean.contiguous(), "scatter": self.scatter.contiguous()}, path, metadata=about)

    @staticmethod
    def load(path: Path, *, extractor: str, resize: str) -> Moments:
        """Read what ``save`` wrote.

        Raises:
            ValueError: If it is no such file, or of another extractor or resize.
        """
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in ("mean", "scatter")}
        except SafetensorError as error:
            raise ValueError(f"{path}: holds no moments of features ({error})") from error
        for name, wanted in (("extractor", extractor), ("resize", resize)):
            if about.get(name) != wanted:
                raise ValueError(
                    f"{path}: was made with {name} {about.get(name)!r}, needed {wanted!r}; distances between the two mean nothing"
                )
        return Moments(num=int(about["num"]), **found)


def frechet_distance(features: Moments, reference: Moments) -> float:
    """Return the Frechet distance of two normal laws with these moments: with Inception's features of 299 x 299 images, the FID.

    Its bias is large and falls with the number of images (for two sets of one law in 256 dimensions 34 at 1,000 and 7 at 5,000): only values of equal numbers are
    comparable, and under some 10,000 images :func:`flowalign.evaluate.fidelity.kernel_distance` says more.

    Args:
        features: Of the images.
        reference: Of the set that they should be like.

    Returns:
        ``|m - n|^2 + tr(S + T - 2 (S^1/2 T S^1/2)^1/2)``, in float64.

    Raises:
        ValueError: If a set has no more images than features have numbers, or the extractors differ in size.

    References:
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", 2017, https://arxiv.org/abs/1706.08500, equation 6.
        Deviation: the symmetric form, which needs no complex numbers. ``torchmetrics.image.FrechetInceptionDistance`` gives the same from images (tested), but keeps raw
        second moments and takes one stream at a time.

    Examples:
        >>> eye = torch.eye(3, dtype=torch.float64)
        >>> one = Moments(num=5, mean=torch.zeros(3, dtype=torch.float64), scatter=4 * eye)
        >>> other = Moments(num=5, mean=torch.ones(3, dtype=torch.float64), scatter=16 * eye)
        >>> round(frechet_distance(one, other), 12)
        6.0
    """
    if features.mean.shape != reference.mean.shape:
        raise ValueError(
            f"moments: got features of {len(features.mean)} and {len(reference.mean)} numbers; needed the same extractor for both"
        )
    for name, moments in (("features", features), ("reference", reference)):
        if moments.num <= len(moments.mean):
            raise ValueError(
                f"{name}: got {moments.num} images for features of {len(moments.mean)} numbers, needed more than that for a covariance; use kernel_distance"
            )
    first, second = features.covariance(), reference.covariance()
    values, vectors = torch.linalg.eigh(first)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ second @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    apart = (features.mean - reference.mean).square().sum()
    return float(apart + first.trace() + second.trace() - 2 * cross)


def two_sample_distance(features: Tensor, reference: Tensor, prompt_id: Sequence[int], *, confidence: float = 0.95) -> Interval:
    """Return the kernel distance (KID's polynomial MMD squared) of images to a reference set that shows other prompts.

    Unbiased: 0 on average for two sets of one law, so it can be slightly negative. Pairs of images of one prompt are left out, because they are alike
    and would make the images look closer to each other than the model's law is. The interval is the jackknife's over prompts and over reference
    images; it is wide under some ten of either.

    Args:
        features: ``[image, d]``.
        reference: ``[reference, d]``, independent images.
        prompt_id: The prompt of each row of ``features``; prompts weigh alike.
        confidence: Nominal coverage of the interval (normal approximation).

    Raises:
        ValueError: If there are fewer than 3 prompts or 3 reference images, or shapes do not fit.

    References:
        Binkowski et al., "Demystifying MMD GANs", 2018, https://arxiv.org/abs/1801.01401, section 4 (the kernel ``(x.y / d + 1)^3``);
        Gretton et al., "A Kernel Two-Sample Test", JMLR 13, 2012, equation 3. With one image of each prompt the mean equals torchmetrics'
        (tested); over the whole sets, not over random subsets of them.
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1] or len(prompt_id) != len(features):
        raise ValueError(
            f"got shapes {tuple(features.shape)} and {tuple(reference.shape)} and {len(prompt_id)} prompt ids, needed [image, d], [reference, d] and one "
            "id for each image"
        )
    _, place, counts = torch.tensor(list(prompt_id)).unique(return_inverse=True, return_counts=True)
    num, others = len(counts), len(reference)
    if min(num, others) < 3:
        raise ValueError(
            f"got {num} prompts and {others} reference images, needed at least 3 of each for a kernel distance with an interval"
        )
    x, y = features.double(), reference.double()
    average = torch.zeros(num, len(x), dtype=torch.float64)
    average[place, torch.arange(len(x))] = 1 / counts[place].double()
    # Sums of the kernel over all partners: of a prompt over other prompts and over the reference, and of a reference image over both.
    within, across, within_y, across_y = (torch.zeros(size, dtype=torch.float64) for size in (num, num, others, others))
    for rows in torch.arange(len(x)).split(_ROWS):
        mine, crossed = average[:, rows], _kernel(x[rows], y)
        table = mine @ (_kernel(x[rows], x) @ average.T)
        within += table.sum(1) - table.diagonal()
        across += mine @ crossed.sum(1)
        across_y += (mine @ crossed).sum(0)
    for rows in torch.arange(others).split(_ROWS):
        table = _kernel(y[rows], y)
        within_y[rows] = table.sum(1) - table[torch.arange(len(rows)), rows]

    def estimate(xx: Tensor, yy: Tensor, xy: Tensor, n: int, m: int) -> Tensor:
        return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)

    xx, yy, xy = within.sum(), within_y.sum(), across.sum()
    mean = float(estimate(xx, yy, xy, num, others))
    without_x = estimate(xx - 2 * within, yy, xy - across, num - 1, others)
    without_y = estimate(xx, yy - 2 * within_y, xy - across_y, num, others - 1)
    variance = sum((len(part) - 1) ** 2 / len(part) * float(part.var()) for part in (without_x, without_y))
    reach = NormalDist().inv_cdf(0.5 + confidence / 2) * variance**0.5
    return Interval(mean=mean, low=mean - reach, high=mean + reach)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


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
    """Measure precision, recall, density and coverage; the reach of a point is the distance to its ``neighbours``-th neighbour in its own set.

    Precision and recall follow outliers of either set; density and coverage do not. All depend on the numbers of images: compare sets of equal size.

    Args:
        features: ``[image, d]``.
        reference: ``[reference, d]``.
        neighbours: 5 for density and coverage as published, 3 for precision and recall as published.

    Raises:
        ValueError: If a set has no more than ``neighbours`` rows, or the shapes do not fit.

    References:
        Kynkaanniemi et al., "Improved Precision and Recall Metric", 2019, https://arxiv.org/abs/1904.06991; Naeem et al., "Reliable Fidelity and Diversity Metrics for
        Generative Models", 2020, https://arxiv.org/abs/2002.09797.
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(f"got shapes {tuple(features.shape)} and {tuple(reference.shape)}, needed [image, d] and [reference, d]")
    if neighbours < 1 or min(len(features), len(reference)) <= neighbours:
        raise ValueError(
            f"neighbours: got {neighbours} for {len(features)} and {len(reference)} rows, needed at least 1, and more rows than that"
        )
    x, y = features.double(), reference.double()
    reach_x, reach_y = _reach(x, neighbours), _reach(y, neighbours)
    inside = []
    nearest = torch.full((len(y),), torch.inf, dtype=torch.float64)
    recalled = torch.zeros(len(y), dtype=torch.bool)
    for rows in torch.arange(len(x)).split(_ROWS):
        distance = torch.cdist(x[rows], y)
        inside.append((distance < reach_y).sum(1))
        nearest = torch.minimum(nearest, distance.amin(0))
        recalled |= (distance < reach_x[rows, None]).any(0)
    reached = torch.cat(inside).double()
    return Manifold(
        precision=float((reached > 0).double().mean()),
        recall=float(recalled.double().mean()),
        density=float(reached.mean() / neighbours),
        coverage=float((nearest < reach_y).double().mean()),
    )


def _reach(points: Tensor, neighbours: int) -> Tensor:
    """Return the distance of each point to its n-th neighbour; the nearest of all is the point itself."""
    parts = [torch.cdist(rows, points).kthvalue(neighbours + 1, dim=1).values for rows in points.split(_ROWS)]
    return torch.cat(parts)
