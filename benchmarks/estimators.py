"""Time of every recipe on one core: 1,024 samples, 8 rewards, 50 steps; beside GRPO as a loop over prompts in numpy.

What is timed is `update`: from a checked batch to the advantages and weights of every step. Each recipe gets the tables that it needs and the
number of rewards that it is for (8 unless it fixes them; the hypervolume is exact up to 3 rewards and is also timed there).

    python benchmarks/estimators.py --json estimators.json
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowalign.env import hardware, versions
from flowalign.estimators import RewardBatch, Tree, config, names, recipe

SAMPLES, REWARDS, STEPS, GROUP = 1024, 8, 50, 16
BRANCHES = (4, 2, 2)  # children at each depth: 16 leaves a prompt
FIXED = {"trust_grpo": 2, "verpo": 1}  # recipes whose columns have a meaning


def forest(groups: int) -> Tree:
    """Grow one tree per prompt; its edges own the 50 steps in equal parts."""
    parent: list[int] = []
    prompt: list[int] = []
    span: list[tuple[int, int]] = []
    leaves: list[int] = []
    cuts = [round(STEPS * depth / len(BRANCHES)) for depth in range(len(BRANCHES) + 1)]

    def grow(above: int, group: int, depth: int) -> None:
        node = len(parent)
        parent.append(above)
        prompt.append(group)
        span.append((cuts[depth - 1], cuts[depth]) if depth else (0, 0))
        if depth == len(BRANCHES):
            leaves.append(node)
            return
        for _ in range(BRANCHES[depth]):
            grow(node, group, depth + 1)

    for group in range(groups):
        grow(-1, group, 0)
    edges = torch.tensor(span)
    return Tree(
        parent=torch.tensor(parent),
        prompt=torch.tensor(prompt),
        leaf_of_sample=torch.tensor(leaves),
        edge_start=edges[:, 0],
        edge_end=edges[:, 1],
    )


def tables() -> dict[str, Any]:
    """Make every table that a recipe may need."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(SAMPLES, STEPS, REWARDS, generator=generator, dtype=torch.float64)
    group = torch.arange(SAMPLES) // GROUP
    tree = forest(SAMPLES // GROUP)
    owner = tree.leaf_of_sample[:, None].expand(-1, STEPS).clone()
    step = torch.arange(STEPS)
    while bool((step < tree.edge_start[owner]).any()):
        owner = torch.where(step < tree.edge_start[owner], tree.parent[owner], owner)
    return {
        "group_id": group,
        "sample_uid": torch.arange(SAMPLES),
        "metric": 0.01 + 0.99 * uniform[:, 0, :2],
        "log_prob": -uniform[..., 0],
        "step_rewards": uniform,
        "anchor_id": tree.parent[owner] * STEPS + step,
        "baseline": uniform[:, 1],
        "clauses": (uniform[:, 2] > 0.5).double(),
        "clauses_valid": torch.ones(SAMPLES, REWARDS, dtype=torch.bool),
        "tree": tree,
        "rewards": uniform[:, 3],
    }


def batch_for(name: str, everything: dict[str, Any], num_rewards: int) -> RewardBatch:
    """Take what a recipe needs; log-probs are always there, so that the batch has 50 steps."""
    claims = config(name).claims
    wanted = {"group_id", "sample_uid", "log_prob", *claims.needs, *(["clauses_valid"] if "clauses" in claims.needs else [])}
    given = {key: value for key, value in everything.items() if key in wanted}
    for key in ("step_rewards", "baseline"):
        if key in given:
            given[key] = given[key][..., :num_rewards]
    rewards: Tensor = everything["rewards"][:, :num_rewards]
    if claims.domain == "binary":
        rewards = (rewards > 0.5).double()
    elif num_rewards > 1 and claims.num_rewards == 1 and claims.domain != "any":
        rewards = rewards / num_rewards  # their sum has to stay in the range
    return RewardBatch(rewards=rewards, **given)


def numpy_grpo(rewards: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """GRPO as it is usually written: one pass over the batch for each prompt, then a copy for each step."""
    total = rewards.sum(1)
    advantage = np.zeros_like(total)
    for prompt in np.unique(prompts):
        chosen = prompts == prompt
        advantage[chosen] = (total[chosen] - total[chosen].mean()) / (total[chosen].std() + 1e-4)
    return np.repeat(advantage[:, None], STEPS, 1).astype(np.float32)


def clock(call: Callable[[Any], object], inputs: Sequence[Any]) -> dict[str, float]:
    """Time a call on each input: best and median, in milliseconds; the first two calls warm up.

    What counts is the processor's time of this process, which has one thread: the same as the wall time on an idle core, and nearly so on a
    shared one.
    """
    times = []
    for given in inputs:
        start = time.process_time()
        call(given)
        times.append((time.process_time() - start) * 1e3)
    return {"best_ms": min(times[2:]), "median_ms": statistics.median(times[2:])}


def measure(repeats: int) -> dict[str, dict[str, float]]:
    """Time all recipes and the loop."""
    everything = tables()
    rewards, prompts = everything["rewards"].numpy(), everything["group_id"].numpy()
    rows = {"numpy loop (grpo)": clock(lambda _: numpy_grpo(rewards, prompts), range(repeats + 2))}
    for name in names():
        counts = [FIXED.get(name, 1 if config(name).claims.domain == "binary" else REWARDS)]
        for num in [3, *counts] if name == "hypervolume" else counts:
            estimator, batch = recipe(name), batch_for(name, everything, num)
            state = estimator.init()
            label = name if num == REWARDS else f"{name} ({num} reward{'s' if num > 1 else ''})"
            # A fresh batch each time: what a batch remembers is part of the work.
            fresh = [dataclasses.replace(batch) for _ in range(repeats + 2)]
            rows[label] = clock(functools.partial(estimator.update, state=state), fresh)
    rows["checking a batch with every table"] = clock(lambda _: RewardBatch(**everything), range(repeats + 2))
    return rows


def main() -> None:
    """Print the table; write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.repeats)
    for label, times in sorted(rows.items(), key=lambda item: -item[1]["best_ms"]):
        print(f"{label:36s} {times['best_ms']:8.2f} ms best {times['median_ms']:8.2f} ms median")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "hardware": hardware(), "versions": versions()}, indent=1))


if __name__ == "__main__":
    main()
