"""The part of a run's report that is about single images: scores by kind of prompt, their distributions, and the best and worst with their verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flowalign import scored
from flowalign.evaluate.charts import Chart
from flowalign.evaluate.records import Evaluation, Measure, extremes
from flowalign.evaluate.report import Gallery, Picture, Table
from flowalign.evaluation_report import clauses_of, distribution
from flowalign.scored import Window

_CAPTION = (
    "Means over images of training prompts, as the noisy policy made them, with 95 % intervals from a bootstrap over prompts within kinds. Steps draw other "
    "prompts, so that intervals side by side are no test."
)


class Scored:
    """What several runs recorded of their images.

    Attributes:
        windows: Of each run and window of steps, under what they are called.
    """

    def __init__(self, runs: Mapping[str, Path]) -> None:
        """Read what there is."""
        self.last: dict[str, Window] = {}
        self.windows: dict[str, Window] = {}
        for name, run in runs.items():
            for when, window in scored.read(run).items():
                steps = f"steps {window.steps[0]} to {window.steps[-1]}"
                self.windows[f"{name}, {steps}" if len(runs) > 1 else steps.capitalize()] = window
                if when == "last":
                    self.last[name] = window

    def measures(self) -> dict[Measure, dict[str, Evaluation]]:
        """Return the rewards, each with the windows that have it."""
        names = dict.fromkeys(name for window in self.windows.values() for name in window.found.measures())
        return {name: {title: window.found for title, window in self.windows.items() if name in window.found.measures()} for name in names}

    def tables(self) -> list[Table]:
        """Return for each reward its means by kind of prompt."""
        tables: list[Table] = []
        for measure, windows in self.measures().items():
            scores = {title: found.scores(measure) for title, found in windows.items()}
            tags = list(dict.fromkeys(tag for found in windows.values() for tag in found.tags()))
            rows = [
                [tag.replace("_", " "), *(str(score.per_tag[tag]) if tag in score.per_tag else "" for score in scores.values())]
                for tag in tags
            ]
            if len(tags) > 1:
                rows.append(["macro mean", *(str(score.overall) for score in scores.values())])
            counts = [f"{sum(score.num_images.values())} images of {sum(score.num_prompts.values())} prompts" for score in scores.values()]
            rows.append(["made of", *counts])
            tables.append(
                Table(
                    title=f"{measure[:1].upper()}{measure[1:].replace('_', ' ')} by kind of prompt",
                    columns=("Kind", *scores),
                    rows=rows,
                    caption="" if tables else _CAPTION,
                )
            )
        return tables

    def charts(self) -> list[Chart]:
        """Return for each reward how many images have which score."""
        return [distribution(measure, list(windows.values()), list(windows)) for measure, windows in self.measures().items()]

    def galleries(self) -> list[Gallery]:
        """Return the best and the worst images of each run's last steps, by its first reward."""
        return [gallery for name, window in self.last.items() for gallery in _extremes(window, f": {name}" if len(self.last) > 1 else "")]


def _extremes(window: Window, name: str) -> list[Gallery]:
    if not window.found.measures():
        return []
    measure = window.found.measures()[0]
    galleries = []
    for title, worst in (("Worst images", True), ("Best images", False)):
        pictures = []
        for value, row in extremes(window.found.records, measure, worst=worst, most=scored.MOST):
            record = window.found.records[row]
            if row not in window.pictures:
                continue
            clauses = clauses_of(record)
            passed = all(holds for _, holds in clauses) if clauses else None
            pictures.append(
                Picture(data=window.pictures[row], text=record.prompt, passed=passed, note=f"{measure} {value:.3g}", clauses=clauses)
            )
        lead = f"Of steps {window.steps[0]} to {window.steps[-1]}, by {measure}, at most one of each prompt; of equal ones the first."
        galleries.append(Gallery(title=title + name, lead=lead, pictures=pictures))
    return galleries
