"""One-step students of a 2-D mixture with an exact teacher, one for each divergence, trained side by side; `distill_2d.py` compares them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from flowalign.core.adversarial import accuracy, discriminator_loss
from flowalign.core.distribution_matching import matching_direction, push, regress
from flowalign.core.paths import interpolate, velocity_to_x0
from flowalign.core.randomness import generator
from flowalign.core.ratios import RatioWeights, bins_of, density_weights, log_ratio_of, quantile_edges, start_calibration
from flowalign.core.worlds import MixtureWorld

RADIUS, STD = 4.0, 0.3
SHARES = torch.tensor([0.30, 0.22, 0.16, 0.12, 0.08, 0.06, 0.04, 0.02])
START, SPREAD = torch.tensor([3.0, 0.0]), 0.5
LEVELS = (0.02, 0.98)
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
        return {key: mean_of([line[key] for line in recent if key in line]) for key in HEALTH}


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


def mean_of(values: Sequence[float]) -> float:
    """Return the mean, nan of nothing."""
    return math.fsum(values) / len(values) if values else math.nan
