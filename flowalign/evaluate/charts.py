"""Geometry of the report's line charts: numbers to coordinates, ticks and paths. Drawing and escaping are the template's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 440, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 14, 10, 38
_MAX_HOVER = 120  # points with a hover title in a curve; more would only make the file large


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One series; ``low`` and ``high`` give it a band. Points that are not finite are left out and break the line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Refuse columns of different lengths.

        Raises:
            ValueError: If the lengths differ, or only one edge of the band is given.
        """
        columns = [self.x, self.y, *(c for c in (self.low, self.high) if c is not None)]
        if len({len(column) for column in columns}) != 1 or len(columns) == 3:
            raise ValueError(f"curve {self.name!r}: x, y, low and high must have one length (low and high both or neither)")


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Several curves in one picture."""

    title: str
    curves: Sequence[Curve]
    x_label: str = "step"
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Point:
    """A place with a hover title."""

    x: float
    y: float
    title: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """A drawn curve: SVG paths, and points for hovering."""

    name: str
    path: str
    band: str
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A chart in coordinates of a ``WIDTH`` x ``HEIGHT`` picture."""

    title: str
    caption: str
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM
    width: float = WIDTH
    height: float = HEIGHT


def curve_from_log(
    rows: Sequence[Mapping[str, Any]], key: str, *, name: str | None = None, x: str = "step", half: str | None = None
) -> Curve:
    """Take a series out of the rows of a run's ``log.jsonl``; rows without it are left out.

    With ``half``, the name of another column, the series has a band of so much on both sides, if all its rows have that column.

    Examples:
        >>> curve_from_log([{"step": 1, "loss": 0.5}, {"step": 2}, {"step": 3, "loss": 0.25}], "loss").y
        [0.5, 0.25]
    """
    found = [row for row in rows if row.get(x) is not None and row.get(key) is not None]
    places, values = ([float(row[column]) for row in found] for column in (x, key))
    widths = [float(row[half]) for row in found if row.get(half) is not None] if half is not None else []
    if not widths or len(widths) < len(values):
        return Curve(name=name or key, x=places, y=values)
    low, high = ([value + sign * width for value, width in zip(values, widths, strict=True)] for sign in (-1, 1))
    return Curve(name=name or key, x=places, y=values, low=low, high=high)


def ticks(low: float, high: float, *, num: int = 4) -> list[float]:
    """Return about ``num`` round numbers from at most ``low`` to at least ``high``.

    Examples:
        >>> ticks(0.13, 0.58)
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
        >>> ticks(0, 100)
        [0, 20, 40, 60, 80, 100]
    """
    if not high > low:
        reach = abs(low) * 0.1 or 1.0
        low, high = low - reach, high + reach
    rough = (high - low) / num
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * 0.75)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    places = [round(index * step, 12) for index in range(first, last + 1)]
    return [int(place) for place in places] if step >= 1 else places


def draw(chart: Chart) -> Drawing:
    """Turn a chart into coordinates.

    Examples:
        >>> drawing = draw(Chart(title="loss", curves=[Curve(name="a", x=[0, 4], y=[0, 4])]))
        >>> drawing.lines[0].path
        'M44.0 192.0L426.0 10.0'
    """
    xs = [v for curve in chart.curves for v in curve.x if math.isfinite(v)] or [0.0, 1.0]
    y_places = ticks(*_reach(chart.curves))
    x_low, x_high = min(xs), max(xs)
    x_places = [place for place in ticks(x_low, x_high, num=5) if x_low <= place <= x_high]
    x_span, y_span = (x_high - x_low) or 1.0, y_places[-1] - y_places[0]

    def at_x(value: float) -> float:
        return _LEFT + (value - x_low) / x_span * (WIDTH - _LEFT - _RIGHT)

    def at_y(value: float) -> float:
        value = min(max(value, y_places[0]), y_places[-1])
        return HEIGHT - _BOTTOM - (value - y_places[0]) / y_span * (HEIGHT - _TOP - _BOTTOM)

    lines = [_line(curve, at_x, at_y, chart.x_label) for curve in chart.curves]
    return Drawing(
        title=chart.title,
        caption=chart.caption,
        x_label=chart.x_label,
        x_ticks=tuple(Tick(at=at_x(place), label=_short(place)) for place in x_places),
        y_ticks=tuple(Tick(at=at_y(place), label=_short(place)) for place in y_places),
        lines=tuple(lines),
    )


def _reach(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return the values that a chart spans: those of all curves, and of their bands as far as these reach out by no more than the curves themselves do."""

    def finite(columns: Iterable[Sequence[float] | None]) -> list[float]:
        return [value for column in columns for value in column or () if math.isfinite(value)]

    values = finite(curve.y for curve in curves) or [0.0, 1.0]
    bands = finite(column for curve in curves for column in (curve.low, curve.high)) or values
    low, high = min(values), max(values)
    # One band that is much wider than everything else would flatten all curves: it is cut.
    most = (high - low) / 2 or math.inf
    return max(min(low, *bands), low - most), min(max(high, *bands), high + most)


def _line(curve: Curve, at_x: Callable[[float], float], at_y: Callable[[float], float], x_label: str) -> Line:
    triples = list(zip(curve.x, curve.y, [_finite(x, y) for x, y in zip(curve.x, curve.y, strict=True)], strict=True))
    stride = -(-len(triples) // _MAX_HOVER) or 1
    points = [
        Point(x=at_x(x), y=at_y(y), title=f"{curve.name}: {_short(y)} at {x_label} {_short(x)}")
        for x, y, is_finite in triples[::stride]
        if is_finite
    ]
    band = ""
    if curve.low is not None and curve.high is not None:
        rows = [row for row in zip(curve.x, curve.low, curve.high, strict=True) if _finite(*row)]
        outline = [(at_x(x), at_y(high)) for x, _, high in rows] + [(at_x(x), at_y(low)) for x, low, _ in rows[::-1]]
        band = _path(outline) + "Z" if outline else ""
    path = _path([(at_x(x), at_y(y)) if is_finite else None for x, y, is_finite in triples])
    return Line(name=curve.name, path=path, band=band, points=tuple(points))


def _finite(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)


def _path(places: Sequence[tuple[float, float] | None]) -> str:
    parts, is_down = [], False
    for place in places:
        if place is not None:
            parts.append(f"{'L' if is_down else 'M'}{place[0]:.1f} {place[1]:.1f}")
        is_down = place is not None
    return "".join(parts)


def _short(value: float) -> str:
    if value and not 1e-4 <= abs(value) < 1e5:
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
