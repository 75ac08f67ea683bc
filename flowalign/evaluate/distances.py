"""Distances between two sets of images by their features.

Any feature extractor will do (`features_of` in :mod:`flowalign.evaluate.fidelity` runs one in batches): images in, ``[image, d]`` out. Values belong to the extractor, its
resize and the number of images: compare none across these. The kernel distance (KID) needs no minimum of images and has an interval: :func:`two_sample_distance`, and
where real images show the same prompts, the closer :func:`flowalign.evaluate.fidelity.kernel_distance`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowalign.evaluate.fidelity import kid_kernel
from flowalign.evaluate.jackknife import by_prompt, jackknife
from flowalign.evaluate.neighbourhoods import Manifold as Manifold
from flowalign.evaluate.neighbourhoods import manifold as manifold
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


def frechet_interval(
    features: Tensor, reference: Tensor, prompt_id: Sequence[int], *, is_paired: bool = False, confidence: float = 0.95
) -> Interval:
    """Return the Frechet distance of two sets with an interval.

    The interval is the infinitesimal jackknife's over prompts and over reference images: what each adds is taken from the distance's derivative, so that all costs
    two to three times the distance alone (13 s of CPU time with 2,500 images of 2,048 numbers) and no resamples (which repeat images, and would move the distance by as much as its bias). It covers other prompts of the same
    kinds, other noise and other reference images. It does not cover the bias of few images, which both ends have as the distance has.

    Args:
        features: ``[image, d]``.
        reference: ``[reference, d]``.
        prompt_id: The prompt of each row of ``features``.
        is_paired: Whether row i of the reference shows the prompt of row i of ``features``; else reference images are independent.
        confidence: Nominal coverage of the interval (normal approximation).

    Raises:
        ValueError: As :func:`frechet_distance`.

    References:
        Efron, "Nonparametric Estimates of Standard Error", Biometrika 68, 1981, section 3 (the infinitesimal jackknife). The derivative in the covariance is one less the map of
        optimal transport: Malago et al., "Wasserstein Riemannian geometry of Gaussian densities", 2018, https://arxiv.org/abs/1801.09269, section 3.
    """
    if len(prompt_id) != len(features):
        raise ValueError(f"prompt_id: got {len(prompt_id)} for {len(features)} images, needed one each")
    x, y = features.double(), reference.double()
    first, second = Moments.of(x), Moments.of(y)
    value = frechet_distance(first, second)
    apart = first.mean - second.mean
    there, back = _transport(first.covariance(), second.covariance())
    added = []
    for rows, mean, transport, sign in ((x, first.mean, there, 1), (y, second.mean, back, -1)):
        centred = rows - mean
        change = 2 * sign * (centred @ apart) + (centred * (centred - centred @ transport)).sum(1)
        added.append(change - change.mean())
    prompts, num = by_prompt(prompt_id)
    if num < 3:
        return Interval(mean=value)
    without_x = value - torch.bincount(prompts, added[0], num) / (len(x) - torch.bincount(prompts, minlength=num))
    without_y = value - added[1] / (len(y) - 1)
    return jackknife(value, without_x, without_y, pairs=prompts if is_paired else None, confidence=confidence, least=0.0)


def _transport(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the linear maps that carry centred normal laws with these covariances onto each other, there and back."""
    values, vectors = torch.linalg.eigh(second)
    root, inverse = (vectors @ torch.diag(_power(values, power)) @ vectors.T for power in (0.5, -0.5))
    values, vectors = torch.linalg.eigh(root @ first @ root)
    half, inverse_half = (vectors @ torch.diag(_power(values, power)) @ vectors.T for power in (0.5, -0.5))
    return root @ inverse_half @ root, inverse @ half @ inverse


def _power(values: Tensor, power: float) -> Tensor:
    """Raise eigenvalues to a power; directions in which nothing varies, to rounding, are left out."""
    kept = values > values.amax() * len(values) * torch.finfo(values.dtype).eps
    return torch.where(kept, values, 1.0) ** power * kept


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
        mine, crossed = average[:, rows], kid_kernel(x[rows], y)
        table = mine @ (kid_kernel(x[rows], x) @ average.T)
        within += table.sum(1) - table.diagonal()
        across += mine @ crossed.sum(1)
        across_y += (mine @ crossed).sum(0)
    for rows in torch.arange(others).split(_ROWS):
        table = kid_kernel(y[rows], y)
        within_y[rows] = table.sum(1) - table[torch.arange(len(rows)), rows]

    def estimate(xx: Tensor, yy: Tensor, xy: Tensor, n: int, m: int) -> Tensor:
        return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)

    xx, yy, xy = within.sum(), within_y.sum(), across.sum()
    without_x = estimate(xx - 2 * within, yy, xy - across, num - 1, others)
    without_y = estimate(xx, yy - 2 * within_y, xy - across_y, num, others - 1)
    return jackknife(float(estimate(xx, yy, xy, num, others)), without_x, without_y, confidence=confidence)
