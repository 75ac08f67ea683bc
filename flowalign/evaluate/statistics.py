"""Scores with intervals: the prompt is the unit, its images are nested in it, and tags are strata.

The score of a model is the macro mean: the unweighted mean over tags of the mean over the tag's images. Intervals come from a bootstrap
that resamples prompts within each tag; they speak of new prompts of the same kinds and of new noise, and not of new training runs
(for those see :func:`seed_spread`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flowalign.core.randomness import key
from flowalign.evaluate.scores import Difference, Interval, Scores, Spread

_CHUNK = 2_000_000  # entries of a resampling table held at once (16 MB)


@dataclass(frozen=True, kw_only=True)
class _Tag:
    """Sums and numbers of images of the prompts of one tag."""

    name: str
    sums: NDArray[np.float64]
    counts: NDArray[np.float64] = field(repr=False)

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.counts.sum())


def bootstrap(
    values: ArrayLike,
    prompt_id: ArrayLike,
    tag: Sequence[str],
    *,
    draws: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Scores:
    """Score a model, with percentile intervals from a bootstrap clustered by prompt and stratified by tag.

    The order of the rows does not matter, and the interval of a tag does not depend on which other tags there are. A tag with one prompt
    has no interval, and then neither have the overall scores: one that leaves out a part of the variance would be too narrow. The
    interval of a tag with two prompts is just their range, and one of zero width says that all prompts scored alike, not that the
    score is certain.

    Args:
        values: One score for each image, finite.
        prompt_id: The prompt of each image, an integer or a string. Prompts may have different numbers of images.
        tag: The tag of each image's prompt.
        draws: Number of bootstrap draws.
        seed: The same seed gives the same intervals.
        confidence: Nominal coverage of the intervals.

    Returns:
        The scores.

    Raises:
        ValueError: If there are no images, lengths differ, a value is not finite, or a prompt has two tags.

    References:
        Rao and Wu, "Resampling Inference With Complex Survey Data", JASA 83, 1988, section 4: of a tag's n prompts n - 1 are drawn, which
        makes the variance unbiased; the usual n draws halve the variance of a tag with two prompts.
    """
    return _bootstrap(_cluster(values, prompt_id, tag), draws=draws, seed=seed, confidence=confidence)


def paired_difference(
    base: ArrayLike,
    tuned: ArrayLike,
    prompt_id: ArrayLike,
    tag: Sequence[str],
    *,
    draws: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Difference:
    """Estimate tuned minus base on the same prompts and the same noise, with intervals and a permutation test.

    The p-value is that of a sign-flip test on the differences of prompts, so that it too takes the prompt as the unit. (McNemar's test on
    pooled images rejects true null hypotheses in 7 to 17 % of cases instead of 5 %.) It cannot fall below ``1 / (draws + 1)``. Tags have p-values of
    their own, which :func:`holm` corrects where several are looked at.

    Args:
        base: One score for each image of the first model.
        tuned: The scores of the second model; row i has the same prompt and noise as row i of ``base``.
        prompt_id: As in :func:`bootstrap`, for both.
        tag: As in :func:`bootstrap`, for both.
        draws: Number of bootstrap draws, and of sign flips.
        seed: The same seed gives the same result.
        confidence: Nominal coverage of the intervals.

    Returns:
        Means and intervals of the difference; positive where the second model is better.

    Raises:
        ValueError: As in :func:`bootstrap`, and if the two models have different numbers of images.
    """
    first, second = np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"tuned: got shape {second.shape}, needed that of base, {first.shape} (same prompts and seeds)")
    tags = _cluster(second - first, prompt_id, tag)
    scores = _bootstrap(tags, draws=draws, seed=seed, confidence=confidence)
    return Difference(
        overall=scores.overall,
        micro=scores.micro,
        per_tag=scores.per_tag,
        num_prompts=scores.num_prompts,
        num_images=scores.num_images,
        p_value=_sign_flip(tags, draws=draws, seed=seed),
        p_value_per_tag={tag.name: _sign_flip([tag], draws=draws, seed=seed) for tag in tags},
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p-values of several tests so that the chance of any false finding among them stays what it is for one.

    Args:
        p_values: By name, each in [0, 1]; the tests may depend on each other.

    Raises:
        ValueError: If one is no probability.

    References:
        Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6, 1979.

    Examples:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    bad = next((name for name, value in p_values.items() if not 0 <= value <= 1), None)
    if bad is not None:
        raise ValueError(f"p_values: {bad}: got {p_values[bad]}, needed a value in [0, 1]")
    corrected: dict[str, float] = {}
    least = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[name]))
        corrected[name] = least
    return {name: corrected[name] for name in p_values}


def seed_spread(values: Sequence[float]) -> Spread:
    """Return the mean and the range of a score over training seeds, which no interval over images covers.

    Raises:
        ValueError: If there are fewer than two seeds, or a value is not finite.

    Examples:
        >>> seed_spread([0.5, 0.7, 0.6])
        Spread(mean=0.6, low=0.5, high=0.7, num_seeds=3)
    """
    if len(values) < 2:
        raise ValueError(f"values: got {len(values)} training seeds, needed at least 2 (better 3) to speak of a spread")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"values: got one that is not finite: {list(values)}")
    return Spread(mean=math.fsum(values) / len(values), low=min(values), high=max(values), num_seeds=len(values))


def seed_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Estimate the mean over all training seeds from a few, by Student's t.

    Args:
        values: A score of each seed. One seed gives a mean without interval.
        confidence: Nominal coverage, for scores that are normal over seeds.

    Raises:
        ValueError: If there are none, or one is not finite.

    Examples:
        >>> print(seed_interval([0.5, 0.7, 0.6]))
        0.600 [0.352, 0.848]
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"values: got {list(values)}, needed at least one and all finite")
    mean, freedom = math.fsum(values) / len(values), len(values) - 1
    if freedom == 0:
        return Interval(mean=mean)
    half = _student_quantile(freedom, confidence) * math.sqrt(_error_square(values))
    return Interval(mean=mean, low=mean - half, high=mean + half)


def seed_difference_interval(base: Sequence[float], tuned: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Estimate the difference of two recipes' means over all training seeds from a few of each, by Welch's t.

    Args:
        base: A score of each seed of one recipe, at least two.
        tuned: The same of the other. The seeds of the two have nothing to do with each other, and their spreads may differ.
        confidence: Nominal coverage, for scores that are normal over seeds.

    Returns:
        The mean of ``tuned`` minus that of ``base``.

    Raises:
        ValueError: If one has fewer than two, or one is not finite.

    References:
        Welch, "The generalization of 'Student's' problem when several different population variances are involved", Biometrika 34, 1947.

    Examples:
        >>> print(seed_difference_interval([0.5, 0.6, 0.7], [0.7, 0.9, 1.1]))
        0.300 [-0.116, 0.716]
    """
    if min(len(base), len(tuned)) < 2 or not all(math.isfinite(value) for value in (*base, *tuned)):
        raise ValueError(f"base, tuned: got {list(base)} and {list(tuned)}, needed at least two of each and all finite")
    mean = math.fsum(tuned) / len(tuned) - math.fsum(base) / len(base)
    squares = [_error_square(values) for values in (base, tuned)]
    if sum(squares) == 0:
        return Interval(mean=mean, low=mean, high=mean)
    freedom = sum(squares) ** 2 / sum(square**2 / (len(values) - 1) for square, values in zip(squares, (base, tuned), strict=True))
    half = _student_quantile(freedom, confidence) * math.sqrt(sum(squares))
    return Interval(mean=mean, low=mean - half, high=mean + half)


def _error_square(values: Sequence[float]) -> float:
    """Return the squared standard error of a mean."""
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)


def _student_quantile(freedom: float, confidence: float) -> float:
    """Return what |t| stays below with a probability; ``freedom`` at least 1."""
    # With t = sqrt(df) tan(a) the density of |t| is proportional to cos(a)^(df - 1).
    angle = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(confidence, mass / mass[-1], angle)))


def images_needed(
    half_width: float,
    *,
    score: float = 0.5,
    images_per_prompt: int = 4,
    correlation: float = 0.5,
    confidence: float = 0.95,
) -> int:
    """Return how many images give a macro score the wanted half-width of its interval.

    For a pass rate with equally many images in each tag. Tags that differ in difficulty need somewhat fewer, so this is on the safe side.

    Args:
        half_width: Wanted half-width, for example 0.02.
        score: Expected score; 0.5 is the worst case.
        images_per_prompt: More images of one prompt say less than more prompts.
        correlation: Correlation of two images of one prompt; 0.5 is typical of text-to-image models.
        confidence: Nominal coverage.

    Returns:
        The number of images, a multiple of ``images_per_prompt``.

    Raises:
        ValueError: If an argument is out of range.

    References:
        The design effect ``1 + (k - 1) correlation`` of Kish, "Survey Sampling", 1965.

    Examples:
        >>> images_needed(0.02, score=0.64, images_per_prompt=1)
        2213
        >>> images_needed(0.02, score=0.64, images_per_prompt=4)
        5532
    """
    for name, value in {"half_width": half_width, "score": score, "confidence": confidence}.items():
        if not 0 < value < 1:
            raise ValueError(f"{name}: must lie between 0 and 1, got {value}")
    if images_per_prompt < 1 or not 0 <= correlation <= 1:
        raise ValueError(f"needed images_per_prompt >= 1 and correlation in [0, 1], got {images_per_prompt}, {correlation}")
    quantile = NormalDist().inv_cdf(0.5 + confidence / 2)
    design_effect = 1 + (images_per_prompt - 1) * correlation
    num_prompts = score * (1 - score) * design_effect * (quantile / half_width) ** 2 / images_per_prompt
    return math.ceil(num_prompts) * images_per_prompt


def _cluster(values: ArrayLike, prompt_id: ArrayLike, tag: Sequence[str]) -> list[_Tag]:
    score, prompt, names = np.asarray(values, dtype=np.float64), np.asarray(prompt_id), np.asarray(tag)
    if score.ndim != 1 or len(score) == 0:
        raise ValueError(f"values: got shape {score.shape}, needed one score for each of at least one image")
    if prompt.shape != score.shape or names.shape != score.shape:
        raise ValueError(f"got {len(score)} values, {prompt.shape} prompt ids and {names.shape} tags, needed as many of each")
    if not np.isfinite(score).all():
        raise ValueError(f"values: got {int((~np.isfinite(score)).sum())} that are not finite; leave out images without a score")
    # Sorted to the last key, so that sums are added in one order however the rows came.
    order = np.lexsort((score, prompt, names))
    score, prompt, names = score[order], prompt[order], names[order]
    start = np.flatnonzero(np.r_[True, (prompt[1:] != prompt[:-1]) | (names[1:] != names[:-1])])
    if len(start) != len(np.unique(prompt)):
        raise ValueError("tag: a prompt id has two tags; the prompt decides the tag")
    sums, counts = np.add.reduceat(score, start), np.diff(np.r_[start, len(score)]).astype(np.float64)
    return [_Tag(name=str(name), sums=sums[names[start] == name], counts=counts[names[start] == name]) for name in np.unique(names)]


def _bootstrap(tags: Sequence[_Tag], *, draws: int, seed: int, confidence: float) -> Scores:
    if draws < 1 or not 0 < confidence < 1:
        raise ValueError(f"needed draws >= 1 and confidence between 0 and 1, got {draws} and {confidence}")
    tail = (1 - confidence) / 2

    def interval(mean: float, sample: NDArray[np.float64], is_known: bool) -> Interval:
        if not is_known:
            return Interval(mean=mean)
        low, high = np.quantile(sample, [tail, 1 - tail])
        return Interval(mean=mean, low=float(low), high=float(high))

    drawn = {tag.name: _resample(tag, draws=draws, seed=seed) for tag in tags}
    means = {name: sums / counts for name, (sums, counts) in drawn.items()}
    is_known = {tag.name: len(tag.sums) > 1 for tag in tags}
    total_sums = sum((sums for sums, _ in drawn.values()), np.zeros(draws))
    total_counts = sum((counts for _, counts in drawn.values()), np.zeros(draws))
    num_images = {tag.name: int(tag.counts.sum()) for tag in tags}
    micro = sum(float(tag.sums.sum()) for tag in tags) / sum(num_images.values())
    macro = sum(tag.mean for tag in tags) / len(tags)
    return Scores(
        overall=interval(macro, sum(means.values(), np.zeros(draws)) / len(tags), all(is_known.values())),
        micro=interval(micro, total_sums / total_counts, all(is_known.values())),
        per_tag={tag.name: interval(tag.mean, means[tag.name], is_known[tag.name]) for tag in tags},
        num_prompts={tag.name: len(tag.sums) for tag in tags},
        num_images=num_images,
    )


def _resample(tag: _Tag, *, draws: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums and counts of resampled prompts, one for each draw, scaled to the size of the tag."""
    num = len(tag.sums)
    if num == 1:
        return np.full(draws, tag.sums[0]), np.full(draws, tag.counts[0])
    generator = np.random.default_rng(key(seed, "bootstrap", tag.name))
    scale = num / (num - 1)
    parts = []
    for size in _chunks(draws, num):
        index = generator.integers(num, size=(size, num - 1))
        parts.append((tag.sums[index].sum(1) * scale, tag.counts[index].sum(1) * scale))
    return np.concatenate([sums for sums, _ in parts]), np.concatenate([counts for _, counts in parts])


def _sign_flip(tags: Sequence[_Tag], *, draws: int, seed: int) -> float:
    share = np.concatenate([tag.sums / (tag.counts.sum() * len(tags)) for tag in tags])
    observed = abs(float(share.sum()))
    tolerance = 1e-12 * float(np.abs(share).sum())  # the same sum in another order must count as equal
    generator = np.random.default_rng(key(seed, "sign flip"))
    num_extreme = 0
    for size in _chunks(draws, len(share)):
        signs = generator.integers(2, size=(size, len(share)), dtype=np.int8) * 2.0 - 1.0
        num_extreme += int((np.abs(signs @ share) >= observed - tolerance).sum())
    return (1 + num_extreme) / (1 + draws)


def _chunks(draws: int, width: int) -> Iterator[int]:
    size = max(1, _CHUNK // width)
    for start in range(0, draws, size):
        yield min(size, draws - start)
