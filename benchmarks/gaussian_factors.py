"""How much of a policy gradient is signal, where everything is known: one factor at a time from Flow-GRPO to advantage-weighted matching.

Data are N(theta, 1) in several dimensions, the network is the exact velocity with theta as its one parameter, and the reward is the mean of the image, so
the exact gradient of the expected reward in theta is 1 for every sampler that keeps the marginals. Each method's gradient is estimated from many
independent batches. Its squared signal-to-noise ratio (mean over standard deviation, squared: the scale of a loss does not matter) says how many batches
a given certainty takes; divided by what a batch costs in evaluations it is the method's statistical efficiency.

    python benchmarks/gaussian_factors.py --batches 300 --seeds 0 1 2 --json gaussian_factors.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
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
        factor: What changed from the row before.
        make: Makes the algorithm.
        groups: Prompts of a batch.
        members: Initial noises of each.
        num_steps: Steps of the sampler.
        calls: Network calls of one evaluation; 2 under guidance.
    """

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
    "flow_grpo, guided": Method(factor="every evaluation takes two calls", make=flow_grpo.Config(**PLAIN).build, calls=2),
    "flow_grpo": Method(factor="no guidance", make=flow_grpo.Config(**PLAIN).build),
    "window of 2": Method(factor="2 steps have noise and are trained", make=mix_grpo.Config(**PLAIN, window=2, strategy="random").build),
    "tempflow_grpo": Method(
        factor="children of one state, credit by step", make=tempflow_grpo.Config(**PLAIN, num_children=6).build, groups=4, members=1
    ),
    "matching, noisy sampler": Method(factor="surrogate: matching at 2 levels", make=matching(noise_level=0.7)),
    "matching, ODE": Method(factor="sampler without noise", make=matching()),
    "matching, ODE of 20 steps": Method(factor="twice the steps", make=matching(), num_steps=20),
    "matching, 6 levels": Method(factor="three times the levels", make=matching(num_levels=6)),
    "matching, groups of 6": Method(factor="groups a quarter as large", make=matching(), groups=16, members=6),
    "matching, ghuber": Method(factor="AWM's released weighting", make=matching(weighting="ghuber")),
    "matching, own levels": Method(
        factor="levels drawn for each image (diffusion_nft's first step without its weighting)",
        make=diffusion_nft.Config(num_levels=2, weighting="uniform", reference_penalty=0.0, advantage_clip=50.0).build,
    ),
    "diffusion_nft": Method(
        factor="two branches around the old policy",
        make=diffusion_nft.Config(num_levels=2, reference_penalty=0.0, advantage_clip=50.0).build,
    ),
}
REFERENCE = "flow_grpo"


def batch_gradient(method: Method, seed: int, number: int) -> tuple[float, int]:
    """Return the gradient of minus the loss in theta at 0 of one batch, and what the batch costs in evaluations."""
    algorithm, world, sigmas = method.make(), GaussianWorld(0.0, 1.0), flow_sigmas(method.num_steps, dtype=torch.float64)
    plan = algorithm.plan(number, method.num_steps, seed)
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
        prompt=group.repeat_interleave(leaves),
        group=group.repeat_interleave(leaves),
        sample=torch.arange(len(reward)) % (method.members * leaves),
    )
    update = Update(seed=seed, step=number, index=0)
    rows = algorithm.rows(experience, update)
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    trained = 0

    def velocity(x: Tensor, sigma: Tensor, sample: Tensor, role: str) -> Tensor:
        nonlocal trained
        trained += len(x) * (role == "current")
        return GaussianWorld(theta, 1.0).velocity(x, sigma) if role == "current" else world.velocity(x, sigma)

    loss = algorithm.loss("current", rows, velocity).value.mean()
    (found,) = torch.autograd.grad(-loss, theta)
    return float(found), method.calls * (done.evaluations + BACKWARD * trained)


def measure(method: Method, seed: int, batches: int) -> dict[str, float]:
    """Return signal, noise, cost and efficiency of one seed's batches."""
    found = [batch_gradient(method, seed, number) for number in range(batches)]
    values = [value for value, _ in found]
    signal, noise = statistics.fmean(values), statistics.stdev(values)
    cost = statistics.fmean(cost for _, cost in found)
    # The squared mean of a few batches is too large by the mean's own variance.
    ratio = max(0.0, (signal**2 - noise**2 / batches) / noise**2)
    return {"signal": signal, "noise": noise, "evaluations": cost, "snr2": ratio, "efficiency": 1000 * ratio / cost}


def main() -> None:
    """Measure every method and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=300, help="batches of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: [measure(method, seed, options.batches) for seed in options.seeds] for name, method in tqdm(METHODS.items())}
    reference = statistics.fmean(one["efficiency"] for one in found[REFERENCE])
    print(
        "| method | what changed | evaluations a batch | squared signal-to-noise ratio | for 1,000 evaluations | over flow_grpo (seeds) |\n|---|---|---|---|---|---|"
    )
    for name, seeds in found.items():
        ratios = [one["efficiency"] / reference for one in seeds]
        snr2, cost = (statistics.fmean(one[key] for one in seeds) for key in ("snr2", "evaluations"))
        print(
            f"| {name} | {METHODS[name].factor} | {cost:.0f} | {snr2:.3f} | {1000 * snr2 / cost:.4f} | "
            f"{statistics.fmean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    if options.json is not None:
        options.json.write_text(json.dumps({"methods": found, "versions": versions(), "hardware": hardware()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
