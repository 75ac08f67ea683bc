"""The demo: the main job from end to end, on the shipped world, through the code that trains large models."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from flowalign import config as configuration
from flowalign import shapes
from flowalign.config import ConfigError
from flowalign.env import how_made, versions
from flowalign.evaluate import drift
from flowalign.evaluate.charts import Chart, curve_from_log
from flowalign.evaluate.records import Evaluation, compare, table
from flowalign.evaluate.report import Report, Share, Table, comparisons, headline, score_rows, write_report
from flowalign.evaluate.suites import ShapesSuite
from flowalign.generate import score_model, velocity_distance
from flowalign.run import run_training
from flowalign.run_config import RunConfig, load_config
from flowalign.train.journal import read_log

NUM_PROMPTS, IMAGES_PER_PROMPT = 150, 4
NOTES = (
    "Held-out prompts ask for meanings that neither pretraining nor this run has seen.",
    "Intervals are 95 %, from a bootstrap over prompts within tags; they do not cover the spread between training seeds.",
)
_MOST_THREADS = 8  # beyond that the small networks only wait for each other


def demo(output: Path, *, seed: int = 0, threads: int | None = None) -> dict[str, Any]:
    """Evaluate the shipped base on held-out prompts, align it with AWM, evaluate again, and write a report.

    Args:
        output: Folder for ``report.html``, ``summary.json``, the records and the run with its LoRA.
        seed: Seed of the training run; the evaluation's prompts and noise are always the same.
        threads: CPU threads; None for all cores, at most 8.

    Returns:
        What ``summary.json`` holds.
    """
    began = time.monotonic()
    config, suite = begin("shapes_awm", output, seed=seed, threads=threads)
    num_steps = config.pipeline.num_steps
    print(f"flowalign demo: AWM on the shipped StableDiffusion3Pipeline, seed {seed}, {torch.get_num_threads()} CPU threads")
    pipeline = config.pipeline.build(seed=seed)
    print(f"1/3  the base on {NUM_PROMPTS} held-out prompts, {IMAGES_PER_PROMPT} images each")
    base = score_model(pipeline, suite, num_steps=num_steps, seed=0, title="base")
    print(f"     strict {base.scores().overall}")
    print(f"2/3  {config.steps} training steps on other prompts")
    evaluated = time.monotonic()
    trainer = run_training(config, pipeline=pipeline)
    trained = time.monotonic()
    print("3/3  the tuned model on the same prompts and noise")
    tuned = score_model(pipeline, suite, num_steps=num_steps, seed=0, title="tuned", role=trainer.result)
    assert base.images is not None
    moved = drift.suite_drift(suite, base.images, tuned)
    distance = velocity_distance(pipeline, list(dict.fromkeys(record.prompt for record in tuned.records))[:64], trainer.result)
    phases = {"evaluation": time.monotonic() - began - (trained - evaluated), "training": trained - evaluated}
    return _finish(output, config, base, tuned, moved, distance, phases, time.monotonic() - began)


def begin(name: str, output: Path, *, seed: int, threads: int | None) -> tuple[RunConfig, ShapesSuite]:
    """Set the threads of a demo (all cores, at most 8, unless told) and make its folder.

    Returns:
        The shipped configuration of that name, to be run in the folder, and what its models are scored on.

    Raises:
        ConfigError: If the shipped pipeline is missing.
    """
    torch.set_num_threads(threads or min(_MOST_THREADS, os.cpu_count() or 1))
    if not (shapes.FOLDER / "model_index.json").is_file():
        raise ConfigError(f"{shapes.FOLDER}: the shipped pipeline is missing; reinstall flowalign")
    output.mkdir(parents=True, exist_ok=True)
    suite = ShapesSuite(split="heldout", num_prompts=NUM_PROMPTS, images_per_prompt=IMAGES_PER_PROMPT)
    return replace(load_config(name), seed=seed, output=output / "run"), suite


def _distance_row(distance: float) -> list[str]:
    return [
        "Velocity distance x 1000",
        "0",
        f"{1000 * distance:.1f}",
        "",
        "Mean squared difference to the base's velocities on held-out prompts",
    ]


def _finish(
    output: Path,
    config: RunConfig,
    base: Evaluation,
    tuned: Evaluation,
    moved: drift.Drift,
    distance: float,
    phases: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    """Write records, report and summary, and say the result."""
    base.write(output / "records_base.jsonl")
    tuned.write(output / "records_tuned.jsonl")
    differences = compare(base, tuned)
    log = read_log(config.output / "log.jsonl")
    summary = {
        "base": base.summary(),
        "tuned": tuned.summary(),
        "paired_difference": {measure: found.as_dict() for measure, found in differences.items()},
        "drift": {**moved.as_dict(), "velocity_distance": distance},
        "seconds": round(seconds, 1),
        "seed": config.seed,
        "versions": versions(),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report = write_report(output / "report.html", _report(config, base, tuned, moved, distance, phases, log))
    print(f"\n{table(base, tuned)}\n")
    print(f"base   strict {base.scores().overall}   graded {base.scores('graded').overall}")
    print(f"tuned  strict {tuned.scores().overall}   graded {tuned.scores('graded').overall}")
    gained = differences["strict"]
    print(f"gain   strict {gained.overall} (paired, 95 % interval; sign-flip p = {gained.p_value:.4f})")
    print(f"drift  mean squared velocity distance to the base {distance:.4f} on held-out prompts")
    print(f"report {report}\nLoRA   {config.output / 'weights'}\ntime   {seconds:.0f} s")
    return summary


def _report(
    config: RunConfig,
    base: Evaluation,
    tuned: Evaluation,
    moved: drift.Drift,
    distance: float,
    phases: dict[str, float],
    log: list[dict[str, Any]],
) -> Report:
    flat = [{"step": line["step"] + 1, **line["reward"], **line["metrics"], "grad_norm": line["grad_norm"]} for line in log]
    charts = [Chart(title="Reward on training prompts", curves=[curve_from_log(flat, name) for name in log[0]["reward"]])]
    if "distance/reference" in log[0]["metrics"]:
        curve = curve_from_log(flat, "distance/reference", name="velocity")
        charts.append(Chart(title="Distance to the base (mean squared velocity)", curves=[curve]))
    charts.append(Chart(title="Gradient norm", curves=[curve_from_log(flat, "grad_norm", name="before clipping")]))
    names = ("rollout", "reward", "advantage", "train", "checkpoint")
    inside = {name: sum(line["time_s"].get(name, 0.0) for line in log) for name in names}
    shares = [Share(name="evaluation", seconds=phases["evaluation"])]
    shares += [Share(name=f"training: {name}", seconds=seconds) for name, seconds in inside.items()]
    return Report(
        title="flowalign demo",
        subtitle=f"AWM on the shipped shapes pipeline, {base.suite}, training seed {config.seed}",
        headline=headline(base, tuned, name="Strict score on held-out prompts"),
        comparisons=comparisons(base, tuned),
        scores=score_rows(base, tuned),
        charts=charts,
        shares=shares,
        tables=[Table(title="Drift and fidelity", columns=drift.COLUMNS, rows=[*moved.rows(), _distance_row(distance)])],
        configuration=yaml.safe_dump(configuration.encode(config), sort_keys=False),
        **how_made(),
        notes=NOTES,
    )
