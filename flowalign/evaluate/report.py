"""The report of a run: one HTML file with everything in it, that asks no network for anything."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import jinja2
from torch import Tensor

from flowalign.evaluate.charts import Chart, Drawing, draw, ticks
from flowalign.evaluate.records import Evaluation, Measure, compare
from flowalign.evaluate.scores import Interval
from flowalign.files import write_atomically
from flowalign.images import PNG, picture_bytes

_TEMPLATE = "report.html.jinja"
_PICTURE = "chart.svg.jinja"
_COLORS = ("#0b6e69", "#c2611f", "#4b5fb5", "#97478f", "#7a7320", "#5b626b")
_DASHES = ("none", "6 4", "2 4")


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The one result: what was measured, before and after, and the paired difference."""

    name: str
    base: Interval
    tuned: Interval
    difference: Interval
    p_value: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Images of one prompt before and after; column i of all has the same noise.

    Attributes:
        further: Name, images and verdicts of a third model.

    Shapes:
        base, tuned: ``[image, 3, h, w]`` in [0, 1].
    """

    prompt: str
    base: Tensor
    tuned: Tensor
    base_passed: Sequence[bool]
    tuned_passed: Sequence[bool]
    further: tuple[str, Tensor, Sequence[bool]] | None = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image and what is to be said of it.

    Attributes:
        data: A PNG or JPEG file.
        text: What it shows; also its alternative text.
        passed: Whether everything is right; None where there is no verdict.
        note: Its score, in words.
        clauses: Names of its prompt's sub-checks, and whether each holds.
    """

    data: bytes
    text: str
    passed: bool | None = None
    note: str = ""
    clauses: Sequence[tuple[str, bool]] = ()

    @property
    def uri(self) -> str:
        """The image as a part of the page."""
        return data_uri(self.data)


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Images under one heading; ``wide`` ones are grids themselves."""

    title: str
    pictures: Sequence[Picture]
    lead: str = ""
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One line of the table of scores; ``note`` says how many prompts and meanings stand behind it."""

    name: str
    note: str
    base: Interval
    tuned: Interval
    difference: Interval


@dataclass(frozen=True, kw_only=True)
class Share:
    """A part of the run's time."""

    name: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """A part of the run's floating-point operations."""

    name: str
    flops: float


@dataclass(frozen=True, kw_only=True)
class Table:
    """Any other table; every cell is text, the first of a row is its header."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        """Refuse rows of another length than the header.

        Raises:
            ValueError: If one has.
        """
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"table {self.title!r}: every row needs {len(self.columns)} cells, one for each column")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that stands in a report; parts that are empty are left out.

    Attributes:
        title: Main heading.
        subtitle: One line below it: model, algorithm, suite.
        names: What the two models are called that the headline, images and scores compare.
        headline: The one result.
        comparisons: Images before and after.
        scores: The table of scores; the last row is the overall score.
        galleries: Further images: over time, best and worst.
        charts: Curves of the run.
        charts_title: What stands over them.
        shares: Where the time went.
        work: Where the floating-point operations went.
        tables: Drift and whatever else is tabular.
        command: The exact command.
        configuration: The resolved configuration, YAML.
        versions: Names and versions of packages.
        hardware: Names and values.
        notes: Sentences that a reader must know to read the numbers rightly.
    """

    title: str
    subtitle: str = ""
    names: tuple[str, str] = ("base", "tuned")
    headline: Headline | None = None
    comparisons: Sequence[Comparison] = ()
    scores: Sequence[ScoreRow] = ()
    galleries: Sequence[Gallery] = ()
    charts: Sequence[Chart] = ()
    charts_title: str = "The run"
    shares: Sequence[Share] = ()
    work: Sequence[Work] = ()
    tables: Sequence[Table] = ()
    command: str = ""
    configuration: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def data_uri(data: bytes) -> str:
    """Return a PNG or JPEG file as a part of a page."""
    kind = "png" if data.startswith(PNG) else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def write_report(path: str | Path, report: Report) -> Path:
    """Write a report as one self-contained HTML file and return its path.

    All text is escaped, and a content policy in the file forbids it to load anything. The file appears whole or not at all.

    Raises:
        ValueError: If an image has a wrong shape or range (see :func:`flowalign.images.to_pil`), or a comparison's parts differ in length.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(report))
    return path


def write_svg(path: str | Path, chart: Chart) -> Path:
    """Write a chart as a picture of its own, with its legend, and return its path."""
    path = Path(path)
    path.write_text(_template(_PICTURE).render(drawing=draw(chart), colors=_COLORS, dashes=_DASHES), encoding="utf-8")
    return path


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(titled=_titled, signed=_signed, span=_span, place=_place, duration=_duration, p_value=_p_value)
    environment.tests["share"] = _is_share
    return environment.from_string(resources.files("flowalign.evaluate").joinpath(name).read_text(encoding="utf-8"))


def render(report: Report) -> str:
    """Return a report as HTML."""
    drawings: list[Drawing] = [draw(chart) for chart in report.charts]
    return _template(_TEMPLATE).render(
        report=report,
        cards=[_card(comparison, report.names) for comparison in report.comparisons],
        drawings=drawings,
        axis=_axis_of(report.headline),
        total_seconds=sum(share.seconds for share in report.shares),
        total_flops=sum(part.flops for part in report.work),
    )


def score_rows(base: Evaluation, tuned: Evaluation, *, measure: Measure = "strict") -> list[ScoreRow]:
    """Return the rows of the table of scores: each tag that has any, then the macro mean."""
    first, second, difference = base.scores(measure), tuned.scores(measure), compare(base, tuned)[measure]
    meanings = base.num_meanings()

    def note(num_prompts: int, num_meanings: int) -> str:
        return f"{num_prompts} prompts" + (f", {num_meanings} meanings" if num_meanings else "")

    rows = [
        ScoreRow(
            name=tag.replace("_", " "),
            note=note(first.num_prompts[tag], meanings.get(tag, 0)),
            base=first.per_tag[tag],
            tuned=second.per_tag[tag],
            difference=difference.per_tag[tag],
        )
        for tag in base.tags()
        if tag in difference.per_tag
    ]
    overall = note(sum(first.num_prompts.values()), sum(meanings.values()))
    return [
        *rows,
        ScoreRow(name="overall", note=overall, base=first.overall, tuned=second.overall, difference=difference.overall),
    ]


def headline(base: Evaluation, tuned: Evaluation, *, name: str, measure: Measure = "strict", note: str = "") -> Headline:
    """Return the headline of two evaluations."""
    difference = compare(base, tuned)[measure]
    return Headline(
        name=name,
        base=base.scores(measure).overall,
        tuned=tuned.scores(measure).overall,
        difference=difference.overall,
        p_value=difference.p_value,
        note=note,
    )


def comparisons(
    base: Evaluation,
    tuned: Evaluation,
    *,
    further: tuple[str, Evaluation] | None = None,
    prompts_per_tag: int = 2,
    num_images: int = 4,
) -> list[Comparison]:
    """Return before and after of the first prompts of each tag: chosen by their place in the suite, never by their outcome.

    Raises:
        ValueError: If the evaluations did not keep their images, or are not of the same images in the same order.
    """
    others = [tuned, *([] if further is None else [further[1]])]
    if base.images is None or tuned.images is None or any(other.images is None for other in others):
        raise ValueError("comparisons: the evaluations hold no images; run them with keep_images=True")
    if any([(r.id, r.k) for r in base.records] != [(r.id, r.k) for r in other.records] for other in others):
        raise ValueError("comparisons: needed two evaluations of the same prompts and images in the same order")
    rows: dict[str, dict[int, list[int]]] = {}
    for row, record in enumerate(base.records):
        rows.setdefault(record.tag, {}).setdefault(record.id, []).append(row)
    result = []
    for prompts in rows.values():
        for chosen in [row[:num_images] for row in list(prompts.values())[:prompts_per_tag]]:
            result.append(
                Comparison(
                    prompt=base.records[chosen[0]].prompt,
                    base=base.images[chosen],
                    tuned=tuned.images[chosen],
                    base_passed=[bool(base.passed(base.records[row])) for row in chosen],
                    tuned_passed=[bool(tuned.passed(tuned.records[row])) for row in chosen],
                    further=_third(further, chosen),
                )
            )
    return result


def _third(further: tuple[str, Evaluation] | None, chosen: Sequence[int]) -> tuple[str, Tensor, list[bool]] | None:
    if further is None or further[1].images is None:
        return None
    name, found = further
    assert found.images is not None
    return name, found.images[list(chosen)], [bool(found.passed(found.records[row])) for row in chosen]


_MANY = 320  # pixels of a width: a page of twelve prompts, four images and two models stays below 10 MB


def _card(comparison: Comparison, names: tuple[str, str]) -> dict[str, object]:
    sides = []
    further = [] if comparison.further is None else [comparison.further]
    for kind, name, images, passed in (
        ("base", names[0], comparison.base, comparison.base_passed),
        ("tuned", names[1], comparison.tuned, comparison.tuned_passed),
        *(("further", *third) for third in further),
    ):
        if len(images) != len(passed) or len(images) != len(comparison.base):
            raise ValueError(f"comparison {comparison.prompt!r}: needed as many {name} images as verdicts, and as base images")
        pictures = [
            {"uri": data_uri(picture_bytes(image, most=_MANY)), "passed": bool(good)} for image, good in zip(images, passed, strict=True)
        ]
        sides.append({"name": name, "kind": kind, "pictures": pictures, "num_passed": sum(bool(good) for good in passed)})
    return {"prompt": comparison.prompt, "sides": sides}


def _titled(text: str) -> str:
    """Begin with a capital; the rest may be a path, whose letters matter."""
    return text[:1].upper() + text[1:]


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def _span(interval: Interval, pattern: str = "{:.3f}") -> str:
    if interval.low is None or interval.high is None:
        return "no interval"
    return f"{pattern.format(interval.low)} to {pattern.format(interval.high)}".replace("-", "\N{MINUS SIGN}")


def _axis_of(headline: Headline | None) -> list[float]:
    """Return the marks of the headline's axis: from 0 to 1 where all it shows lies there, else round numbers around it."""
    if headline is None:
        return []
    shown = [value for found in (headline.base, headline.tuned) for value in (found.mean, found.low, found.high) if value is not None]
    return [0, 0.25, 0.5, 0.75, 1] if min(shown) >= 0 and max(shown) <= 1 else ticks(min(shown), max(shown))


def _place(value: float, axis: Sequence[float]) -> str:
    """Return where a value stands on an axis, as CSS wants it."""
    return f"{100 * (value - axis[0]) / (axis[-1] - axis[0]):.2f}%"


def _is_share(row: ScoreRow) -> bool:
    """Tell whether a row's scores can be drawn as parts of a whole."""
    return all(0 <= found.mean <= 1 for found in (row.base, row.tuned))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _p_value(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
