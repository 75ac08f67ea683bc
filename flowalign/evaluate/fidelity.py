"""Measures that no reward contains: distance to real images of the same prompts, diversity within a prompt, plain pixel statistics.

They are the other side of a rising reward: a model that has drifted, collapsed or found a loophole shows here. Features are those of a
fixed, seeded, untrained convolutional network, so that nothing is downloaded; see :class:`RandomFeatures` for what they can see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowalign.core.randomness import generator
from flowalign.evaluate.scores import Interval
from flowalign.images import floats

_ROWS = 1024  # rows of the kernel matrix held at once


class RandomFeatures(nn.Module):
    """Features of a fixed, untrained convolutional network; the same seed gives the same network.

    They see local statistics (colours, edges, small textures, noise, blur) and, through a 2 x 2 grid of averages, roughly where those are.
    They see no meaning: whether a shape is the wanted one is for a verifier. Values are comparable only between sets measured with the
    same seed and image size, and not with published KID or FID values, which use Inception features.

    Shapes:
        images ``[batch, 3, h, w]`` in [0, 1] to features ``[batch, 416]``, float64.

    References:
        Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", 2020, https://arxiv.org/abs/2002.09797, section 5
        (random embeddings for images that are unlike ImageNet). Deviations: a smaller network with averages of every layer.
    """

    def __init__(self, *, seed: int = 0) -> None:
        """Build the network."""
        super().__init__()
        draw = generator(seed, "random features")
        self.layers = nn.ModuleList()
        for width_in, width_out, stride in ((3, 32, 1), (32, 64, 2), (64, 80, 2)):
            # Skipping the usual initialisation keeps the global generator untouched.
            layer = nn.utils.skip_init(nn.Conv2d, width_in, width_out, 3, stride=stride, padding=1, padding_mode="replicate")
            nn.init.normal_(layer.weight, std=(2 / (9 * width_in)) ** 0.5, generator=draw)
            nn.init.normal_(layer.bias, std=0.1, generator=draw)
            self.layers.append(layer)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images."""
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 8:
            raise ValueError(f"images: got shape {tuple(images.shape)}, needed (batch, 3, height, width), 8 pixels or more")
        if not bool(torch.isfinite(images).all()):
            raise ValueError("images: got values that are not finite")
        parts = []
        hidden = images.float() * 2 - 1
        for layer in self.layers:
            hidden = functional.relu(layer(hidden))
            parts.append(hidden.mean((2, 3)) if layer is not self.layers[-1] else hidden)
        parts[-1] = functional.adaptive_avg_pool2d(hidden, 2).flatten(1)
        return torch.cat(parts, dim=1).double()


def features_of(images: Tensor, *, network: nn.Module, batch_size: int = 256) -> Tensor:
    """Return the features of many images, floats in [0, 1] or bytes, in batches, on the CPU in float64."""
    if len(images) == 0:
        raise ValueError("images: got none")
    return torch.cat([network(floats(chunk)).to("cpu", torch.float64) for chunk in images.split(batch_size)])


def kernel_distance(features: Tensor, reference: Tensor, prompt_id: Sequence[int], *, confidence: float = 0.95) -> Interval:
    """Return the kernel distance (KID's polynomial MMD squared) between images and reference images of the same prompts.

    The prompt is the unit: with h(p, q) = k(x_p, x_q) + k(y_p, y_q) - k(x_p, y_q) - k(x_q, y_p), each k averaged over the
    images of two prompts, the estimate is the mean of h over pairs of *different* prompts. That is unbiased also for few
    images, 0 on average for two sets of the same distribution (so it can be slightly negative) and 0 for identical sets. The
    interval is the jackknife's over prompts; it is wide under some ten prompts.

    The kernel is torchmetrics'. Its ``KernelInceptionDistance`` works offline with a feature module too, but subsets images with the global random generator
    and knows no prompts: its spread over subsets is no interval, and pairs of one prompt bias it downwards.

    Args:
        features: ``[image, d]``.
        reference: ``[image, d]``, row i of the same prompt as row i of ``features``.
        prompt_id: The prompt of each row.
        confidence: Nominal coverage of the interval (normal approximation).

    Returns:
        The distance; lower is better. The scale is that of the features.

    Raises:
        ValueError: If there are fewer than 3 prompts, or shapes differ.

    References:
        Binkowski et al., "Demystifying MMD GANs", 2018, https://arxiv.org/abs/1801.01401, section 4 (the kernel ``(x.y / d + 1)^3``);
        Gretton et al., "A Kernel Two-Sample Test", JMLR 13, 2012, equation 4 (the paired estimate).
        Deviation: the samples are whole prompts.
    """
    if features.shape != reference.shape or features.ndim != 2 or len(prompt_id) != len(features):
        raise ValueError(
            f"needed features and reference of one shape [image, d] and as many prompt ids, got {tuple(features.shape)}, "
            f"{tuple(reference.shape)} and {len(prompt_id)}"
        )
    average = _prompt_average(prompt_id)
    num = len(average)
    if num < 3:
        raise ValueError(f"prompt_id: got {num} prompts, needed at least 3 for a kernel distance with an interval")
    x, y = features.double(), reference.double()
    cross = _prompt_kernel(x, y, average)
    h = _prompt_kernel(x, x, average) + _prompt_kernel(y, y, average) - cross - cross.T
    h.fill_diagonal_(0)
    total = h.sum()
    without = (total - 2 * h.sum(1)) / ((num - 1) * (num - 2))
    error = ((num - 1) / num * (without - without.mean()).square().sum()).sqrt()
    quantile = torch.special.ndtri(torch.tensor(0.5 + confidence / 2, dtype=torch.float64))
    mean, reach = float(total / (num * (num - 1))), float(quantile * error)
    return Interval(mean=mean, low=mean - reach, high=mean + reach)


def within_prompt_distance(points: Tensor, prompt_id: Sequence[int]) -> Tensor:
    """Return for each prompt the mean distance between pairs of its images, in root mean square over coordinates.

    Unbiased in the number of images, at least 2 for each prompt. Prompts come in ascending order of their ids.

    Args:
        points: Features ``[image, d]`` or images ``[image, 3, h, w]``, floats in [0, 1] or bytes.
        prompt_id: The prompt of each row.

    Returns:
        ``[prompt]`` float64.

    Raises:
        ValueError: If a prompt has one image only.
    """
    flat = points.flatten(1)
    scale = flat.shape[1] ** 0.5
    return torch.stack([torch.pdist(floats(rows).double()).mean() / scale for rows in _by_prompt(flat, prompt_id, "a distance")])


def relative_diversity(base: Tensor, tuned: Tensor, *, draws: int = 10_000, seed: int = 0, confidence: float = 0.95) -> Interval:
    """Return the diversity of a tuned model relative to its base's: 1 means unchanged, 0 collapsed.

    The ratio of the means over prompts, with the percentile interval of a bootstrap that resamples prompts for both models together.
    The ratio's small-sample bias is of order one over the number of prompts.

    Args:
        base: Diversity of each prompt under the base, for example from :func:`within_prompt_distance`, ``[prompt]``.
        tuned: The same prompts under the tuned model.
        draws: Number of bootstrap draws.
        seed: The same seed gives the same interval.
        confidence: Nominal coverage.

    Raises:
        ValueError: If there are fewer than 2 prompts, sizes differ, or the base has no diversity at all.
    """
    if base.shape != tuned.shape or base.ndim != 1 or len(base) < 2:
        raise ValueError(f"needed two vectors over the same 2 or more prompts, got {tuple(base.shape)}, {tuple(tuned.shape)}")
    if not float(base.sum()) > 0:
        raise ValueError("base: all images of every prompt are the same, so there is nothing to be relative to")
    index = torch.randint(len(base), (draws, len(base)), generator=generator(seed, "diversity"))
    ratio = tuned.double()[index].sum(1) / base.double()[index].sum(1)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(ratio.nan_to_num(nan=1.0), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(mean=float(tuned.double().sum() / base.double().sum()), low=low, high=high)


def vendi(points: Tensor) -> float:
    """Return the Vendi score: the effective number of different rows, from 1 to the number of rows.

    It is bounded by the number of rows and grows with it: compare only sets of equal size.

    Args:
        points: ``[image, d]``, no row zero. Centre features whose common part should not count.

    Raises:
        ValueError: If there are no rows, or one has length zero.

    References:
        Friedman and Dieng, "The Vendi Score", 2022, https://arxiv.org/abs/2210.02410, definition 3.1, with the cosine kernel.

    Examples:
        >>> round(vendi(torch.eye(4)), 6)
        4.0
    """
    norm = points.double().norm(dim=1, keepdim=True)
    if points.ndim != 2 or len(points) == 0 or not bool((norm > 0).all()):
        raise ValueError(f"points: got shape {tuple(points.shape)}, needed at least one row and none of length zero")
    unit = points.double() / norm
    share = torch.linalg.eigvalsh(unit @ unit.T / len(unit)).clamp(min=0)
    return float(torch.special.entr(share).sum().exp())


def within_prompt_vendi(features: Tensor, prompt_id: Sequence[int]) -> Tensor:
    """Return the Vendi score of each prompt's images, ``[prompt]`` float64; see :func:`vendi` and :func:`within_prompt_distance`."""
    return torch.tensor([vendi(rows) for rows in _by_prompt(features, prompt_id, "a Vendi score")], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class PixelStatistics:
    """Means over images: luma, HSV saturation, and the share of pixels on an edge (a step of luma above 0.1)."""

    brightness: float
    saturation: float
    edge_density: float


def pixel_statistics(images: Tensor) -> PixelStatistics:
    """Return mean brightness, saturation and edge density of images ``[batch, 3, h, w]``, floats in [0, 1] or bytes.

    Raises:
        ValueError: As :func:`pixel_values`.
    """
    return PixelStatistics(**{name: float(values.mean()) for name, values in pixel_values(images).items()})


def pixel_values(images: Tensor) -> dict[str, Tensor]:
    """Return brightness, saturation and edge density of each image, ``[batch]`` float64; see :class:`PixelStatistics`.

    Raises:
        ValueError: If there are no images or they have another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"images: got shape {tuple(images.shape)}, needed at least one image, (batch, 3, height, width)")
    pixels = floats(images).double().clamp(0, 1)
    luma = (pixels * torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)[:, None, None]).sum(1)  # Rec. 709
    high, low = pixels.amax(1), pixels.amin(1)
    saturation = torch.where(high > 0, (high - low) / high.clamp(min=1e-12), 0.0)
    right = functional.pad(luma.diff(dim=2), (0, 1))
    down = functional.pad(luma.diff(dim=1), (0, 0, 0, 1))
    is_edge = (right.square() + down.square()).sqrt() > 0.1
    means = {"brightness": luma, "saturation": saturation, "edge_density": is_edge.double()}
    return {name: values.mean(dim=(1, 2)) for name, values in means.items()}


def kid_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return KID's kernel ``(x.y / d + 1)^3`` of rows ``[x, d]`` and ``[y, d]``, as torchmetrics has it."""
    from torchmetrics.image.kid import poly_kernel

    return poly_kernel(x, y)


def _prompt_average(prompt_id: Sequence[int]) -> Tensor:
    """Matrix ``[prompt, image]`` that averages over the images of each prompt."""
    _, index, counts = torch.tensor(list(prompt_id)).unique(return_inverse=True, return_counts=True)
    average: Tensor = functional.one_hot(index).T / counts[:, None].double()
    return average


def _prompt_kernel(x: Tensor, y: Tensor, average: Tensor) -> Tensor:
    result = torch.zeros(len(average), len(average), dtype=torch.float64)
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        result += average[:, rows] @ (kid_kernel(x[rows], y) @ average.T)
    return result


def _by_prompt(points: Tensor, prompt_id: Sequence[int], what: str) -> list[Tensor]:
    if len(prompt_id) != len(points):
        raise ValueError(f"prompt_id: got {len(prompt_id)} for {len(points)} images, needed one each")
    _, index, counts = torch.tensor(list(prompt_id)).unique(return_inverse=True, return_counts=True)
    if int(counts.min()) < 2:
        raise ValueError(f"prompt_id: a prompt has one image, {what} within a prompt needs at least 2 images of each")
    return list(points[index.argsort(stable=True)].split(counts.tolist()))
