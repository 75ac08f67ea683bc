"""One run of a benchmark, in a process of its own: ``python -m flowalign.benchmark.cell FOLDER``."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from flowalign import config as configuration
from flowalign.benchmark.meter import Meter
from flowalign.benchmark.spec import Cell
from flowalign.core.algorithm import REFERENCE, HasHeads, NeverReady
from flowalign.env import hardware, versions
from flowalign.evaluate.distances import manifold
from flowalign.evaluate.drift import suite_drift
from flowalign.evaluate.fidelity import RandomFeatures, features_of, relative_diversity, within_prompt_distance
from flowalign.evaluate.records import Evaluation, read_evaluation
from flowalign.evaluate.suites import ShapesSuite, Suite
from flowalign.files import write_atomically
from flowalign.generate import generator_of, score_model, student_steps, velocity_distance
from flowalign.pipelines.base import FlowPipeline
from flowalign.run import build_trainer
from flowalign.run_config import RunConfig, load_config
from flowalign.train.fit import Trainer
from flowalign.train.flops import measure
from flowalign.train.pairs import PairCollector
from flowalign.train.protocols import PromptLike
from flowalign.train.scoring import score

RESULT, IMAGES = "result.json", "images.safetensors"
_DRIFT_PROMPTS = 64
_TRIAL_PROMPTS, _TRIAL_IMAGES, _TRIAL_BATCH = 128, 2, 64
_NEIGHBOURS = 5


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
    chosen = cell.suite.build()
    if cell.phase == "base":
        result = _score_base(folder, cell, config, chosen)
    else:
        trainer = build_trainer(config, Accelerator(mixed_precision="no"))
        result = _train(folder, cell, config, trainer, chosen)
    write_atomically(
        folder / RESULT, json.dumps({"cell": cell.written(), "versions": versions(), "hardware": hardware(), **result}, indent=2) + "\n"
    )
    return result


def _score_base(folder: Path, cell: Cell, config: RunConfig, chosen: Suite) -> dict[str, Any]:
    pipeline = config.pipeline.build(device=Accelerator().device, seed=0)
    base = score_model(pipeline, chosen, num_steps=pipeline.num_steps, seed=0, title="base", role=REFERENCE)
    assert base.images is not None
    base.scores(cell.suite.headline)  # a measure that there is not is noticed here
    base.write(folder / "records.jsonl")
    save_file({"images": base.images.contiguous()}, folder / IMAGES)
    return {"scores": {measure: base.scores(measure).overall.as_dict() for measure in base.measures()}}


def _train(folder: Path, cell: Cell, config: RunConfig, trainer: Trainer, chosen: Suite) -> dict[str, Any]:
    """Train until one more step would exceed the budget, scoring on the way."""
    assert isinstance(trainer.pipeline, FlowPipeline)
    trainer.pipeline.encode(["a"])  # learns once how the pipeline calls its denoiser: no part of a method's price
    cost_of_one = measure(trainer.pipeline, trainer.accelerator, None)  # takes time, which is no method's
    rows = trainer.pipeline.rows_per_evaluation
    meter = Meter(network=trainer.pipeline.denoiser, forward=cost_of_one.forward / rows, backward=cost_of_one.backward / rows)
    weights = [entry.weight for entry in config.rewards]
    reward: float | None = None
    milestones: list[dict[str, Any]] = []
    base = load_file(_base_of(folder, cell) / IMAGES)["images"] if cell.milestones else torch.empty(0)
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
            last = meter.spent()[cell.unit] - before
            # The first step warms machines up: in seconds it is no measure of the next ones.
            cost = last if cell.unit == "seconds" and step == 1 else max(cost, last)
            step, images = step + 1, images + line["images"]
            if meter.spent()[cell.unit] > cell.amount and step == 1:
                raise ValueError(f"budget: one step costs {cost:g} {cell.unit}, more than the {cell.amount:g} there are")
            log.write(json.dumps({**line, "spent": meter.spent()}) + "\n")
            print(
                f"step {step}: reward {_weighted(weights, line['reward'].values()):.4f}, {meter.spent()[cell.unit] / cell.amount:.0%} of the budget",
                flush=True,
            )
            ends = meter.spent()[cell.unit] + cost > cell.amount
            due = cell.milestones and meter.spent()[cell.unit] >= cell.amount * (len(milestones) + 1) / cell.milestones
            if cell.milestones and (ends or due):
                try:
                    with meter.pause():
                        measured = _measure(folder, cell, base, trainer, num_steps, chosen)
                except FloatingPointError as error:
                    failed = str(error)
                    break
                milestones.append({"step": step, "spent": meter.spent(), **measured})
    if failed and cell.milestones:
        # It counts with what was last measured: leaving it out would let a method that diverges look like its best seeds.
        last_known = milestones[-1] if milestones else _untrained(folder, cell, base, chosen)
        milestones.append({**last_known, "step": step, "spent": meter.spent()})
    if not failed and not trainer.gate.is_open:
        failed = f"the policy never moved: its critic held it back for all {step} steps"
    if cell.phase == "search" and not failed:
        try:
            with meter.pause():
                reward = _training_reward(trainer, weights, num_steps)
        except FloatingPointError as error:
            failed = str(error)
    # Steps in which critics hold the policy back are paid for and move nothing.
    moved = step - (trainer.gate.held_back if isinstance(trainer.algorithm, HasHeads) else 0)
    return {
        "steps": step,
        "updates": moved * trainer.algorithm.num_updates,
        "images": images,
        "spent": meter.spent(),
        "reward": reward,
        "failed": failed,
        "milestones": milestones,
    }


def _training_reward(trainer: Trainer, weights: Sequence[float], num_steps: int) -> float:
    """Score what the model makes of training prompts, the same ones and noise for every trial: the log ends before its last update."""
    collector, pipeline = trainer.collector, trainer.pipeline
    assert isinstance(pipeline, FlowPipeline)
    prompts: dict[int, PromptLike] = {}
    for step in range(_TRIAL_PROMPTS):  # a step draws one at least; how many is a setting that may be searched
        prompts |= {prompt.uid: prompt for prompt in collector.draw(step)}
        if len(prompts) >= _TRIAL_PROMPTS:
            break
    generate = generator_of(pipeline, num_steps, trainer.result, seed=1)
    values = []
    chosen = list(prompts.values())[:_TRIAL_PROMPTS]
    for start in range(0, len(chosen), _TRIAL_BATCH):
        asked = [prompt for prompt in chosen[start : start + _TRIAL_BATCH] for _ in range(_TRIAL_IMAGES)]
        texts = [prompt.text for prompt in asked]
        images = generate(texts, [(prompt.uid, number % _TRIAL_IMAGES) for number, prompt in enumerate(asked)])
        values.append(score(collector.rewards, images, texts, [prompt.metadata for prompt in asked]).values)
    return _weighted(weights, torch.cat(values).nanmean(0).tolist())  # NaN is "not computed", which only rewards that may skip return


def _weighted(weights: Sequence[float], values: Iterable[float]) -> float:
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def _untrained(folder: Path, cell: Cell, base: torch.Tensor, chosen: Suite) -> dict[str, Any]:
    """Return what a run that failed before it was measured counts with: the base's own scores."""
    found = replace(read_evaluation(_base_of(folder, cell) / "records.jsonl"), images=base)
    found.write(folder / "records.jsonl")
    return {**_scores(cell, found), "velocity_distance": 0.0, **_compare_images(base, found, chosen)}


def _base_of(folder: Path, cell: Cell) -> Path:
    return folder.parent.parent / "base" / cell.reference


def _scores(cell: Cell, found: Evaluation) -> dict[str, Any]:
    scores = {measure: found.scores(measure).overall.mean for measure in found.measures()}
    return {"score": scores[cell.suite.headline], "scores": scores}


def _measure(folder: Path, cell: Cell, base: torch.Tensor, trainer: Trainer, num_steps: int, chosen: Suite) -> dict[str, Any]:
    """Score the model as it is now, and measure how far it is from the base."""
    pipeline = trainer.pipeline
    assert isinstance(pipeline, FlowPipeline)
    tuned = score_model(pipeline, chosen, num_steps=num_steps, seed=0, title="tuned", role=trainer.result)
    tuned.write(folder / "records.jsonl")
    prompts = list(dict.fromkeys(record.prompt for record in tuned.records))[:_DRIFT_PROMPTS]
    return {
        **_scores(cell, tuned),
        "velocity_distance": _finite("velocity_distance", velocity_distance(pipeline, prompts, trainer.result)),
        **_compare_images(base, tuned, chosen),
    }


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise FloatingPointError(f"{name}: is {value}; the policy has diverged")
    return value


def _compare_images(base: torch.Tensor, tuned: Evaluation, chosen: Suite) -> dict[str, float]:
    assert tuned.images is not None
    ids = [record.id for record in tuned.records]
    if isinstance(chosen, ShapesSuite):
        moved = suite_drift(chosen, base, tuned)
        return {"diversity": moved.feature_diversity.mean, "kernel_distance": moved.distance_tuned.mean}
    # Other suites have no real images of their prompts: what is kept of the base's images is measured instead.
    found = {"diversity": relative_diversity(within_prompt_distance(base, ids), within_prompt_distance(tuned.images, ids)).mean}
    if len(base) > _NEIGHBOURS:
        network = RandomFeatures()
        kept = manifold(*(features_of(images, network=network) for images in (tuned.images, base)), neighbours=_NEIGHBOURS)
        found |= {"precision": kept.precision, "coverage": kept.coverage}
    return found


if __name__ == "__main__":
    run_cell(Path(sys.argv[1]), threads=int(sys.argv[2]) if len(sys.argv) > 2 else None)
