"""Tables and pictures of a benchmark: reward against compute, and reward against drift, with intervals over training seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flowalign import config as configuration
from flowalign.benchmark.prices import Prices, first_reached, price, price_cells
from flowalign.benchmark.spec import PREVIOUS, BenchmarkConfig, Cell
from flowalign.benchmark.store import folder_of, read_result
from flowalign.env import hardware, how_made, versions
from flowalign.evaluate.charts import Chart, Curve
from flowalign.evaluate.records import MEASURES, Evaluation, compare_runs, read_evaluation
from flowalign.evaluate.report import Report, Table, write_report, write_svg
from flowalign.evaluate.scores import Interval
from flowalign.evaluate.statistics import seed_interval
from flowalign.files import write_atomically

_DRIFT = {
    "velocity_distance": "velocity distance",
    "diversity": "diversity within a prompt (base 1)",
    "kernel_distance": "kernel distance to real images x 1000",
    "precision": "share of the images among the base's",
    "coverage": "coverage of the base's images",
}
_SCALE = {"kernel_distance": 1000}


def write_benchmark(
    config: BenchmarkConfig,
    trials: Sequence[Cell],
    finals: Sequence[Cell],
    chosen: Mapping[str, Mapping[str, Any]],
    baseless: Mapping[str, str],
) -> Path:
    """Write ``results.json``, ``results.md``, two pictures and ``report.html`` from the cells that have finished, and print the tables.

    Args:
        config: The benchmark.
        trials: Cells of the search.
        finals: Cells that count.
        chosen: What the search chose for each method; without an entry where no trial finished.
        baseless: Methods whose base could not be scored, and what it said.

    Returns:
        The report's path.
    """
    results = [(cell, found) for cell in finals if (found := read_result(config, cell)) is not None]
    by_method = {method: [(cell, result) for cell, result in results if cell.method == method] for method in config.methods}
    tables = [_scores(config, by_method), _drift(config, by_method), *([_prices(config, by_method)] if config.target is not None else [])]
    tables += [_search(config, trials, chosen)] if trials else []
    finished = [cell for cell, _ in results]
    missing = [f"{cell.method}, seed {cell.seed}" for cell in finals if cell not in finished]
    left_out = [method for method in config.methods if method not in chosen and method not in baseless]
    notes = [
        "Intervals: 95 %, Student's t over training seeds; but those of gains over the base, and the first ones of 'minus' columns, are over prompts, all "
        "seeds pooled, and do not cover new seeds.",
        "Runs stop where a step as dear as their dearest would exceed the budget. A row that is differentiated counts as three evaluations, in FLOPs as its "
        "own backward pass has them; decoding and scoring images count nothing but in seconds.",
        "The search saw training rewards only, never the suite." if trials else "Nothing was searched: every method ran as it is written.",
        *(
            [
                "The price of a score leaves the search out. To stay at it: from there on a run is never below; for the first time: which noise may help, the more the fewer "
                "the images."
            ]
            if config.target is not None
            else []
        ),
        *_mixtures(result for _, result in results),
        *(f"Failed: {cell.method}, seed {cell.seed}: {result['failed']}" for cell, result in results if result.get("failed")),
        *([f"Not finished: {'; '.join(missing)}."] if missing else []),
        *(f"Not run: {method}, whose base could not be scored: {said}" for method, said in baseless.items()),
        *([f"No trial of the search finished, so not run: {', '.join(left_out)}."] if left_out else []),
    ]
    head = f"{config.budget.amount:g} {config.budget.unit} a run, seeds {list(config.seeds)}; {_base_line(config)}"
    text = "\n\n".join([head, *(_markdown(table) for table in tables), *notes])
    write_atomically(config.output / "results.md", text + "\n")
    written = {
        "configuration": configuration.encode(config),
        "versions": versions(),
        "hardware": hardware(),
        "tables": [{"title": table.title, "columns": list(table.columns), "rows": [list(row) for row in table.rows]} for table in tables],
        "notes": notes,
        "missing": [*missing, *left_out, *baseless],
        "runs": [result for _, result in results],
    }
    write_atomically(config.output / "results.json", json.dumps(written, indent=2) + "\n")
    print(f"\n{text}\n")
    report = Report(
        title="Methods at equal compute",
        subtitle=head,
        charts=_charts(config, by_method),
        tables=tables,
        notes=notes,
        configuration=yaml.safe_dump(configuration.encode(config), sort_keys=False),
        **how_made(),
    )
    for name, chart in zip(("compute.svg", "drift.svg"), report.charts, strict=True):
        write_svg(config.output / name, chart)
    path = write_report(config.output / "report.html", report)
    print(f"report {path}")
    return path


def _mixtures(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """Say where runs that are compared were made by different software or machines."""
    seen: dict[str, dict[str, int]] = {}
    for result in results:
        for name, value in {**result.get("versions", {}), **result.get("hardware", {})}.items():
            counts = seen.setdefault(name, {})
            counts[str(value)] = counts.get(str(value), 0) + 1
    mixed = {name: counts for name, counts in seen.items() if len(counts) > 1}
    return [f"Runs differ in {name}: {', '.join(f'{value} ({num})' for value, num in counts.items())}." for name, counts in mixed.items()]


Runs = Mapping[str, Sequence[tuple[Cell, Mapping[str, Any]]]]


def _base_line(config: BenchmarkConfig) -> str:
    scored = [cell for cell in config.bases() if read_result(config, cell) is not None]
    found = [read_evaluation(folder_of(config, cell) / "records.jsonl").scores(config.suite.headline).overall for cell in scored]
    return f"{_title(config)} of the base {', '.join(map(str, found))} on {config.suite.name}"


def _title(config: BenchmarkConfig) -> str:
    return f"{config.suite.headline} score" if config.suite.headline in MEASURES else config.suite.headline


def _over_seeds(values: Sequence[float], pattern: str = "{:.3f}") -> str:
    found = seed_interval(values)
    if found.low is None or found.high is None:
        return f"{pattern.format(found.mean)} [no interval]"
    return f"{pattern.format(found.mean)} [{pattern.format(found.low)}, {pattern.format(found.high)}]"


def _scores(config: BenchmarkConfig, by_method: Runs) -> Table:
    reference, others = _others(config)
    rows = []
    for method, runs in by_method.items():
        if not runs:
            rows.append([method, "0", *[""] * 7])
            continue
        last = [result["milestones"][-1] for _, result in runs]
        other = others[method]
        versus = "" if other is None else (_added if reference == PREVIOUS else _versus)(config, by_method[other], runs)
        gain = compare_runs([(_base_of(config, cell), _records(config, cell)) for cell, _ in runs], measure=config.suite.headline)
        spent = [milestone["spent"]["evaluations"] for milestone in last]
        steps = [result["steps"] for _, result in runs]
        rows.append(
            [
                method,
                str(len(runs)),
                _over_seeds([milestone["score"] for milestone in last]),
                str(gain.overall),
                versus,
                f"{sum(spent) / len(spent):.3g}",
                f"{sum(steps) / len(steps):.0f}",
                *(_average(runs, key) for key in ("updates", "images")),
            ]
        )
    against = "gain less that of the line above, over seeds" if reference == PREVIOUS else f"minus {reference}"
    columns = ("method", "seeds", _title(config), "gain over the base", against, "evaluations", "steps", "updates", "images")
    return Table(title="Score at the end of the budget", columns=columns, rows=rows)


def _others(config: BenchmarkConfig) -> tuple[str, dict[str, str | None]]:
    """Return what methods are compared with, and for each the method that this is; None for that one itself."""
    reference = config.reference or next(iter(config.methods))
    before = [None, *config.methods] if reference == PREVIOUS else [None if method == reference else reference for method in config.methods]
    return reference, dict(zip(config.methods, before, strict=False))


def _drift(config: BenchmarkConfig, by_method: Runs) -> Table:
    measured = [key for key in _DRIFT if any(key in result["milestones"][-1] for runs in by_method.values() for _, result in runs)]
    rows = []
    for method, runs in by_method.items():
        last = [result["milestones"][-1] for _, result in runs]
        cells = (_over_seeds([_SCALE.get(key, 1) * milestone[key] for milestone in last], "{:.4f}") if last else "" for key in measured)
        rows.append([method, *cells])
    return Table(title="What it cost: distance to the base", columns=("method", *(_DRIFT[key] for key in measured)), rows=rows)


def _prices(config: BenchmarkConfig, by_method: Runs) -> Table:
    reference, others = _others(config)
    rows = [[method] for method in by_method]
    for rule in (price, first_reached):
        prices = {method: _prices_of(config, runs, rule) for method, runs in by_method.items()}
        for row in rows:
            other = others[row[0]]
            row += price_cells(prices[row[0]], None if other is None else prices[other])
    against = "the line above's" if reference == PREVIOUS else f"{reference}'s"
    columns = [
        column
        for when in ("to stay", "for the first time")
        for column in (f"seeds, {when}", f"{config.budget.unit}, {when}", f"{against} over it, {when}")
    ]
    return Table(title=f"Price of a {_title(config)} of {config.target:g}", columns=("method", *columns), rows=rows)


def _prices_of(config: BenchmarkConfig, runs: Sequence[tuple[Cell, Mapping[str, Any]]], rule: Callable[..., float | None]) -> Prices:
    """Return the price of the target by training seed; None where it was not reached."""
    assert config.target is not None
    found: dict[int, float | None] = {}
    for cell, result in runs:
        start = _base_of(config, cell).scores(config.suite.headline).overall.mean
        # A run that failed did not stay at anything to its end.
        lost = bool(result.get("failed")) and rule is price
        found[cell.seed] = None if lost else rule(result["milestones"], start, config.target, config.budget.unit)
    return found


def _average(runs: Sequence[tuple[Cell, Mapping[str, Any]]], key: str) -> str:
    known = [float(result[key]) for _, result in runs if key in result]
    return f"{_mean(known):.0f}" if known else ""


def _search(config: BenchmarkConfig, trials: Sequence[Cell], chosen: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    tried = {method: iter(config.search.points()) for method in config.methods}  # of methods that lost their base there are no trials
    for cell, point in ((cell, next(tried[cell.method])) for cell in trials):
        result = read_result(config, cell)
        words = ", ".join(f"{key} {value}" for key, value in point.items())
        reward = "not finished" if result is None else "failed" if result.get("failed") else f"{result['reward']:.4f}"
        at_edge = ", ".join(config.search.edges(point))
        verdict = f"chosen, at the edge of {at_edge}: a wider grid may hold better" if at_edge else "chosen"
        rows.append([cell.method, words, reward, verdict if point == chosen.get(cell.method) else ""])
    for method in config.methods:
        mine = [row for row in rows if row[0] == method]
        if len(mine) > 1 and len({row[2] for row in mine}) == 1:
            mine[0][3] = "the first of equals: no choice"
    caption = f"Seed {config.search.seed}, {config.search.share:.0%} of the budget each; by the reward on training prompts after the last update, the same prompts and noise for all."
    return Table(title="What was searched", columns=("method", "tried", "reward", ""), rows=rows, caption=caption)


def _charts(config: BenchmarkConfig, by_method: Runs) -> list[Chart]:
    unit = config.budget.unit
    compute, drift = [], []
    for method, runs in by_method.items():
        if not runs:
            continue
        starts = [_base_of(config, cell).scores(config.suite.headline).overall.mean for cell, _ in runs]
        courses = [result["milestones"] for _, result in runs]
        num = max(map(len, courses))
        # A run that failed early keeps its last score: dropping it would end the curve, or leave it to the runs that went well.
        columns = [[course[min(k, len(course) - 1)] for course in courses] for k in range(num)]
        x = [0.0, *(_mean([course[k]["spent"][unit] for course in courses if k < len(course)]) for k in range(num))]
        scores = [seed_interval(values) for values in [starts, *([m["score"] for m in column] for column in columns)]]
        compute.append(_curve(method, x, scores))
        distance = [0.0, *(_mean([milestone["velocity_distance"] for milestone in column]) for column in columns)]
        drift.append(_curve(method, distance, scores))
    return [
        Chart(
            title=f"{_title(config).capitalize()} against compute",
            curves=compute,
            x_label=unit,
            caption="Mean and 95 % interval over training seeds.",
        ),
        Chart(
            title=f"{_title(config).capitalize()} against drift",
            curves=drift,
            x_label="velocity distance to the base",
            caption="Mean and 95 % interval over training seeds, of the score; mean distance.",
        ),
    ]


def _curve(name: str, x: Sequence[float], scores: Sequence[Interval]) -> Curve:
    y = [score.mean for score in scores]
    if any(score.low is None for score in scores):
        return Curve(name=name, x=x, y=y)
    return Curve(name=name, x=x, y=y, low=[score.low or 0.0 for score in scores], high=[score.high or 0.0 for score in scores])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _records(config: BenchmarkConfig, cell: Cell) -> Evaluation:
    return read_evaluation(folder_of(config, cell) / "records.jsonl")


def _base_of(config: BenchmarkConfig, cell: Cell) -> Evaluation:
    return read_evaluation(config.output / "base" / cell.reference / "records.jsonl")


def _versus(config: BenchmarkConfig, reference: Sequence[tuple[Cell, Any]], runs: Sequence[tuple[Cell, Any]]) -> str:
    partners = {cell.seed: cell for cell, _ in reference}
    pairs = [(_records(config, partners[cell.seed]), _records(config, cell)) for cell, _ in runs if cell.seed in partners]
    if not pairs:
        return ""
    found = compare_runs(pairs, measure=config.suite.headline)
    return f"{found.overall}, p = {found.p_value:.3f}; over seeds {_over_seeds(_apart(config, pairs))}"


def _apart(config: BenchmarkConfig, pairs: Sequence[tuple[Evaluation, Evaluation]]) -> list[float]:
    """Return the second's score minus the first's, pair by pair."""
    scores = [[found.scores(config.suite.headline).overall.mean for found in pair] for pair in pairs]
    return [mine - theirs for theirs, mine in scores]


def _added(config: BenchmarkConfig, before: Sequence[tuple[Cell, Any]], runs: Sequence[tuple[Cell, Any]]) -> str:
    """Return what was gained beyond another method, seed by seed; each over its own base, which guidance may have changed."""

    def gain(cell: Cell) -> float:
        ends = [records.scores(config.suite.headline).overall.mean for records in (_base_of(config, cell), _records(config, cell))]
        return ends[1] - ends[0]

    earlier = {cell.seed: gain(cell) for cell, _ in before}
    differences = [gain(cell) - earlier[cell.seed] for cell, _ in runs if cell.seed in earlier]
    return _over_seeds(differences) if differences else ""


def _markdown(table: Table) -> str:
    lines = [f"{table.title}." + (f" {table.caption}" if table.caption else ""), ""]
    lines += [f"| {' | '.join(table.columns)} |", f"|{'---|' * len(table.columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in table.rows)])
