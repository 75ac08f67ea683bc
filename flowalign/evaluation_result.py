"""What an evaluation found, told in four ways: on the terminal, as JSON, as records and as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from flowalign.evaluate.quality import COLUMNS, Comparison
from flowalign.evaluate.records import Evaluation, Measure, compare, table
from flowalign.evaluate.report import Table
from flowalign.evaluate.scores import Difference
from flowalign.evaluate.statistics import holm
from flowalign.evaluate.verdicts import SeedGains, seed_gains, verdict, verdict_over_seeds
from flowalign.evaluation_report import write_evaluation
from flowalign.fidelity_options import table_lines


@dataclass(frozen=True, kw_only=True)
class Result:
    """The evaluation of a model, alone, against another, or of several training seeds against another.

    Attributes:
        runs: The model; or several of one recipe, of which the first stands in tables and pictures.
        bases: What it is compared with, if anything: a model, or several training seeds of another recipe, of which the first stands in tables and pictures.
        names: What the two are called, the base's first.
        num_steps: Denoising steps of the model and of the base.
        fidelity: Of each run, where it was measured.
        resolution: A difference of scores that a comparison should resolve.
        settings: The resolved settings.
    """

    runs: Sequence[Evaluation]
    bases: Sequence[Evaluation]
    names: tuple[str, str]
    num_steps: tuple[int, int]
    fidelity: Sequence[Comparison]
    resolution: float
    settings: Mapping[str, Any]

    @property
    def base(self) -> Evaluation | None:
        """The first of what it is compared with."""
        return self.bases[0] if self.bases else None

    @cached_property
    def differences(self) -> dict[Measure, Difference]:
        """The first run minus the base, by measure."""
        return {} if self.base is None else compare(self.base, self.runs[0])

    @cached_property
    def over_seeds(self) -> dict[Measure, SeedGains]:
        """What several runs gained, by measure; empty where there is one."""
        if self.base is None or len(self.runs) < 2:
            return {}
        return {measure: seed_gains(self.bases, self.runs, measure=measure) for measure in self.differences}

    @cached_property
    def verdicts(self) -> dict[Measure, str]:
        """What the comparison shows, by measure; p-values are corrected for the number of measures."""
        tests = {name: found.over_prompts for name, found in self.over_seeds.items()} or self.differences
        p_values = holm({measure: difference.p_value for measure, difference in tests.items()})
        said: dict[Measure, str] = {}
        for measure, p_value in p_values.items():
            if self.over_seeds:
                found = self.over_seeds[measure]
                said[measure] = verdict_over_seeds(found, resolution=self.resolution, p_value=p_value, num_tests=len(tests))
            else:
                said[measure] = verdict(tests[measure], resolution=self.resolution, p_value=p_value, num_tests=len(tests))
        return said

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON wants it: a list for what there are several of."""
        summaries = [run.summary() for run in self.runs]
        told: dict[str, Any] = summaries[0]
        if self.base is not None:
            told = {
                "base": self.base.summary() if len(self.bases) == 1 else [base.summary() for base in self.bases],
                "tuned": summaries[0] if len(summaries) == 1 else summaries,
                "paired_difference": {measure: difference.as_dict() for measure, difference in self.differences.items()},
                "p_value_holm": {measure: holm(difference.p_value_per_tag) for measure, difference in self.differences.items()},
                "verdict": self.verdicts,
            }
        if self.over_seeds:
            told["paired_difference"] = {measure: found.over_prompts.as_dict() for measure, found in self.over_seeds.items()}
            told["training_seeds"] = {measure: found.as_dict() for measure, found in self.over_seeds.items()}
        if self.fidelity:
            told["fidelity"] = self.fidelity[0].as_dict() if len(self.runs) == 1 else [found.as_dict() for found in self.fidelity]
        return told

    def show(self) -> None:
        """Print tables and verdicts."""
        first = self.runs[0]
        mine, others = self.num_steps
        against = "" if mine == others else f" against {others} of the other"
        for measure in self.differences or first.measures():
            several = f", the first of {len(self.runs)} runs" if len(self.runs) > 1 else ""
            several += f" and of {len(self.bases)} others" if len(self.bases) > 1 else ""
            print(f"\n{measure} on {first.suite}, {len(first.records)} images, {mine} steps{against}, seed {first.seed}{several}")
            print(table(self.base or first, first if self.base else None, measure=measure))
            told = self._invalid(measure)
            if told:
                print(told)
            if measure in self.over_seeds:
                print(f"gains of the runs: {', '.join(f'{gain:+.3f}' for gain in self.over_seeds[measure].gains)}")
            if measure in self.verdicts:
                print(f"verdict: {self.verdicts[measure]}")
        for number, found in enumerate(self.fidelity):
            print(f"\nfidelity and diversity{f', run {number + 1}' if len(self.fidelity) > 1 else ''}")
            print(table_lines([COLUMNS, *found.rows()]))
            print("\n".join(found.notes()))

    def _invalid(self, measure: Measure) -> str:
        """Say how many images have no score: means are over the others."""
        found = [(name, run.summary()["num_invalid"].get(measure, 0), len(run.records)) for name, run in self._sides()]
        said = [f"{num} of {size} images{f' of {name}' if len(found) > 1 else ''}" for name, num, size in found if num]
        without = dict.fromkeys(tag for _, run in self._sides() for tag in run.tags() if tag not in run.scores(measure).per_tag)
        left_out = f", and macro means leave out {', '.join(without)}, of which none has a score" if without else ""
        return f"not scored: {', '.join(said)}; means are over the others{left_out}" if said else ""

    def _sides(self) -> list[tuple[str, Evaluation]]:
        return [*([(self.names[0], self.base)] if self.base is not None else []), (self.names[1], self.runs[0])]

    def write(self, folder: Path) -> None:
        """Write records, ``summary.json`` and ``report.html`` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, run in enumerate(self.runs):
            run.write(folder / ("records.jsonl" if number == 0 else f"records_{number + 1}.jsonl"))
        for number, base in enumerate(self.bases):
            base.write(folder / ("records_base.jsonl" if number == 0 else f"records_base_{number + 1}.jsonl"))
        told = {**self.as_dict(), "settings": dict(self.settings)}
        (folder / "summary.json").write_text(json.dumps(told, indent=2) + "\n")
        page = write_evaluation(
            folder / "report.html",
            self.runs[0],
            self.base,
            names=self.names,
            notes=[
                *(f"{measure}: {text}" for measure, text in self.verdicts.items()),
                *(f"{measure}, {lost}" for measure in self.runs[0].measures() if (lost := self._invalid(measure))),
                *(_NOTES_ONE if len(self.runs) == 1 else _NOTES_SEVERAL),
                *(self.fidelity[0].notes() if self.fidelity else ()),
            ],
            settings=yaml.safe_dump(dict(self.settings), sort_keys=False),
            tables=self._tables(),
        )
        print(f"\nwritten: {folder}\nreport: {page}")

    def _tables(self) -> list[Table]:
        tables = []
        if self.over_seeds:
            rows = [
                [
                    measure,
                    *(f"{gain:+.3f}" for gain in found.gains),
                    str(found.over_seeds),
                    str(found.over_prompts.overall),
                    f"{found.spread:.3f}",
                ]
                + ["" if value is None else f"{value:.3f}" for value in (found.noise, found.training)]
                for measure, found in self.over_seeds.items()
            ]
            runs = tuple(f"Run {number + 1}" for number in range(len(self.runs)))
            columns = (
                "Gain in",
                *runs,
                "Over seeds (t)" if len(self.bases) == 1 else f"Over seeds (Welch, {len(self.bases)} others)",
                "Over prompts",
                "Spread of runs",
                "by evaluation",
                "by training",
            )
            tables.append(Table(title="Training seeds", columns=columns, rows=rows))
        if self.differences:
            rows = [
                [f"{measure}, {tag.replace('_', ' ')}", f"{difference.p_value_per_tag[tag]:.4f}", f"{value:.4f}"]
                for measure, difference in self.differences.items()
                for tag, value in holm(difference.p_value_per_tag).items()
            ]
            caption = "Sign-flip tests over prompts, two-sided; corrected over the kinds of one measure."
            tables.append(Table(title="Tests by kind", columns=("Test", "p", "p, Holm"), rows=rows, caption=caption))
        if self.fidelity:
            found = self.fidelity[0]
            columns = (COLUMNS[0], *(name.capitalize() if name.islower() else name for name in self._columns()), COLUMNS[3], COLUMNS[4])
            shown = [column for column in range(len(columns)) if any(row[column] for row in found.rows())]
            rows = [[row[column] for column in shown] for row in found.rows()]
            tables.append(
                Table(title="Fidelity and diversity", columns=[columns[column] for column in shown], rows=rows, caption=found.notes()[0])
            )
        return tables

    def _columns(self) -> tuple[str, str]:
        return self.names if self.base is not None else ("", "Model")


_NOTES_ONE = ("Intervals are 95 %, from a bootstrap over prompts within kinds; they do not cover the spread between training seeds.",)
_NOTES_SEVERAL = (
    "Intervals are 95 %, from a bootstrap over prompts within kinds, and where they are said to be over seeds Student's t over the runs. "
    "Tables by kind and pictures are of the first run.",
)
