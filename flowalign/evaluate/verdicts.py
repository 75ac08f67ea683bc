"""What comparisons show, in words: corrected for the number of tests, and with the spread between training seeds apart from the noise of evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, variance
from typing import Any

from flowalign.evaluate.records import Evaluation, Measure, compare_runs, deviations
from flowalign.evaluate.scores import Difference, Interval
from flowalign.evaluate.statistics import seed_difference_interval, seed_interval


def verdict(difference: Difference, *, resolution: float, p_value: float | None = None, num_tests: int = 1) -> str:
    """Say in words what a paired difference shows, and how many images would show one of ``resolution``.

    Something is shown where interval and test agree: few prompts make intervals that are too narrow, and the sign-flip test knows how few they are.

    The number scales the interval at hand with the square root of the number of prompts, at as many images a prompt.

    Args:
        difference: The difference.
        resolution: A difference that one wants to see.
        p_value: Corrected for the number of tests, from :func:`flowalign.evaluate.statistics.holm`; None for the test's own.
        num_tests: How many tests were corrected for.

    Raises:
        ValueError: If the resolution is not positive.
    """
    check_resolution(resolution)
    found, p = difference.overall, difference.p_value if p_value is None else p_value
    if found.low is None or found.high is None:
        return f"undecided: {found.mean:+.3f}, but a tag with one prompt allows no interval; evaluate more prompts"
    apart = found.low > 0 or found.high < 0
    word = "undecided" if not apart or p >= 0.05 else "better" if found.low > 0 else "worse"
    said = f"{word}: {found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{'' if apart else ' covers 0'}, sign-flip p = {difference.p_value:.4f}"
    if num_tests > 1:
        said += f" ({p:.4f} by Holm over {num_tests} tests)"
    if apart and word == "undecided":
        said += " (too few prompts)" if difference.p_value >= 0.05 else " (too many tests for it)"
    return f"{said}; {_images_for(difference, (found.high - found.low) / 2, resolution)}"


def check_resolution(resolution: float) -> None:
    """Refuse a difference that nobody can want to see.

    Raises:
        ValueError: If the resolution is not a positive number.
    """
    if not 0 < resolution < math.inf:
        raise ValueError(f"resolution: got {resolution}, needed a positive difference of scores")


def _images_for(difference: Difference, half: float, resolution: float) -> str:
    num = sum(difference.num_images.values())
    wanted = max(math.ceil(num * (half / resolution) ** 2), 1)
    return f"{num} images resolve +-{half:.3f}, and +-{resolution:g} needs about {wanted} (more prompts of the same kinds)"


@dataclass(frozen=True, kw_only=True)
class SeedGains:
    """What runs of one recipe from several training seeds gained over a base, or over the training seeds of another recipe.

    Attributes:
        gains: Of each run over the mean of the bases, in the order given.
        num_bases: Number of bases.
        over_seeds: Their mean, with Student's t interval, or Welch's where there are several bases: it speaks of new training seeds on prompts like these.
        over_prompts: The same mean with its interval over prompts: it speaks of new prompts, and of these training seeds alone.
        spread: Standard deviation of the gains over seeds (ddof 1).
        noise: What of it the finite number of prompts and images makes alone; None where a tag with one prompt does not say.
    """

    gains: tuple[float, ...]
    num_bases: int
    over_seeds: Interval
    over_prompts: Difference
    spread: float
    noise: float | None

    @property
    def training(self) -> float | None:
        """Standard deviation between training seeds without the noise of evaluation, at least 0."""
        return None if self.noise is None else math.sqrt(max(0.0, self.spread**2 - self.noise**2))

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON wants it."""
        return {**asdict(self), "over_prompts": self.over_prompts.as_dict(), "training": self.training}


def seed_gains(bases: Sequence[Evaluation], runs: Sequence[Evaluation], *, measure: Measure) -> SeedGains:
    """Compare runs of one recipe with a base, or with runs of another recipe: what they gained, and how much training seeds and evaluation make it vary.

    The noise is of the deviations of runs from their mean: prompts that are easy for all of them cancel there.

    Args:
        bases: The base; or models of another recipe from at least two training seeds of its own.
        runs: Models from at least two training seeds, on the same prompts and noise.
        measure: Which score.

    Raises:
        ValueError: If there are fewer than two runs or no base, or they were not evaluated on the same images.
    """
    if len(runs) < 2:
        raise ValueError(f"runs: got {len(runs)}, needed models from at least 2 training seeds (better 3) to speak of a spread")
    if not bases:
        raise ValueError("bases: got none, needed a base or models from several training seeds of another recipe")
    gains = tuple(compare_runs([(base, run) for base in bases], measure=measure).overall.mean for run in runs)
    quantile = NormalDist().inv_cdf(0.975)
    squares = []
    for found in deviations(runs, measure=measure):
        if found.overall.low is None or found.overall.high is None:
            break
        squares.append(((found.overall.high - found.overall.low) / (2 * quantile)) ** 2)
    # A deviation from the mean of n runs has (n - 1) / n of the variance of a run.
    noise = math.sqrt(sum(squares) / (len(runs) - 1)) if len(squares) == len(runs) else None
    return SeedGains(
        gains=gains,
        num_bases=len(bases),
        over_seeds=_over_seeds(bases, runs, gains, measure),
        over_prompts=compare_runs([(base, run) for base in bases for run in runs], measure=measure),
        spread=math.sqrt(variance(gains)),
        noise=noise,
    )


def _over_seeds(bases: Sequence[Evaluation], runs: Sequence[Evaluation], gains: Sequence[float], measure: Measure) -> Interval:
    if len(bases) == 1:
        return seed_interval(gains)
    # Of each base what it is above the first: prompts on which all are alike do not count, and runs are measured from there too.
    levels = [compare_runs([(bases[0], base)], measure=measure).overall.mean for base in bases]
    mean = sum(levels) / len(levels)
    return seed_difference_interval([level - mean for level in levels], gains)


def verdict_over_seeds(found: SeedGains, *, resolution: float, p_value: float | None = None, num_tests: int = 1) -> str:
    """Say in words what runs of several training seeds show, and how many seeds and images would show a difference of ``resolution``.

    Something is shown where the interval over seeds, the interval over prompts and the test over prompts agree.

    Args:
        found: The runs.
        resolution: A difference that one wants to see.
        p_value: Of the test over prompts, corrected for the number of tests; None for the test's own.
        num_tests: How many tests were corrected for.

    Raises:
        ValueError: If the resolution is not positive.
    """
    check_resolution(resolution)
    seeds, prompts = found.over_seeds, found.over_prompts.overall
    assert seeds.low is not None
    assert seeds.high is not None
    if prompts.low is None or prompts.high is None:
        return f"undecided: {seeds.mean:+.3f}, but a tag with one prompt allows no interval; evaluate more prompts"
    p = found.over_prompts.p_value if p_value is None else p_value
    is_better, is_worse = min(seeds.low, prompts.low) > 0, max(seeds.high, prompts.high) < 0
    word = "undecided" if not (is_better or is_worse) or p >= 0.05 else "better" if is_better else "worse"
    half = (seeds.high - seeds.low) / 2
    num = len(found.gains)
    wanted = max(math.ceil(num * (half / resolution) ** 2), 2)
    against = f" against {found.num_bases}" if found.num_bases > 1 else ""
    corrected = f", {p:.4f} by Holm over {num_tests} tests" if num_tests > 1 else ""
    noise = "" if found.noise is None else f", of which evaluation alone makes {found.noise:.3f}"
    return (
        f"{word}: {seeds.mean:+.3f}, over {num}{against} training seeds [{seeds.low:+.3f}, {seeds.high:+.3f}], over prompts [{prompts.low:+.3f}, {prompts.high:+.3f}] "
        f"(sign-flip p = {found.over_prompts.p_value:.4f}{corrected}); gains vary by {found.spread:.3f} between seeds{noise}; {num} seeds resolve +-{half:.3f}, "
        f"and +-{resolution:g} needs at most about {wanted}; apart from seeds {_images_for(found.over_prompts, (prompts.high - prompts.low) / 2, resolution)}"
    )
