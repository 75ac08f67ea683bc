"""The page of an evaluation: scores by kind with intervals, distributions, and the best and worst images with their verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowalign.env import how_made
from flowalign.evaluate import records
from flowalign.evaluate.charts import Chart, Curve
from flowalign.evaluate.records import MEASURES, Evaluation, Measure, Record, value_of
from flowalign.evaluate.report import Gallery, Picture, Report, Table, comparisons, headline, score_rows, write_report
from flowalign.images import picture_bytes

_FEW, _BINS = 6, 20


def write_evaluation(
    path: Path,
    tuned: Evaluation,
    base: Evaluation | None,
    *,
    names: tuple[str, str],
    notes: Sequence[str],
    settings: str,
    tables: Sequence[Table] = (),
) -> Path:
    """Write the page of one model, or of two on the same prompts and noise.

    Args:
        path: The file.
        tuned: The model, with its images.
        base: What it is compared with, with its images; None for nothing.
        names: What the two are called, the base's first.
        notes: Verdicts, in words.
        settings: The resolved settings, YAML.
        tables: Whatever else is tabular.
    """
    both = [tuned] if base is None else [tuned, base]
    measures = [measure for measure in tuned.measures() if all(measure in found.measures() for found in both)]
    first = measures[0]
    report = Report(
        title="flowalign evaluate",
        subtitle=f"{names[1]} on {tuned.suite}, {len(tuned.records)} images, seed {tuned.seed}",
        names=names,
        headline=None if base is None else headline(base, tuned, name=f"{first.capitalize()} score", measure=first),
        comparisons=[] if base is None or first not in (*MEASURES, tuned.headline) else comparisons(base, tuned),
        scores=[] if base is None else score_rows(base, tuned, measure=first),
        galleries=extremes(tuned, first),
        charts=[distribution(measure, both, names[::-1]) for measure in measures if measure != "strict"],
        charts_title="Distributions",
        tables=[_by_tag(tuned, measure) for measure in (measures if base is None else measures[1:])] + list(tables),
        notes=notes,
        configuration=settings,
        **how_made(),
    )
    return write_report(path, report)


def extremes(found: Evaluation, measure: Measure) -> list[Gallery]:
    """Return the best and the worst images; of equal ones those that come first in the suite, one of each prompt."""
    assert found.images is not None
    # What is right or wrong has many equals; partial credit orders them.
    by = "graded" if measure == found.headline and "graded" in found.measures() else measure
    galleries = []
    for title, worst in (("Worst images", True), ("Best images", False)):
        pictures = []
        for value, row in records.extremes(found.records, by, worst=worst, most=_FEW):
            record = found.records[row]
            data, passed = picture_bytes(found.images[row]), found.passed(record)
            pictures.append(Picture(data=data, text=record.prompt, passed=passed, note=f"{by} {value:.3g}", clauses=clauses_of(record)))
        galleries.append(Gallery(title=title, lead=f"By {by}, at most one of each prompt; of equal ones the first.", pictures=pictures))
    return galleries


def clauses_of(record: Record) -> list[tuple[str, bool]]:
    """Return the sub-checks of an image in words, and whether each holds."""
    return [(name.replace("_", " "), holds) for name, holds in record.clauses.items()]


def distribution(measure: Measure, both: Sequence[Evaluation], names: Sequence[str]) -> Chart:
    """Draw the shares of images by their score, of one set of images or several."""
    values = [[value for record in found.records if (value := value_of(record, measure)) is not None] for found in both]
    low, high = min(map(min, values)), max(map(max, values))
    width = (high - low) / _BINS or 1.0
    curves = []
    for name, mine in zip(names, values, strict=False):
        counts = [0] * _BINS
        for value in mine:
            counts[min(_BINS - 1, int((value - low) / width))] += 1
        middles = [low + (place + 0.5) * width for place in range(_BINS)]
        curves.append(Curve(name=name, x=middles, y=[count / len(mine) for count in counts]))
    return Chart(
        title=f"Distribution of {measure}", curves=curves, x_label=measure, caption=f"Share of the images in each of {_BINS} equal bins."
    )


def _by_tag(found: Evaluation, measure: Measure) -> Table:
    scores = found.scores(measure)
    rows = [
        [tag.replace("_", " "), str(scores.num_prompts[tag]), str(scores.num_images[tag]), str(scores.per_tag[tag])]
        for tag in scores.per_tag
    ]
    rows.append(["macro mean", str(sum(scores.num_prompts.values())), str(sum(scores.num_images.values())), str(scores.overall)])
    return Table(title=measure.replace("_", " ").capitalize(), columns=("Kind", "Prompts", "Images", "Mean"), rows=rows)
