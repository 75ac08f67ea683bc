"""What a score is: means with intervals, plain data that every other module of the package can hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and its confidence interval; ``low`` and ``high`` are None where the data cannot say (a tag with one prompt)."""

    mean: float
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """Return the interval as JSON wants it."""
        return {"mean": self.mean, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        """Write ``0.317 [0.284, 0.351]``."""
        if self.low is None or self.high is None:
            return f"{self.mean:.3f} [no interval]"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model scored.

    Attributes:
        overall: Macro mean: the unweighted mean of the tags.
        micro: Mean over all images.
        per_tag: Mean over the images of each tag.
        num_prompts: Number of distinct prompts of each tag.
        num_images: Number of images of each tag.
    """

    overall: Interval
    micro: Interval
    per_tag: dict[str, Interval]
    num_prompts: dict[str, int]
    num_images: dict[str, int]

    def as_dict(self) -> dict[str, object]:
        """Return the intervals as JSON wants them."""
        per_tag = {tag: interval.as_dict() for tag, interval in self.per_tag.items()}
        return {"overall": self.overall.as_dict(), "micro": self.micro.as_dict(), "per_tag": per_tag}


@dataclass(frozen=True, kw_only=True)
class Difference(Scores):
    """Tuned minus base on the same prompts and seeds.

    Attributes:
        p_value: Two-sided, for the overall difference.
        p_value_per_tag: The same for the difference of each tag alone, not corrected for their number.
    """

    p_value: float
    p_value_per_tag: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        """Return ``mean``, ``low``, ``high`` and ``p_value`` of the macro difference, and ``micro``, ``per_tag`` and ``p_value_per_tag``."""
        parts = super().as_dict()
        return {
            **self.overall.as_dict(),
            "p_value": self.p_value,
            "micro": parts["micro"],
            "per_tag": parts["per_tag"],
            "p_value_per_tag": dict(self.p_value_per_tag),
        }


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and range over training seeds."""

    mean: float
    low: float
    high: float
    num_seeds: int
