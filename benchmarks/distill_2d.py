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
import shlex
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flowalign.core.adversarial import accuracy, discriminator_loss
from flowalign.core.divergences import names
from flowalign.core.matching import matching_direction, push, regress
from flowalign.core.paths import interpolate, velocity_to_x0
from flowalign.core.randomness import generator
from flowalign.core.ratios import RatioWeights, bins_of, density_weights, log_ratio_of, quantile_edges, start_calibration
from flowalign.core.worlds import MixtureWorld
from flowalign.env import hardware, versions
from flowalign.evaluate.charts import Chart, Curve
from flowalign.evaluate.report import Report, Table, write_report

RADIUS, STD = 4.0, 0.3
SHARES = torch.tensor([0.30, 0.22, 0.16, 0.12, 0.08, 0.06, 0.04, 0.02])
START, SPREAD = torch.tensor([3.0, 0.0]), 0.5
LEVELS = (0.02, 0.98)
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
HEALTH = {
    "effective_share": "effective share of the batch",
    "weight_max": "largest h",
    "ratio": "mean ratio",
    "accuracy": "discriminator accuracy",
    "fake": "fake-score loss",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and rates, the same for every student."""

    iterations: int = 1200
    evaluate_at: tuple[int, ...] = (75, 150, 300, 450, 600, 900, 1200)
    warmup: int = 200
    critic_steps: int = 3
    batch: int = 192
    rate_student: float = 1e-3
    rate_fake: float = 2e-3
    rate_discriminator: float = 1e-3
    num_samples: int = 1500
    num_bins: int = 10
    decay: float = 0.9


@dataclass(frozen=True)
class Networks:
    """The same perceptron many times over, each with its own weights: ``[students, rows, width]`` to ``[students, rows, out]``."""

    weights: list[Tensor]
    biases: list[Tensor]

    @staticmethod
    def build(num: int, sizes: Sequence[int], draw: torch.Generator, *, last: float = 1.0) -> Networks:
        """Draw one initialisation and give it to all."""
        weights, biases = [], []
        for place, (width, out) in enumerate(pairwise(sizes)):
            scale = math.sqrt(2 / width) * (last if place == len(sizes) - 2 else 1.0)
            one = scale * torch.randn(1, width, out, generator=draw)
            weights.append(one.repeat(num, 1, 1).requires_grad_())
            biases.append(torch.zeros(num, 1, out, requires_grad=True))
        return Networks(weights, biases)

    def __call__(self, x: Tensor) -> Tensor:
        """Run all of them."""
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            x = torch.nn.functional.silu(x) if place < len(self.weights) - 1 else x
        return x

    def optimizer(self, rate: float) -> torch.optim.Adam:
        """Adam without momentum, as in DMD2's relatives; elementwise, so that the students do not see one another."""
        return torch.optim.Adam([*self.weights, *self.biases], lr=rate, betas=(0.0, 0.999), fused=True)


@dataclass
class Study:
    """The students of one seed, with their critics.

    Attributes:
        divergences: One student for each.
        seed: Seed of all draws.
        settings: Sizes and rates.
    """

    divergences: Sequence[str]
    seed: int
    settings: Settings
    health: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Build networks and optimizers."""
        num, settings = len(self.divergences), self.settings
        angles = 2 * math.pi * torch.arange(len(SHARES)) / len(SHARES)
        self.world = MixtureWorld(RADIUS * torch.stack([angles.cos(), angles.sin()], 1), STD, SHARES)
        self.student = Networks.build(num, (2, 48, 48, 48, 2), generator(self.seed, "student"), last=0.0)
        self.fake = Networks.build(num, (3, 64, 64, 64, 2), generator(self.seed, "fake"))
        self.discriminator = Networks.build(num, (3, 48, 48, 1), generator(self.seed, "discriminator"), last=0.1)
        self.optimizers = {
            "student": self.student.optimizer(settings.rate_student),
            "fake": self.fake.optimizer(settings.rate_fake),
            "discriminator": self.discriminator.optimizer(settings.rate_discriminator),
        }
        self.edges = quantile_edges(torch.linspace(*LEVELS, 1000), settings.num_bins)
        self.calibration = [start_calibration(settings.num_bins) for _ in self.divergences]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the unsuitable ones are here to be seen
            self.weighting = [RatioWeights(divergence=n, num_bins=settings.num_bins, decay=settings.decay) for n in self.divergences]

    def samples(self, z: Tensor) -> Tensor:
        """Return the students' samples ``[students, rows, 2]`` of the same noise."""
        z = z.expand(len(self.divergences), -1, -1)
        return START + SPREAD * z + self.student(z)

    def _draw(self, purpose: str, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Noise for the student, noise levels and the noise that is mixed in, the same for all students."""
        draw, rows = generator(self.seed, purpose, step), self.settings.batch
        levels = torch.rand(rows, generator=draw) * (LEVELS[1] - LEVELS[0]) + LEVELS[0]
        return torch.randn(rows, 2, generator=draw), levels, torch.randn(rows, 2, generator=draw)

    def _noised(self, x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        mixed = interpolate(x0.transpose(0, 1), noise[:, None].expand(-1, len(x0), -1), sigma)
        return mixed.transpose(0, 1)

    def critics(self, step: int) -> None:
        """Update the fake scores and the discriminators once."""
        z, sigma, noise = self._draw("critic", step)
        with torch.no_grad():
            x0 = self.samples(z)
        x = self._noised(x0, sigma, noise)
        seen = _with_level(x, sigma)
        rows = regress(self.fake(seen).flatten(0, 1), (noise - x0).flatten(0, 1)).reshape(len(x), -1)
        _, levels, mixed = self._draw("real", step)
        data = self.world.sample(len(z), generator(self.seed, "data", step))
        real = self.discriminator(_with_level(interpolate(data, mixed, levels).expand(len(x), -1, -1), levels))
        generated = self.discriminator(seen)
        of_real, of_generated = discriminator_loss(real.flatten(0, 1), generated.flatten(0, 1))
        # Sums over students of means over rows: each student gets the gradient that it would get alone.
        self._step("fake", rows.mean(1).sum())
        self._step("discriminator", (of_real + of_generated).reshape(len(x), -1).mean(1).sum())
        if step % self.settings.critic_steps == 0:
            fakes, rights = rows.detach().mean(1).tolist(), [accuracy(*pair).item() for pair in zip(real, generated, strict=True)]
            for name, fake, right in zip(self.divergences, fakes, rights, strict=True):
                self.health.setdefault(name, []).append({"fake": fake, "accuracy": right})

    def update(self, step: int) -> None:
        """Update the students once."""
        z, sigma, noise = self._draw("student", step)
        x0 = self.samples(z)
        with torch.no_grad():
            x = self._noised(x0, sigma, noise)
            seen, flat = _with_level(x, sigma), x.flatten(0, 1)
            levels = sigma.repeat(len(x))
            fake = velocity_to_x0(self.fake(seen).flatten(0, 1), flat, levels)
            direction = matching_direction(fake, self.world.posterior_mean(flat, levels))
            logits, bins = self.discriminator(seen), bins_of(sigma, self.edges)
            weights = []
            for place, name in enumerate(self.divergences):
                found = density_weights(log_ratio_of(logits[place]), bins, self.calibration[place], self.weighting[place])
                self.calibration[place] = found.calibration
                weights.append(found.weight)
                self.health[name][-1] |= found.stats
        losses = push(x0.flatten(0, 1), direction, torch.cat(weights).float())
        self._step("student", losses.reshape(len(x), -1).mean(1).sum())

    def _step(self, player: str, loss: Tensor) -> None:
        optimizer = self.optimizers[player]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def run(self) -> dict[str, dict[str, dict[str, object]]]:
        """Train and return for each divergence and evaluated iteration what was measured."""
        settings = self.settings
        found: dict[str, dict[str, dict[str, object]]] = {name: {} for name in self.divergences}
        for step in range(settings.warmup):
            self.critics(step)
        for step in tqdm(range(settings.iterations), desc=f"seed {self.seed}", mininterval=10):
            for number in range(settings.critic_steps):
                self.critics(settings.warmup + step * settings.critic_steps + number)
            self.update(step)
            if step + 1 in settings.evaluate_at:
                for place, name in enumerate(self.divergences):
                    found[name][str(step + 1)] = self._measure(place) | self._health(name)
        return found

    @torch.no_grad()
    def _measure(self, place: int) -> dict[str, object]:
        num = self.settings.num_samples
        z = torch.randn(num, 2, generator=generator(self.seed, "evaluate"))
        return measure(self.samples(z)[place], self.world, self.world.sample(num, generator(self.seed, "reference")))

    def _health(self, name: str) -> dict[str, object]:
        recent = self.health[name][-75:]
        return {key: _mean([line[key] for line in recent if key in line]) for key in HEALTH}


def measure(made: Tensor, world: MixtureWorld, real: Tensor, *, neighbours: int = 5) -> dict[str, object]:
    """Measure samples ``[num, 2]`` against the mixture.

    Precision and recall are those of Kynkaanniemi et al. (2019): the share of samples that lie nearer to some sample of the other set than its
    ``neighbours``-th neighbour does. A mode counts as covered if it gets at least a fifth of its weight. The histogram in KL has half a sample added to each
    mode, so that an empty one is not infinite.
    """
    distances = torch.cdist(made, world.means)
    counts = torch.bincount(distances.argmin(1), minlength=len(SHARES)).double()
    histogram, weights = counts / counts.sum(), (SHARES / SHARES.sum()).double()
    smooth = (counts + 0.5) / (counts + 0.5).sum()
    among, between, within = torch.cdist(real, real), torch.cdist(made, real), torch.cdist(made, made)
    num = len(made)
    spread_real = among.kthvalue(neighbours + 1, dim=1).values  # the nearest one is the sample itself
    spread_made = within.kthvalue(neighbours + 1, dim=1).values
    pairs = num / (num - 1)
    return {
        "modes": float((histogram > 0.2 * weights).sum()),
        "precision": float((between <= spread_real).any(1).double().mean()),
        "recall": float((spread_made >= between.T).any(1).double().mean()),
        "kl": float((weights * (weights / smooth).log()).sum()),
        "tv": float((weights - histogram).abs().sum() / 2),
        "energy": float(2 * between.mean() - pairs * (among.mean() + within.mean())),
        "near": float((distances.min(1).values < 3 * STD).double().mean()),
        "histogram": histogram.tolist(),
    }


def _with_level(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.cat([x, sigma[None, :, None].expand(len(x), -1, 1)], 2)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


# -- over seeds -----------------------------------------------------------------------------------------------------------------


def t_quantile(freedom: int, *, confidence: float = 0.95) -> float:
    """Return the two-sided quantile of Student's t, by bisection of its integrated density."""
    x = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    log_constant = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        density = torch.exp(log_constant - (freedom + 1) / 2 * torch.log1p((middle * x).square() / freedom))
        low, high = (low, middle) if 2 * middle * float(torch.trapezoid(density, x)) > confidence else (middle, high)
    return low


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and half-width of the 95 % t interval over seeds; nan for one seed."""
    mean = _mean(values)
    if len(values) < 2:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, t_quantile(len(values) - 1) * math.sqrt(variance / len(values))


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
    js, rkl, srkl = (_mean(column(results, name, early, "kl")) for name in ("jensen_shannon", REFERENCE, "softened_reverse_kl"))
    gap, width = versus(results, "jensen_shannon", late, "recall")
    ahead, ahead_width = versus(results, "softened_reverse_kl", early, "kl")
    end, end_width = versus(results, "forward_kl", late, "kl")
    return [
        {
            "claim": f"KL to the histogram at {early}: jensen_shannon below 0.6 of reverse_kl",
            "found": f"{js:.3f} and {rkl:.3f}, ratio {js / rkl:.2f}",
            "holds": js < 0.6 * rkl,
        },
        {
            "claim": f"KL to the histogram at {early}: softened_reverse_kl above reverse_kl",
            "found": f"{srkl:.3f} and {rkl:.3f}, difference {ahead:+.3f} +- {ahead_width:.3f}",
            "holds": srkl > rkl,
        },
        {
            "claim": f"recall at {late}: jensen_shannon above reverse_kl by 0.02",
            "found": f"{gap:+.3f} +- {width:.3f}",
            "holds": gap >= 0.02,
        },
        {
            "claim": f"KL to the histogram at {late}: forward_kl below reverse_kl",
            "found": f"{end:+.3f} +- {end_width:.3f}",
            "holds": end < 0,
        },
    ]


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
        rows.append([name, *(f"{_mean([float(h[mode]) for h in histograms]):.3f}" for mode in range(len(SHARES)))])  # type: ignore[index]
    found.append(
        Table(title=f"Mode histograms after {last} iterations", columns=("", *(f"mode {i}" for i in range(len(SHARES)))), rows=rows)
    )
    rows = [[name, *(f"{_mean(column(results, name, last, key)):.3f}" for key in HEALTH)] for name in divergences]
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
        rows = [[str(claim["claim"]), str(claim["found"]), "yes" if claim["holds"] else "no"] for claim in claims]
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
        command=shlex.join(["python", *sys.argv]),
        versions=versions(),
        hardware=hardware(),
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
