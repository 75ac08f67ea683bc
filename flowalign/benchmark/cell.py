"""One run of a benchmark, in a process of its own: ``python -m flowalign.benchmark.cell FOLDER``."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from flowalign import config as configuration
from flowalign.benchmark.meter import Meter
from flowalign.benchmark.spec import Cell
from flowalign.core.algorithm import REFERENCE, NeverReady
from flowalign.evaluate.drift import measure_drift
from flowalign.evaluate.fidelity import relative_diversity, within_prompt_distance
from flowalign.evaluate.records import Evaluation, read_evaluation
from flowalign.evaluate.suites import ShapesSuite, Suite, suite
from flowalign.generate import score_model, student_steps, velocity_distance
from flowalign.pipelines.base import FlowPipeline
from flowalign.run import build_trainer
from flowalign.run_config import RunConfig, load_config
from flowalign.train.fit import Trainer
from flowalign.train.journal import write_atomically
from flowalign.train.pairs import PairCollector

RESULT, IMAGES = "result.json", "images.safetensors"
_DRIFT_PROMPTS = 64


def run_cell(folder: Path, *, threads: int | None = None) -> dict[str, Any]:
    """Run the cell that ``folder/cell.json`` describes, and write its result, which appears whole or not at all.

    Args:
        folder: The cell's folder; the images of its base lie in ``../../base/KEY``.
        threads: CPU threads; None to leave them.

    Returns:
        What ``result.json`` holds.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    cell: Cell = configuration.decode(Cell, json.loads((folder / "cell.json").read_text(encoding="utf-8")))
    config = load_config(cell.base, cell.arguments(folder / "run"))
    chosen = suite(cell.suite.name, num_prompts=cell.suite.num_prompts, images_per_prompt=cell.suite.images_per_prompt)
    if cell.phase == "base":
        result = _score_base(folder, config, chosen)
    else:
        trainer = build_trainer(config, Accelerator(mixed_precision="no"))
        result = _train(folder, cell, config, trainer, chosen)
    write_atomically(folder / RESULT, json.dumps({"cell": asdict(cell), **result}, indent=2) + "\n")
    return result


def _score_base(folder: Path, config: RunConfig, chosen: Suite) -> dict[str, Any]:
    pipeline = config.pipeline.build(device=Accelerator().device, seed=0)
    base = score_model(pipeline, chosen, num_steps=pipeline.num_steps, seed=0, title="base", role=REFERENCE)
    assert base.images is not None
    base.write(folder / "records.jsonl")
    save_file({"images": base.images.contiguous()}, folder / IMAGES)
    return {"scores": {measure: base.scores(measure).overall.as_dict() for measure in ("strict", "graded")}}


def _train(folder: Path, cell: Cell, config: RunConfig, trainer: Trainer, chosen: Suite) -> dict[str, Any]:
    """Train until one more step would exceed the budget, scoring on the way."""
    assert isinstance(trainer.pipeline, FlowPipeline)
    trainer.pipeline.encode(["a"])  # learns once how the pipeline calls its denoiser: no part of a method's price
    meter = Meter(network=trainer.pipeline.denoiser)
    weights = [entry.weight for entry in config.rewards]
    rewards: list[float] = []
    milestones: list[dict[str, Any]] = []
    base = load_file(folder.parent.parent / "base" / cell.reference / IMAGES)["images"] if cell.milestones else torch.empty(0)
    num_steps = student_steps(config) or trainer.pipeline.num_steps
    step, cost, images, failed = 0, 0.0, 0, ""
    with (folder / "log.jsonl").open("w", encoding="utf-8") as log, meter.attached():
        if isinstance(trainer.collector, PairCollector):
            trainer.collector.prepare()  # the teacher's samples are a part of the price, but not of a step's
        while meter.spent()[cell.unit] + cost <= cell.amount or step == 0:
            before, began = meter.spent()[cell.unit], time.perf_counter()
            try:
                line = trainer.step(step)
            except (FloatingPointError, NeverReady) as error:
                failed = str(error)  # an outcome of the method, and not of the machine
                break
            meter.seconds += time.perf_counter() - began
            cost, step, images = max(cost, meter.spent()[cell.unit] - before), step + 1, images + line["images"]
            if meter.spent()[cell.unit] > cell.amount and step == 1:
                raise ValueError(f"budget: one step costs {cost:g} {cell.unit}, more than the {cell.amount:g} there are")
            rewards.append(sum(weight * value for weight, value in zip(weights, line["reward"].values(), strict=True)))
            log.write(json.dumps({**line, "spent": meter.spent()}) + "\n")
            print(f"step {step}: reward {rewards[-1]:.4f}, {meter.spent()[cell.unit] / cell.amount:.0%} of the budget", flush=True)
            ends = meter.spent()[cell.unit] + cost > cell.amount
            due = cell.milestones and meter.spent()[cell.unit] >= cell.amount * (len(milestones) + 1) / cell.milestones
            if cell.milestones and (ends or due):
                with meter.pause():
                    milestones.append({"step": step, "spent": meter.spent(), **_measure(folder, base, trainer, num_steps, chosen)})
    if failed and cell.milestones:
        # It counts with what was last measured: leaving it out would let a method that diverges look like its best seeds.
        last_known = milestones[-1] if milestones else _untrained(folder, base, folder.parent.parent / "base" / cell.reference, chosen)
        milestones.append({**last_known, "step": step, "spent": meter.spent()})
    if not failed and not trainer.may_move:
        failed = f"the policy never moved: its critic held it back for all {step} steps"
    last = rewards[-max(1, len(rewards) // 4) :]
    return {
        "steps": step,
        "updates": step * trainer.algorithm.num_updates,
        "images": images,
        "spent": meter.spent(),
        "reward": sum(last) / len(last) if last else None,
        "failed": failed,
        "milestones": milestones,
    }


def _untrained(folder: Path, base: torch.Tensor, scored: Path, chosen: Suite) -> dict[str, Any]:
    """Return what a run that failed before it was measured counts with: the base's own scores."""
    found = replace(read_evaluation(scored / "records.jsonl"), images=base)
    found.write(folder / "records.jsonl")
    scores = {measure: found.scores(measure).overall.mean for measure in ("strict", "graded")}
    return {**scores, "velocity_distance": 0.0, **_compare_images(base, found, chosen)}


def _measure(folder: Path, base: torch.Tensor, trainer: Trainer, num_steps: int, chosen: Suite) -> dict[str, Any]:
    """Score the model as it is now, and measure how far it is from the base."""
    pipeline = trainer.pipeline
    assert isinstance(pipeline, FlowPipeline)
    tuned = score_model(pipeline, chosen, num_steps=num_steps, seed=0, title="tuned", role=trainer.result)
    tuned.write(folder / "records.jsonl")
    prompts = list(dict.fromkeys(record.prompt for record in tuned.records))[:_DRIFT_PROMPTS]
    return {
        "strict": tuned.scores("strict").overall.mean,
        "graded": tuned.scores("graded").overall.mean,
        "velocity_distance": velocity_distance(pipeline, prompts, trainer.result),
        **_compare_images(base, tuned, chosen),
    }


def _compare_images(base: torch.Tensor, tuned: Evaluation, chosen: Suite) -> dict[str, float]:
    assert tuned.images is not None
    ids = [record.id for record in tuned.records]
    if isinstance(chosen, ShapesSuite):
        moved = measure_drift(base, tuned.images, chosen.reference(seed=1), chosen.reference(seed=2), ids)
        return {"diversity": moved.feature_diversity.mean, "kernel_distance": moved.distance_tuned.mean}
    # Other suites have no real images of their prompts to measure a distance to.
    return {"diversity": relative_diversity(within_prompt_distance(base, ids), within_prompt_distance(tuned.images, ids)).mean}


if __name__ == "__main__":
    run_cell(Path(sys.argv[1]), threads=int(sys.argv[2]) if len(sys.argv) > 2 else None)
