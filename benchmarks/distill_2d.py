"""Which divergence? One-step students of a 2-D mixture with an exact teacher: reverse KL (DMD2) against the other weights of f-distill.

Eight modes of unequal weight on a circle; the student starts beside one of them. The teacher's predictions are exact, so that only the weight h(r) differs: the
fake score and the discriminator are learned, by the same draws for every divergence of a seed. There is no adversarial term and no normaliser of the push.
All students of a seed are trained at once, each by its own parameters. Finished seeds are kept, so that the command goes on where it was stopped.

    nice python benchmarks/distill_2d.py --output runs/distill_2d --seeds 100 101 102 103 104 105
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from mixture_students import HEALTH, SHARES, Settings, Study, mean_of

from flowalign.core.divergences import names
from flowalign.env import how_made, versions
from flowalign.evaluate.charts import Chart, Curve
from flowalign.evaluate.report import Report, Table, write_report
from flowalign.evaluate.statistics import seed_interval

REFERENCE = "reverse_kl"
METRICS = {  # name: (heading, whether more is better)
    "modes": ("modes of 8", True),
    "recall": ("recall", True),
    "precision": ("precision", True),
    "kl": ("KL(weights to histogram)", False),
    "tv": ("total variation", False),
    "energy": ("energy distance", False),
    "near": ("within 3 std of a mode", True),
}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and half-width of the 95 % t interval over seeds; nan for one seed."""
    found = seed_interval(values)
    return found.mean, math.nan if found.high is None else found.high - found.mean


Results = Mapping[int, Mapping[str, Mapping[str, Mapping[str, object]]]]


def column(results: Results, name: str, iteration: int, metric: str) -> list[float]:
    """Return a metric of a divergence at an iteration, one value for each seed."""
    return [float(str(result[name][str(iteration)][metric])) for result in results.values()]


def versus(results: Results, name: str, iteration: int, metric: str) -> tuple[float, float]:
    """Return the difference to reverse KL, paired by seed, and its half-width."""
    pairs = zip(column(results, name, iteration, metric), column(results, REFERENCE, iteration, metric), strict=True)
    return interval([one - other for one, other in pairs])


def expectations(results: Results, settings: Settings) -> list[dict[str, object]]:
    """Check what earlier seeds of another implementation had suggested, with the thresholds that were set then."""
    early, late = 300, settings.iterations
    js, rkl, srkl = (mean_of(column(results, name, early, "kl")) for name in ("jensen_shannon", REFERENCE, "softened_reverse_kl"))

    def claim(what: str, name: str, iteration: int, metric: str, holds: Callable[[float], bool], means: str = "") -> dict[str, object]:
        gap, width = versus(results, name, iteration, metric)
        return {
            "claim": f"{what} at {iteration}",
            "found": f"{means}difference {gap:+.3f} +- {width:.3f}",
            "holds": holds(gap),
            "beyond 0": abs(gap) > width,
        }

    below, above = f"{js:.3f} and {rkl:.3f}, ratio {js / rkl:.2f}; ", f"{srkl:.3f} and {rkl:.3f}; "
    return [
        claim(
            "KL to the histogram: jensen_shannon below 0.6 of reverse_kl", "jensen_shannon", early, "kl", lambda gap: js < 0.6 * rkl, below
        ),
        claim("KL to the histogram: softened_reverse_kl above reverse_kl", "softened_reverse_kl", early, "kl", lambda gap: gap > 0, above),
        claim("recall: jensen_shannon above reverse_kl by 0.02", "jensen_shannon", late, "recall", lambda gap: gap >= 0.02),
        claim("KL to the histogram: forward_kl below reverse_kl", "forward_kl", late, "kl", lambda gap: gap < 0),
    ]


def _verdict(claim: Mapping[str, object]) -> str:
    if not claim["holds"]:
        return "no"
    return "yes" if claim["beyond 0"] else "in the mean; its interval holds 0"


def tables(results: Results, divergences: Sequence[str], settings: Settings) -> list[Table]:
    """One table for each evaluated iteration, the differences to reverse KL, the mode histograms and the health of the critics."""
    last = settings.evaluate_at[-1]
    columns = ("divergence", *(heading for heading, _ in METRICS.values()))
    found = [
        Table(
            title=f"After {iteration} iterations",
            columns=columns,
            rows=[
                [name, *("{:.3f} +- {:.3f}".format(*interval(column(results, name, iteration, key))) for key in METRICS)]
                for name in divergences
            ],
        )
        for iteration in settings.evaluate_at
    ]
    for iteration in (it for it in settings.evaluate_at if it in (300, 600, last)):
        rows = [
            [name, *("{:+.3f} +- {:.3f}".format(*versus(results, name, iteration, key)) for key in METRICS)]
            for name in divergences
            if name != REFERENCE
        ]
        found.append(Table(title=f"Minus {REFERENCE} after {iteration} iterations, paired by seed", columns=columns, rows=rows))
    target = ["the mixture", *(f"{share:.3f}" for share in SHARES.tolist())]
    rows = [target]
    for name in divergences:
        histograms = [result[name][str(last)]["histogram"] for result in results.values()]
        rows.append([name, *(f"{mean_of([float(h[mode]) for h in histograms]):.3f}" for mode in range(len(SHARES)))])  # type: ignore[index]
    found.append(
        Table(title=f"Mode histograms after {last} iterations", columns=("", *(f"mode {i}" for i in range(len(SHARES)))), rows=rows)
    )
    rows = [[name, *(f"{mean_of(column(results, name, last, key)):.3f}" for key in HEALTH)] for name in divergences]
    found.append(
        Table(title=f"Critics and weights, means over the 75 iterations before {last}", columns=("divergence", *HEALTH.values()), rows=rows)
    )
    return found


def charts(results: Results, divergences: Sequence[str], settings: Settings) -> list[Chart]:
    """The metrics over iterations, with bands over seeds."""
    made = []
    for key, (heading, _) in METRICS.items():
        curves = []
        for name in divergences:
            points = [interval(column(results, name, iteration, key)) for iteration in settings.evaluate_at]
            curves.append(
                Curve(
                    name=name,
                    x=list(settings.evaluate_at),
                    y=[mean for mean, _ in points],
                    low=[mean - width for mean, width in points],
                    high=[mean + width for mean, width in points],
                )
            )
        made.append(Chart(title=heading, curves=curves, x_label="iteration"))
    return made


def read(options: argparse.Namespace, settings: Settings) -> dict[int, dict[str, dict[str, dict[str, object]]]]:
    """Read the finished seeds.

    Raises:
        ValueError: If one was made with other settings.
    """
    found = {}
    for seed in options.seeds:
        path = options.output / f"seed_{seed}.json"
        if not path.is_file():
            continue
        cell = json.loads(path.read_text())
        if cell["settings"] != json.loads(json.dumps(asdict(settings))) or any(name not in cell["found"] for name in options.divergences):
            raise ValueError(f"{path}: was made with other settings or divergences; choose another --output, or remove it")
        found[seed] = cell["found"]
    return found


def write(options: argparse.Namespace, settings: Settings, results: Results, seconds: float) -> None:
    """Write summary, report and the printed tables."""
    claims = expectations(results, settings) if set(names()) <= set(options.divergences) and 300 in settings.evaluate_at else []
    made = tables(results, options.divergences, settings)
    head = (
        f"8 modes on a circle, exact teacher, {settings.iterations} iterations of {settings.critic_steps} critic updates and one of the student, batch {settings.batch}, "
        f"seeds {', '.join(map(str, results))}; mean +- half-width of the 95 % t interval over seeds"
    )
    if claims:
        rows = [[str(claim["claim"]), str(claim["found"]), _verdict(claim)] for claim in claims]
        made.insert(
            0, Table(title="What earlier seeds suggested", columns=("claim, threshold set beforehand", "found", "holds"), rows=rows)
        )
    for table in made:
        print(f"\n{table.title}\n\n| {' | '.join(table.columns)} |\n|{'---|' * len(table.columns)}")
        print("\n".join(f"| {' | '.join(row)} |" for row in table.rows))
    summary = {
        "settings": asdict(settings),
        "seeds": list(results),
        "claims": claims,
        "mean": {
            name: {
                str(it): {key: dict(zip(("mean", "half_width"), interval(column(results, name, it, key)), strict=True)) for key in METRICS}
                for it in settings.evaluate_at
            }
            for name in options.divergences
        },
        "seconds": round(seconds, 1),
        "versions": versions(),
    }
    (options.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    notes = [
        "Intervals are over seeds: initialisation, data and noise. Divergences of one seed share all of these, so differences are paired.",
        "The world has two dimensions and the teacher is exact: this says what the weight does, not what it gains on images.",
    ]
    report = Report(
        title="One-step students of a 2-D mixture",
        subtitle=head,
        charts=charts(results, options.divergences, settings),
        tables=made,
        notes=notes,
        **how_made("python", sys.argv[0]),
    )
    print(f"\n{head}\nreport {write_report(options.output / 'report.html', report)}")


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/distill_2d"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102, 103, 104, 105])
    parser.add_argument("--divergences", nargs="+", default=list(names()), choices=list(names(unsuitable=True)))
    parser.add_argument("--iterations", type=int, default=Settings.iterations)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if REFERENCE not in options.divergences or len(options.seeds) < 2:
        parser.error(f"needs {REFERENCE}, which the others are compared with, and at least two seeds")
    torch.set_num_threads(options.threads)
    places = tuple(it for it in Settings.evaluate_at if it < options.iterations)
    settings = Settings(iterations=options.iterations, evaluate_at=(*places, options.iterations))
    options.output.mkdir(parents=True, exist_ok=True)
    done, began = read(options, settings), time.process_time()
    for seed in [seed for seed in options.seeds if seed not in done]:
        found = Study(options.divergences, seed, settings).run()
        partial = options.output / f"seed_{seed}.partial"
        partial.write_text(json.dumps({"settings": asdict(settings), "found": found}))
        partial.rename(options.output / f"seed_{seed}.json")
    write(options, settings, read(options, settings), time.process_time() - began)


if __name__ == "__main__":
    main()
