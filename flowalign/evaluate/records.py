"""What an evaluation leaves behind: one record for each image, from which every score can be computed again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from flowalign.evaluate.scores import Difference, Interval, Scores
from flowalign.evaluate.statistics import bootstrap, holm, paired_difference
from flowalign.files import write_atomically

Measure = str
MEASURES: tuple[Measure, ...] = ("strict", "graded")  # of a suite with verdicts; rewards add theirs by name


@dataclass(frozen=True, kw_only=True)
class Record:
    """The verdict on one image.

    Attributes:
        id: Stable id of the prompt: it depends on what the prompt says and on nothing else.
        prompt: Text of the prompt.
        tag: Kind of the prompt.
        meaning: Equal for prompts that ask for the same thing; None where the suite does not know.
        k: Number of the image among those of its prompt, from 0.
        strict: Whether everything is right; None where the suite gives no verdict.
        graded: Partial credit in [0, 1]; None likewise.
        scores: Further scores by name; None where one could not be computed.
        clauses: Which of the prompt's sub-checks hold, by name.
        reason: Why the image failed; empty where it passed.
    """

    id: int
    prompt: str
    tag: str
    meaning: str | None = None
    k: int
    strict: bool | None = None
    graded: float | None = None
    scores: dict[str, float | None] = field(default_factory=dict)
    clauses: dict[str, bool] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model's records on a suite.

    Attributes:
        suite: Name of the suite.
        seed: The seed of the noise.
        records: One for each image.
        images: ``[image, 3, h, w]`` in the order of the records, if they were kept: uint8, as saved files hold them, a quarter of floats' memory.
        headline: The suite's own measure, which comes first and says whether an image passed; records do not carry it.
    """

    suite: str
    seed: int
    records: tuple[Record, ...]
    images: Tensor | None = field(default=None, repr=False)
    headline: Measure = "strict"

    def scores(self, measure: Measure = "strict") -> Scores:
        """Return the scores of a measure, with intervals; images whose score could not be computed are left out.

        Raises:
            ValueError: If no image has this score.
        """
        valued = [(record, value) for record, value in zip(self.records, _values(self.records, measure), strict=True) if value is not None]
        if not valued:
            raise ValueError(f"{self.suite}: no image has a score {measure!r}; there are {', '.join(self.measures()) or 'none'}")
        return bootstrap([value for _, value in valued], [record.id for record, _ in valued], [record.tag for record, _ in valued])

    def measures(self) -> tuple[Measure, ...]:
        """Return the names of the measures that some image has, the headline first."""
        names = [
            self.headline,
            *(name for name in MEASURES if name != self.headline),
            *dict.fromkeys(name for record in self.records for name in record.scores),
        ]
        return tuple(name for name in dict.fromkeys(names) if any(value is not None for value in _values(self.records, name)))

    def passed(self, record: Record) -> bool | None:
        """Tell whether an image passed by the headline, which is 0 or 1; None where it has none."""
        value = value_of(record, self.headline)
        return None if value is None else value >= 1

    def tags(self) -> list[str]:
        """Return the tags in the suite's order."""
        return list(dict.fromkeys(record.tag for record in self.records))

    def num_meanings(self) -> dict[str, int]:
        """Count the distinct meanings of each tag, for tags whose meanings the suite knows."""
        meanings: dict[str, set[str]] = {}
        for record in self.records:
            if record.meaning is not None:
                meanings.setdefault(record.tag, set()).add(record.meaning)
        return {tag: len(found) for tag, found in sorted(meanings.items())}

    def summary(self) -> dict[str, Any]:
        """Return the scores as JSON: each measure's ``overall``, ``micro`` and ``per_tag``, and the sizes.

        ``num_invalid`` counts the images without a score, of measures that have some.
        """
        measures = {measure: self.scores(measure) for measure in self.measures()}
        tags = self.tags()
        invalid = {measure: sum(value is None for value in _values(self.records, measure)) for measure in measures}
        return {
            **{measure: scores.as_dict() for measure, scores in measures.items()},
            "suite": self.suite,
            "seed": self.seed,
            "num_prompts": {tag: len({record.id for record in self.records if record.tag == tag}) for tag in tags},
            "num_images": {tag: sum(record.tag == tag for record in self.records) for tag in tags},
            "num_invalid": {measure: num for measure, num in invalid.items() if num},
            "num_meanings": self.num_meanings(),
        }

    def write(self, path: str | Path) -> None:
        """Write the records as JSON lines, in a file that is whole or not there; :func:`read_evaluation` reads them back (without images)."""
        head = {"suite": self.suite, "seed": self.seed}
        lines = [json.dumps({**head, **asdict(record)}, ensure_ascii=False) for record in self.records]
        write_atomically(Path(path), "\n".join(lines) + "\n")


def read_evaluation(path: str | Path) -> Evaluation:
    """Read the records that :meth:`Evaluation.write` wrote.

    Raises:
        ValueError: If a line is not a record, with its number, or the file mixes suites or seeds.
    """
    records, heads = [], set()
    # Not by splitlines, which would also break at separators that prompts may hold.
    text = Path(path).read_text(encoding="utf-8").removesuffix("\n")
    for number, line in enumerate(text.split("\n") if text else (), start=1):
        try:
            fields = json.loads(line)
            heads.add((str(fields.pop("suite")), int(fields.pop("seed"))))
            records.append(Record(**fields))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a record of an evaluation ({error})") from error
    if len(heads) != 1:
        raise ValueError(f"{path}: needed the records of one suite and one seed, got {sorted(heads) or 'no records'}")
    suite, seed = heads.pop()
    return Evaluation(suite=suite, seed=seed, records=tuple(records))


def compare(base: Evaluation, tuned: Evaluation) -> dict[Measure, Difference]:
    """Compare two models on the same prompts and noise: tuned minus base, for each measure that both have.

    Pairs of which one score could not be computed are left out.

    Raises:
        ValueError: If the two were not evaluated on the same suite, seed, prompts and images.
    """
    both = [measure for measure in base.measures() if measure in tuned.measures()]
    return {measure: compare_runs([(base, tuned)], measure=measure) for measure in both}


def compare_runs(pairs: Sequence[tuple[Evaluation, Evaluation]], *, measure: Measure = "strict") -> Difference:
    """Compare pairs of models, for example one of each training seed: second minus first over all, clustered by prompt.

    The interval is over prompts and does not cover new training seeds. Images of which one score could not be computed are left out.

    Args:
        pairs: Two models on the same prompts and noise each.
        measure: Which score.

    Raises:
        ValueError: If the two of a pair were not evaluated on the same suite, seed, prompts and images, or no image has both scores.
    """
    partners = [_partners(base, tuned) for base, tuned in pairs]
    first, second = ([record for pair in partners for record in pair[side]] for side in (0, 1))
    rows = zip(first, _values(first, measure), _values(second, measure), strict=True)
    known = [(record, one, two) for record, one, two in rows if one is not None and two is not None]
    if not known:
        raise ValueError(f"compare: no image has a score {measure!r} under both models")
    ids, tags = [record.id for record, _, _ in known], [record.tag for record, _, _ in known]
    return paired_difference([one for _, one, _ in known], [two for _, _, two in known], ids, tags)


def deviations(runs: Sequence[Evaluation], *, measure: Measure) -> list[Difference]:
    """Compare each of several models with the mean of all of them, on the images of which all have the score.

    Raises:
        ValueError: As :func:`compare_runs`.
    """
    rows = [_values(_partners(runs[0], run)[1], measure) for run in runs]
    records = _partners(runs[0], runs[0])[0]
    known = [(record, values) for record, *values in zip(records, *rows, strict=True) if None not in values]
    if not known:
        raise ValueError(f"compare: no image has a score {measure!r} under all models")
    ids, tags = [record.id for record, _ in known], [record.tag for record, _ in known]
    means = [sum(values) / len(values) for _, values in known]
    return [paired_difference(means, [values[number] for _, values in known], ids, tags) for number in range(len(runs))]


def _partners(base: Evaluation, tuned: Evaluation) -> tuple[list[Record], list[Record]]:
    """Return the records of two evaluations in one order."""
    if (base.suite, base.seed) != (tuned.suite, tuned.seed):
        raise ValueError(
            f"compare: got suite {base.suite!r} with seed {base.seed} and suite {tuned.suite!r} with seed {tuned.seed}; "
            "a paired comparison needs the same suite and the same seed (evaluate one of the two again)"
        )
    first = sorted(base.records, key=lambda record: (record.id, record.k))
    second = sorted(tuned.records, key=lambda record: (record.id, record.k))
    if [(r.id, r.k) for r in first] != [(r.id, r.k) for r in second]:
        odd = {(r.id, r.k): r.prompt for r in (*first, *second)}
        alone = {(r.id, r.k) for r in first} ^ {(r.id, r.k) for r in second}
        example = f", for example {odd[min(alone)]!r}" if alone else ""
        raise ValueError(f"compare: {len(alone)} images have no partner{example}; needed the same prompts and images for both")
    return first, second


def table(base: Evaluation, tuned: Evaluation | None = None, *, measure: Measure = "strict") -> str:
    """Write the scores of one model, or of two and their difference, as text for a terminal.

    Examples:
        >>> records = [Record(id=i, prompt="p", tag="colors", k=0, strict=i > 1, graded=1.0) for i in range(4)]
        >>> print(table(Evaluation(suite="shapes", seed=0, records=tuple(records))))
        tag             prompts  images  strict
        colors                4       4  0.500 [0.000, 1.000]
        macro mean            4       4  0.500 [0.000, 1.000]
        mean of images        4       4  0.500 [0.000, 1.000]
    """
    columns: dict[str, Scores] = {measure if tuned is None else "base": base.scores(measure)}
    corrected: dict[str, float] = {}
    if tuned is not None:
        difference = compare_runs([(base, tuned)], measure=measure)
        corrected = holm(difference.p_value_per_tag)
        columns |= {"tuned": tuned.scores(measure), "difference": difference}
    first = next(iter(columns.values()))
    meanings = base.num_meanings()
    rows = [["tag", "prompts", *(["meanings"] if meanings else []), "images", *columns, *(["p, Holm over tags"] if corrected else [])]]

    def row(name: str, tags: Sequence[str], cells: Sequence[Interval | str]) -> list[str]:
        counts = [first.num_prompts, *([meanings] if meanings else []), first.num_images]
        return [name, *(str(sum(count.get(tag, 0) for tag in tags)) for count in counts), *map(str, cells)]

    for tag in base.tags():
        told = [f"{corrected[tag]:.4f}" if tag in corrected else ""] if corrected else []
        rows.append([*row(tag, [tag], [scores.per_tag.get(tag, "no score") for scores in columns.values()]), *told])
    rest = [""] if corrected else []
    rows.append([*row("macro mean", base.tags(), [scores.overall for scores in columns.values()]), *rest])
    rows.append([*row("mean of images", base.tags(), [scores.micro for scores in columns.values()]), *rest])
    return _aligned(rows, num_right=2 + bool(meanings))


def _aligned(rows: Sequence[Sequence[str]], *, num_right: int) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if 1 <= column <= num_right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def extremes(records: Sequence[Record], measure: Measure, *, worst: bool, most: int) -> list[tuple[float, int]]:
    """Return the best or the worst images, at most one of each prompt and of equal ones the first: values and rows."""
    sign = 1 if worst else -1
    valued = [(value, row) for row, record in enumerate(records) if (value := value_of(record, measure)) is not None]
    chosen: dict[int, tuple[float, int]] = {}
    for value, row in sorted(valued, key=lambda pair: (sign * pair[0], pair[1])):
        chosen.setdefault(records[row].id, (value, row))
    return list(chosen.values())[:most]


def value_of(record: Record, measure: Measure) -> float | None:
    """Return an image's score; None where it has none."""
    if measure == "strict":
        return None if record.strict is None else float(record.strict)
    return record.graded if measure == "graded" else record.scores.get(measure)


def _values(records: Sequence[Record], measure: Measure) -> list[float | None]:
    return [value_of(record, measure) for record in records]
