"""How much of a policy gradient is signal, where everything is known: one factor at a time from Flow-GRPO to advantage-weighted matching.

Data are N(theta, 1) in several dimensions, the network is the exact velocity with theta as its one parameter, and the reward is the mean of the image, so
the exact gradient of the expected reward in theta is 1 for every sampler that keeps the marginals. Each method's gradient is estimated from many
batches. Its squared signal-to-noise ratio (mean over standard deviation, squared: the scale of a loss does not matter) says how many batches a given
certainty takes; divided by what a batch costs in evaluations it is the method's statistical efficiency.

A method may draw for a whole batch which steps or levels it trains. Each draw has its own expected gradient. With one parameter that is a known factor and no
noise; with many, draws may point in different directions, and then it is. So several batches are made for each draw, and the ratio is told twice: with the
variance within draws alone, and with that between draws added.

    python benchmarks/gaussian_factors.py --batches 600 --seeds 0 1 2 --output runs/gaussian_factors
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from flowalign.algorithms import awm, diffusion_nft, flow_grpo, mix_grpo, tempflow_grpo
from flowalign.core.algorithm import Experience, Update
from flowalign.core.randomness import generator
from flowalign.core.rollout import rollout
from flowalign.core.schedules import flow_sigmas
from flowalign.core.worlds import GaussianWorld
from flowalign.env import hardware, versions
from flowalign.train.forests import compared_groups

STEPS, WIDTH = 10, 16
EACH = 10  # batches of one draw of steps or levels
BACKWARD = 3  # an evaluation that is differentiated costs three
PLAIN: dict[str, Any] = {"kl_penalty": 0.0, "num_minibatches": 1}
MATCHING: dict[str, Any] = {
    "weighting": "uniform",
    "num_levels": 2,
    "advantage_clip": 1e9,
    "advantage_max": 1e9,
    "reference_penalty": 0.0,
    "slow_penalty": 0.0,
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table.

    Attributes:
        than: The method that it is compared with,
        factor: and the one thing in which the two differ.
        make: Makes the algorithm.
        groups: Prompts of a batch.
        members: Initial noises of each.
        num_steps: Steps of the sampler.
        calls: Network calls of one evaluation; 2 under guidance.
    """

    than: str
    factor: str
    make: Callable[[], Any]
    groups: int = 4
    members: int = 24
    num_steps: int = STEPS
    calls: int = 1


def matching(**changes: Any) -> Callable[[], Any]:
    """Make advantage-weighted matching with changes."""
    return awm.Config(**(MATCHING | changes)).build


METHODS = {
    "flow_grpo": Method(than="", factor="", make=flow_grpo.Config(**PLAIN).build),
    "flow_grpo, guided": Method(than="flow_grpo", factor="every evaluation takes two calls", make=flow_grpo.Config(**PLAIN).build, calls=2),
    "flow_grpo, 2 of 9 steps": Method(
        than="flow_grpo", factor="2 steps trained, drawn anew for each batch", make=flow_grpo.Config(**PLAIN, num_trained=2).build
    ),
    "mix_grpo, window of 2": Method(
        than="flow_grpo, 2 of 9 steps",
        factor="noise in those 2 alone, which are neighbours",
        make=mix_grpo.Config(**PLAIN, window=2, strategy="random").build,
    ),
    "tempflow_grpo": Method(
        than="flow_grpo",
        factor="children of one state, credit by step",
        make=tempflow_grpo.Config(**PLAIN, num_children=6).build,
        groups=4,
        members=1,
    ),
    "tempflow_grpo, all alike": Method(
        than="tempflow_grpo",
        factor="no noise weight",
        make=tempflow_grpo.Config(**PLAIN, num_children=6, step_weight="uniform").build,
        groups=4,
        members=1,
    ),
    "matching, 9 levels, noisy sampler": Method(
        than="flow_grpo",
        factor="surrogate: matching at as many levels as steps",
        make=matching(noise_level=0.7, num_levels=9, levels="uniform"),
    ),
    "matching, 2 levels, noisy sampler": Method(
        than="flow_grpo, 2 of 9 steps", factor="surrogate: matching at 2 levels", make=matching(noise_level=0.7, levels="uniform")
    ),
    "matching, 2 levels": Method(than="matching, 2 levels, noisy sampler", factor="sampler without noise", make=matching(levels="uniform")),
    "matching, 2 levels of the grid": Method(than="matching, 2 levels", factor="levels of the rollout's grid", make=matching()),
    "matching, 6 levels": Method(than="matching, 2 levels", factor="three times the levels", make=matching(num_levels=6, levels="uniform")),
    "matching, own levels": Method(
        than="matching, 2 levels", factor="levels drawn for each image, not for the batch", make=matching(levels="uniform", own_levels=True)
    ),
    "matching, ODE of 20 steps": Method(than="matching, 2 levels", factor="twice the steps", make=matching(levels="uniform"), num_steps=20),
    "matching, groups of 6": Method(
        than="matching, 2 levels", factor="groups a quarter as large", make=matching(levels="uniform"), groups=16, members=6
    ),
    "matching, ghuber": Method(
        than="matching, 2 levels", factor="AWM's released weighting", make=matching(levels="uniform", weighting="ghuber")
    ),
    "diffusion_nft": Method(
        than="matching, own levels",
        factor="two branches around the old policy, its weighting, a level of each image from a permutation of the grid",
        make=diffusion_nft.Config(num_levels=2, reference_penalty=0.0, advantage_clip=50.0).build,
    ),
}
REFERENCE = "flow_grpo"


def batch_gradient(method: Method, seed: int, draw_number: int, number: int) -> tuple[float, int]:
    """Return the gradient of minus the loss in theta at 0 of one batch, and what the batch costs in evaluations.

    Args:
        method: The method.
        seed: Of everything.
        draw_number: Decides what is drawn for a whole batch: which steps or levels are trained.
        number: Decides everything else.
    """
    algorithm, world, sigmas = method.make(), GaussianWorld(0.0, 1.0), flow_sigmas(method.num_steps, dtype=torch.float64)
    plan = algorithm.plan(draw_number, method.num_steps, seed)
    num, leaves = method.groups * method.members, plan.num_leaves

    def draw(purpose: str, rows: int) -> Tensor:
        return torch.randn(rows, WIDTH, generator=generator("factors", seed, number, purpose), dtype=torch.float64)

    done = rollout(world.velocity, draw("x", num), sigmas, plan, lambda step: draw(f"step {step}", num * len(plan.drawn(step))))
    group = torch.arange(method.groups).repeat_interleave(method.members)
    member = torch.arange(num) % method.members
    compared = torch.unique(compared_groups(plan, group, member), return_inverse=True)[1]
    reward = done.x0.mean(1)
    mean = torch.zeros(int(compared.max()) + 1, dtype=torch.float64).index_add(0, compared, reward) / torch.bincount(compared)
    experience = Experience(
        trajectory=done,
        advantage=(reward - mean[compared])[:, None],
        weight=torch.ones(len(reward), 1, dtype=torch.float64),
        keep=torch.ones(len(reward), dtype=torch.bool),
        # Noise of the update is keyed by prompt, and what holds for the whole batch by the step: batches of one draw have prompts of their own.
        prompt=method.groups * number + group.repeat_interleave(leaves),
        group=group.repeat_interleave(leaves),
        sample=torch.arange(len(reward)) % (method.members * leaves),
    )
    update = Update(seed=seed, step=draw_number, index=0)
    rows = algorithm.rows(experience, update)
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    cost = 0

    def velocity(x: Tensor, sigma: Tensor, sample: Tensor, role: str) -> Tensor:
        nonlocal cost
        cost += len(x) * (BACKWARD if role == "current" else 1)
        return GaussianWorld(theta, 1.0).velocity(x, sigma) if role == "current" else world.velocity(x, sigma)

    loss = algorithm.loss("current", rows, velocity).value.mean()
    (found,) = torch.autograd.grad(-loss, theta)
    return float(found), method.calls * (done.evaluations + cost)


def measure(method: Method, seed: int, batches: int) -> dict[str, float]:
    """Return signal, noise within and between draws, cost and efficiencies of one seed's batches, ``EACH`` of a draw."""
    found = [
        [batch_gradient(method, seed, number // EACH, number) for number in range(start, start + EACH)] for start in range(0, batches, EACH)
    ]
    means = [statistics.fmean(value for value, _ in draw) for draw in found]
    within = statistics.fmean(statistics.variance(value for value, _ in draw) for draw in found)
    # A draw's mean of a few batches varies by their noise, too.
    between = max(0.0, statistics.variance(means) - within / EACH)
    # The squared mean is too large by its own variance.
    square = max(0.0, statistics.fmean(means) ** 2 - statistics.variance(means) / len(means))
    cost = statistics.fmean(cost for draw in found for _, cost in draw)
    return {
        "signal": statistics.fmean(means),
        "noise": math.sqrt(within),
        "between": math.sqrt(between),
        "evaluations": cost,
        "snr2": square / within,
        "efficiency": 1000 * square / within / cost,
        "efficiency_with_draws": 1000 * square / (within + between) / cost,
    }


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Lay the measurements out as a table; seeds are paired, and ranges are over them."""
    columns = (
        "method",
        "compared with",
        "what differs",
        "evaluations a batch",
        "squared signal-to-noise ratio within draws",
        "for 1,000 evaluations",
        "over what it is compared with (seeds)",
        "over flow_grpo (seeds)",
        "how much the gradient's size varies between draws",
        "over flow_grpo, draws as noise",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, seeds in found.items():
        method = METHODS[name]
        cells = [name, method.than, method.factor]
        cells += [f"{statistics.fmean(one['evaluations'] for one in seeds):.0f}", f"{statistics.fmean(one['snr2'] for one in seeds):.1f}"]
        cells.append(f"{statistics.fmean(one['efficiency'] for one in seeds):.1f}")
        cells += [
            _over(seeds, found[other], "efficiency") if other else "" for other in (method.than, REFERENCE if name != REFERENCE else "")
        ]
        cells.append(f"{statistics.fmean(one['between'] / one['signal'] for one in seeds):.0%}")
        cells.append(_over(seeds, found[REFERENCE], "efficiency_with_draws"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _over(seeds: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]], key: str) -> str:
    ratios = [one[key] / other[key] for one, other in zip(seeds, others, strict=True)]
    return f"{statistics.fmean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def picture(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Draw efficiencies over Flow-GRPO's as bars on a log scale, with the range over seeds; the light mark counts draws as noise."""
    left, row, width = 250, 26, 420
    low, high = math.log(0.1), math.log(20.0)

    def place(value: float) -> float:
        return left + width * (min(max(math.log(value), low), high) - low) / (high - low)

    height = row * len(found) + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 60} {height}" font-family="sans-serif" font-size="13" role="img" '
        'aria-label="Statistical efficiency of each method over Flow-GRPO, log scale">',
        f'<rect width="{left + width + 60}" height="{height}" fill="white"/>',
    ]
    for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20):
        parts.append(
            f'<line x1="{place(tick):.1f}" x2="{place(tick):.1f}" y1="10" y2="{height - 40}" stroke="{"#666" if tick == 1 else "#ddd"}"/>'
        )
        parts.append(f'<text x="{place(tick):.1f}" y="{height - 24}" text-anchor="middle" fill="#333">{tick:g}</text>')
    for number, (name, seeds) in enumerate(found.items()):
        middle = 10 + row * number + row / 2
        ratios, others = (
            [one[key] / other[key] for one, other in zip(seeds, found[REFERENCE], strict=True)]
            for key in ("efficiency", "efficiency_with_draws")
        )
        parts.append(f'<text x="{left - 8}" y="{middle + 4:.1f}" text-anchor="end" fill="#333">{name}</text>')
        ends = sorted((place(1.0), place(statistics.fmean(ratios))))
        parts.append(f'<rect x="{ends[0]:.1f}" y="{middle - 7:.1f}" width="{ends[1] - ends[0]:.1f}" height="14" fill="#3b6ea5"/>')
        parts.append(
            f'<line x1="{place(min(ratios)):.1f}" x2="{place(max(ratios)):.1f}" y1="{middle:.1f}" y2="{middle:.1f}" stroke="#111" stroke-width="2"/>'
        )
        parts.append(f'<circle cx="{place(statistics.fmean(others)):.1f}" cy="{middle:.1f}" r="4" fill="#e8a33d" stroke="#111"/>')
    parts.append(
        f'<text x="{left}" y="{height - 6}" fill="#333">over Flow-GRPO at equal evaluations; line: range over seeds; dot: draws count as noise</text></svg>'
    )
    return "\n".join(parts)


def main() -> None:
    """Measure every method, print the table and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=600, help=f"batches of each seed, {EACH} of a draw")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=None, help="folder for results.json and efficiency.svg")
    options = parser.parse_args()
    if options.batches < 2 * EACH:
        parser.error(f"--batches: got {options.batches}, needed at least {2 * EACH}, two draws")
    torch.set_num_threads(1)
    found = {name: [measure(method, seed, options.batches) for seed in options.seeds] for name, method in tqdm(METHODS.items())}
    print(table(found))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        told = {"methods": found, "versions": versions(), "hardware": hardware()}
        (options.output / "results.json").write_text(json.dumps(told, indent=2) + "\n")
        (options.output / "efficiency.svg").write_text(picture(found) + "\n")


if __name__ == "__main__":
    main()
