"""Wall time of training iterations over the time of the passes that they cannot do without.

Every iteration is a real one of the training loop, checkpoint and log included. The denoiser's calls are noted while it runs; right after it the
bare work is done again with the same inputs: the same forwards, a backward for each that carried gradient, the decoding and the scoring, nothing
else. What an algorithm may call is counted beforehand from its configuration, so that a needless pass is an error and not part of the bare time.

    python benchmarks/overhead.py shapes_awm shapes_flow_grpo --steps 8 --json overhead.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flowalign import run
from flowalign.env import hardware, versions
from flowalign.run_config import RunConfig, load_config
from flowalign.train.collect import Collected
from flowalign.train.journal import read_log

REFERENCE = "reference"
LIMIT = 1.20  # of the median ratio; above it the command fails
EVERY = [
    f"shapes_{name}"
    for name in ("awm", "flow_grpo", "tempflow", "fast", "mix_grpo", "guard", "dppo", "ddpo", "nft", "dgpo", "branch_grpo", "ac_flow")
]
# A policy that waits for its critic would have nothing to measure.
OWN = {"shapes_ac_flow": ["--algorithm.least_steps", "0"]}
Call = tuple[str, bool, dict[str, Any]]  # role, gradient, arguments


@dataclass
class Watch:
    """Notes the denoiser's calls and redoes the bare work after each step."""

    trainer: Any
    expected: Callable[[int], Counter[tuple[str, bool]]]
    bare: list[dict[str, float]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    pause: bool = False

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Denoiser hook, after a pass: encoding a prompt stops before it."""
        if not self.pause:
            held = {name: value.detach() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
            self.calls.append((self.trainer.pipeline.roles.active, torch.is_grad_enabled(), held))

    def after_step(self, line: dict[str, Any], found: Collected) -> None:
        """Check the number of rows, then time the same work without the library around it."""
        latents = "hidden_states"
        rows = Counter[tuple[str, bool]]()
        for role, gradient, arguments in self.calls:
            rows[role, gradient] += len(arguments[latents])
        expected = self.expected(line["step"])
        if rows != expected:
            raise SystemExit(f"denoiser rows (role, gradient): made {dict(rows)}, the mathematics needs {dict(expected)}")
        self.pause = True
        taken = {"rollout": 0.0, "train": 0.0, "decode": 0.0, "reward": 0.0}
        for role, gradient, arguments in self.calls:
            sampling = role != REFERENCE and not gradient
            taken["rollout" if sampling else "train"] += timed(lambda r=role, g=gradient, a=arguments: self._pass(r, g, a))
        taken["decode"] = timed(lambda: self._decode(len(found.images)))
        taken["reward"] = timed(lambda: self._score(found.images, line["step"]))
        self.trainer.cast.optimizer.zero_grad(set_to_none=True)
        self.bare.append(taken)
        self.calls, self.pause = [], False

    def _pass(self, role: str, gradient: bool, arguments: dict[str, Any]) -> None:
        with self.trainer.pipeline.roles.use(role) as network, contextlib.nullcontext() if gradient else torch.no_grad():
            out = network(**arguments)[0]
            if gradient:
                out.float().square().mean().backward()

    @torch.no_grad()
    def _decode(self, num: int) -> None:
        pipeline = self.trainer.pipeline
        latents = torch.randn(num, *pipeline.event_shape, device=pipeline.device, dtype=pipeline.pipe.vae.dtype)
        for part in latents.split(64):
            pipeline.pipe.vae.decode(part, return_dict=False)

    def _score(self, images: Tensor, step: int) -> None:
        each = len(images) // self.trainer.config.groups
        prompts = [prompt for prompt in self.trainer.draw(step) for _ in range(each)]
        for entry in self.trainer.rewards:
            entry.reward(images, [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts])


def timed(work: Callable[[], object]) -> float:
    """Seconds of a piece of work, the device's included."""
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def wait() -> None:
    """Let the device finish."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def needed(config: RunConfig) -> Callable[[int], Counter[tuple[str, bool]]]:
    """Count the denoiser's rows of a step that the mathematics needs, by role and gradient: what plans and levels say, nothing measured."""
    seeds = config.train.groups * config.train.group_size
    algorithm = config.algorithm.build()
    steps = config.pipeline.num_steps
    guided = 2 if config.pipeline.guidance_scale > 1 else 1

    def count(step: int) -> Counter[tuple[str, bool]]:
        plan = algorithm.plan(step, steps, config.seed)
        if plan.trained:
            trained = plan.training_evaluations
        else:
            levels = config.algorithm.num_levels
            trained = steps - 1 if levels is None else levels
        rows = Counter({(algorithm.behaviour, False): seeds * plan.evaluations * guided})
        rows["current", True] = seeds * trained * config.algorithm.num_epochs * guided
        for role in algorithm.roles:
            rows[role, False] += rows["current", True]
        return rows

    return count


def measure(name: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """Train and report the shares of an iteration and its ratio to the bare work."""
    with tempfile.TemporaryDirectory() as folder:
        # The first step learns the pipeline, allocates and warms up: it is left out.
        config = replace(load_config(name, [*OWN.get(name, []), *overrides]), steps=steps + 1, output=Path(folder) / "run")
        config.output.mkdir()
        trainer = run.build_trainer(config, Accelerator())
        trainer.pipeline.encode(["a"])  # learns how the pipeline calls its denoiser, once
        watch = Watch(trainer, needed(config))
        trainer.after_step = watch.after_step
        handle = trainer.pipeline.denoiser.register_forward_hook(watch.note, with_kwargs=True)
        trainer.fit(config.steps)
        handle.remove()
        log = read_log(config.output / "log.jsonl")[1:]
    bare = watch.bare[1:]
    spent = [line["time_s"] for line in log]
    whole = [times["total"] - sum(again.values()) for times, again in zip(spent, bare, strict=True)]
    ratios = [total / sum(again.values()) for total, again in zip(whole, bare, strict=True)]
    median = statistics.median
    phases = {
        phase: median(times.get(phase, 0.0) for times in spent) for phase in ("rollout", "reward", "advantage", "train", "checkpoint")
    }
    phases["rest"] = max(0.0, median(whole) - sum(phases.values()))
    return {
        "config": name,
        "overrides": overrides,
        "steps": steps,
        "iteration_s": median(whole),
        "phases_s": phases,
        "bare_s": {phase: median(again[phase] for again in bare) for phase in bare[0]},
        "ratio": {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios), "of_sums": sum(whole) / sum(map(_sum, bare))},
    }


def _sum(times: dict[str, float]) -> float:
    return sum(times.values())


def show(result: dict[str, Any]) -> None:
    """Print one configuration's table."""
    ratio, phases, bare = result["ratio"], result["phases_s"], result["bare_s"]
    print(f"\n{result['config']}: {result['iteration_s']:.2f} s an iteration (median of {result['steps']})")
    print(f"{'phase':<28}{'iteration':>10}{'bare':>10}")
    pairs = {"rollout (denoiser, decoding)": ("rollout", bare["rollout"] + bare["decode"]), "reward": ("reward", bare["reward"])}
    pairs["training"] = ("train", bare["train"])
    for title, (phase, floor) in pairs.items():
        print(f"{title:<28}{phases[phase]:>10.3f}{floor:>10.3f}")
    for phase in ("advantage", "checkpoint", "rest"):
        print(f"{phase:<28}{phases[phase]:>10.3f}")
    print(
        f"ratio to the bare work: {ratio['median']:.3f} (range {ratio['lowest']:.3f} to {ratio['highest']:.3f}; of sums {ratio['of_sums']:.3f})"
    )


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=EVERY)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--set", action="append", default=[], metavar="--KEY=VALUE", help="override a configuration key")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    overrides = [word for pair in options.set for word in pair.split("=", 1)]
    results = []
    for name in options.configs:
        results.append(measure(name, overrides, options.steps))
        show(results[-1])
        if options.json:  # at once: a later configuration that fails loses nothing
            options.json.write_text(json.dumps({"hardware": hardware(), "versions": versions(), "results": results}, indent=2) + "\n")
    above = [result["config"] for result in results if result["ratio"]["median"] > LIMIT]
    if above:
        raise SystemExit(f"more than {LIMIT} times the bare work: {', '.join(above)}")


if __name__ == "__main__":
    main()
