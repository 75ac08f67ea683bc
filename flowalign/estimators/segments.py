"""Segmented statistics: the one kernel behind every baseline and every scale.

Rows that share a key form a segment. Prompts, siblings in a tree, depths, anchor states, timesteps and the
whole batch are only different keys. NaN marks a value that was not computed; it is left out everywhere.
Everything is float64 and summed in row order, so equal rows in an equal order give equal bits.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

RTOL = 1e-6  # Relative range below which a segment counts as flat; float32 rounding is near 1e-7.


@dataclass(frozen=True, kw_only=True)
class SegmentStats:
    """Count, mean, sum of squared deviations, minimum and maximum of each segment and reward.

    Shapes:
        index: ``[rows]``, the segment of each row.
        count, mean, m2, minimum, maximum: ``[segments, rewards]``; the mean of nothing is NaN.
    """

    index: Int[Tensor, " rows"]
    count: Float[Tensor, "segments rewards"]
    mean: Float[Tensor, "segments rewards"]
    m2: Float[Tensor, "segments rewards"]
    minimum: Float[Tensor, "segments rewards"]
    maximum: Float[Tensor, "segments rewards"]

    def variance(self, *, ddof: int) -> Float[Tensor, "segments rewards"]:
        """Divide the squared deviations by ``count - ddof``; too few values give 0."""
        return self.m2 / (self.count - ddof).clamp(min=1)

    @cached_property
    def is_flat(self) -> Bool[Tensor, "segments rewards"]:
        """Which segments have no contrast, by their range and never by ``std == 0``.

        In float32 twelve equal rewards of 21.7 have a standard deviation above 0, and dividing by it would
        turn rounding into advantages of order 1. Segments of fewer than two values are flat.
        """
        return _no_contrast(self.minimum, self.maximum)

    def rows(self, per_segment: Tensor) -> Tensor:
        """Spread one value per segment over the rows of the segment."""
        return per_segment.index_select(0, self.index)  # several times faster than indexing


class Segments:
    """Rows in numbered segments, which many tables share.

    Attributes:
        index: ``[rows]``, the segment of each row, numbered from 0 without a gap.
        num: Number of segments.
    """

    def __init__(self, index: Int[Tensor, " rows"], num: int) -> None:
        self.index, self.num = index, num

    @cached_property
    def size(self) -> Int[Tensor, " segments"]:
        """Rows of each segment."""
        return torch.bincount(self.index, minlength=self.num)

    @cached_property
    def is_sorted(self) -> bool:
        """Whether segments lie one after the other."""
        return self.num == 1 or bool((self.index[1:] >= self.index[:-1]).all())

    def reduce(self, x: Float[Tensor, "rows rewards"], how: Literal["sum", "min", "max"]) -> Float[Tensor, "segments rewards"]:
        """Reduce each segment in the order of its rows; nothing gives 0, inf or -inf.

        Of segments that lie one after the other several times faster, with the same bits.
        """
        if self.is_sorted:
            return torch.segment_reduce(x, how, lengths=self.size, axis=0, unsafe=True)
        start = x.new_full((self.num, x.shape[1]), {"sum": 0.0, "min": torch.inf, "max": -torch.inf}[how])
        if how == "sum":
            return start.index_add(0, self.index, x)
        return start.scatter_reduce(0, self.index[:, None].expand_as(x), x, f"a{how}")


def segment_stats(x: Float[Tensor, "rows rewards"], key: Int[Tensor, " rows"] | Segments) -> SegmentStats:
    """Compute the statistics of every segment of rows.

    Args:
        x: One row per sample, node or step, one column per reward; NaN is left out.
        key: Rows with equal keys form a segment. Any int64, contiguous or not; or the segments themselves.

    Returns:
        Statistics per segment, in increasing order of the key.

    Examples:
        >>> x = torch.tensor([[1.0], [5.0], [3.0], [float("nan")]], dtype=torch.float64)
        >>> stats = segment_stats(x, torch.tensor([2**62, 7, 2**62, 7]))
        >>> stats.mean.flatten().tolist(), stats.count.flatten().tolist()
        ([5.0, 2.0], [1.0, 2.0])
        >>> stats.variance(ddof=1).flatten().tolist()
        [0.0, 2.0]
    """
    segments = key if isinstance(key, Segments) else Segments(*compact(key))
    index, num, reduce = segments.index, segments.num, segments.reduce
    known = ~torch.isnan(x)
    complete = bool(known.all())
    filled = x if complete else torch.where(known, x, 0.0)
    count = segments.size[:, None].to(x.dtype).expand(num, x.shape[1]) if complete else reduce(known.to(x.dtype), "sum")
    mean = reduce(filled, "sum") / count
    # Two passes with Bjorck's correction: a naive sum of squares loses the std of 1e4 +- 1e-3 rewards.
    deviation = filled - mean.index_select(0, index)
    deviation = deviation if complete else torch.where(known, deviation, 0.0)
    drift = reduce(deviation, "sum")
    m2 = reduce(deviation.square(), "sum") - drift.square() / count.clamp(min=1)
    low = reduce(x if complete else torch.where(known, x, torch.inf), "min")
    high = reduce(x if complete else torch.where(known, x, -torch.inf), "max")
    return SegmentStats(index=index, count=count, mean=mean, m2=m2.clamp(min=0), minimum=low, maximum=high)


def flat_segments(x: Float[Tensor, "rows rewards"], segments: Segments) -> Bool[Tensor, "segments rewards"]:
    """Tell which segments have no contrast, as ``SegmentStats.is_flat`` does, from their extremes alone; NaN is left out."""
    unknown = torch.isnan(x)
    low = segments.reduce(torch.where(unknown, torch.inf, x), "min")
    high = segments.reduce(torch.where(unknown, -torch.inf, x), "max")
    return _no_contrast(low, high)


def _no_contrast(low: Tensor, high: Tensor) -> Tensor:
    return high - low <= RTOL * torch.maximum(low.abs(), high.abs())  # no value: -inf; one value: 0


def segment_ranks(x: Float[Tensor, "rows rewards"], key: Int[Tensor, " rows"]) -> Float[Tensor, "rows rewards"]:
    """Number the values of each segment upwards from 0.

    Ties keep the order of the rows, which inside an estimator is the order of ``sample_uid``.

    Args:
        x: Values; NaN gets rank NaN.
        key: Rows with equal keys form a segment.

    Returns:
        The rank of each value inside its segment and column.

    Examples:
        >>> x = torch.tensor([[0.5], [0.1], [0.5], [9.0]], dtype=torch.float64)
        >>> segment_ranks(x, torch.tensor([3, 3, 3, 8])).flatten().tolist()
        [1.0, 0.0, 2.0, 0.0]
    """
    index, num = compact(key)
    order, start = _sort(x, index, num)
    position = torch.arange(x.shape[0], device=x.device)[:, None].expand_as(order)
    place = torch.empty_like(order).scatter(0, order, position) - start[index][:, None]
    return torch.where(torch.isnan(x), torch.nan, place.to(x.dtype))


def settle_ties(x: Float[Tensor, "rows rewards"], key: Int[Tensor, " rows"]) -> Float[Tensor, "rows rewards"]:
    """Make values of a segment equal that differ by rounding only, so that comparing them does not turn noise into order.

    Neighbours in size within ``RTOL`` of each other become the smallest of their run: equality stays transitive.

    Args:
        x: Values; NaN stays NaN.
        key: Rows with equal keys form a segment.

    Examples:
        >>> x = torch.tensor([[1.0], [0.3], [0.1 + 0.2], [0.3]], dtype=torch.float64)
        >>> settle_ties(x, torch.tensor([0, 0, 0, 1])).flatten().tolist()
        [1.0, 0.3, 0.3, 0.3]
    """
    index, num = compact(key)
    order, _ = _sort(x, index, num)
    ordered, segment = x.gather(0, order), index[order]
    low, high = ordered[:-1], ordered[1:]
    near = (high - low <= RTOL * torch.maximum(low.abs(), high.abs())) & (segment[1:] == segment[:-1])
    first = torch.cat([torch.ones_like(near[:1]), ~near]) if len(x) else torch.zeros_like(x, dtype=torch.bool)
    row = torch.arange(len(x), device=x.device)[:, None].expand_as(order)
    start = torch.where(first, row, 0).cummax(0).values
    return torch.empty_like(x).scatter(0, order, ordered.gather(0, start))


def segment_medians(x: Float[Tensor, "rows rewards"], key: Int[Tensor, " rows"]) -> Float[Tensor, "segments rewards"]:
    """Compute the median of every segment; an even count gives the midpoint of the two in the middle.

    Args:
        x: Values; NaN is left out.
        key: Rows with equal keys form a segment.

    Returns:
        One row per segment, in increasing order of the key; the median of nothing is NaN.

    Examples:
        >>> x = torch.tensor([[4.0], [1.0], [2.0], [7.0]], dtype=torch.float64)
        >>> segment_medians(x, torch.tensor([0, 0, 0, 5])).flatten().tolist()
        [2.0, 7.0]
    """
    index, num = compact(key)
    order, start = _sort(x, index, num)
    ordered = x.gather(0, order)
    known = (~torch.isnan(x)).to(torch.int64)
    count = known.new_zeros(num, x.shape[1]).index_add(0, index, known)
    low = start[:, None] + (count - 1).clamp(min=0) // 2
    high = start[:, None] + count // 2
    # Unknown values sort last, so the first of a segment is NaN exactly when the whole segment is.
    return (ordered.gather(0, low) + ordered.gather(0, high)) / 2


def segment_pairs(key: Int[Tensor, " rows"]) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """List every ordered pair of different rows that share a key.

    The list is as long as the groups are wide, so a ragged batch costs the sum of the squares of its groups and no padding.

    Args:
        key: Rows with equal keys form a segment.

    Returns:
        Left and right row of each pair, by increasing left row and then right row.

    Examples:
        >>> left, right = segment_pairs(torch.tensor([5, 8, 5]))
        >>> left.tolist(), right.tolist()
        ([0, 2], [2, 0])
    """
    index, num = compact(key)
    by_segment = torch.argsort(index, stable=True)
    size = torch.bincount(index, minlength=num)
    start = size.cumsum(0) - size
    mates = size[index]
    left = torch.arange(len(key), device=key.device).repeat_interleave(mates)
    place = torch.arange(len(left), device=key.device) - (mates.cumsum(0) - mates)[left]
    right = by_segment[start[index][left] + place]
    return left[left != right], right[left != right]


def segment_starts(key: Int[Tensor, " rows"]) -> Int[Tensor, " segments"]:
    """Return the first row of each segment, in increasing order of the row.

    Sums over segments that go in this order do not depend on the values of the keys, to the last bit.

    Examples:
        >>> segment_starts(torch.tensor([9, 9, 4, 9, 4])).tolist()
        [0, 2]
    """
    index, num = compact(key)
    row = torch.arange(len(key), device=key.device)
    return torch.full((num,), len(key), device=key.device).scatter_reduce(0, index, row, "amin").sort().values


def compact(key: Int[Tensor, " rows"]) -> tuple[Int[Tensor, " rows"], int]:
    """Number the keys from 0 in increasing order; small ones by counting, which needs no sorting."""
    if key.numel() and int(key.min()) >= 0 and int(key.max()) < 4 * key.numel():
        present = torch.bincount(key) > 0
        index = present.cumsum(0) - 1
        return (key if bool(present.all()) else index[key]), int(index[-1]) + 1
    unique, index = torch.unique(key, return_inverse=True)
    return index, unique.numel()


def _sort(x: Tensor, index: Tensor, num: int) -> tuple[Int[Tensor, "rows rewards"], Int[Tensor, " segments"]]:
    """Order the rows by segment, then value, then row; also return where each segment starts."""
    by_value = torch.argsort(x, dim=0, stable=True)
    by_segment = torch.argsort(index[by_value], dim=0, stable=True)
    size = torch.bincount(index, minlength=num)
    return by_value.gather(0, by_segment), size.cumsum(0) - size
