"""``flowalign demo --distill``: the shipped pipeline, or another of the shapes world, as a student that samples in one step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from flowalign import config as configuration
from flowalign import images
from flowalign.demo import NOTES, begin
from flowalign.env import how_made, versions
from flowalign.evaluate.charts import Chart, curve_from_log
from flowalign.evaluate.drift import COLUMNS, suite_drift
from flowalign.evaluate.records import Evaluation, compare
from flowalign.evaluate.report import Report, Share, Table, comparisons, headline, score_rows, write_report
from flowalign.evaluate.suites import ShapesSuite
from flowalign.generate import score_model
from flowalign.run import run_training, teacher_of
from flowalign.run_config import RunConfig
from flowalign.train.journal import read_log

TEACHER_STEPS = (1, 8, 20)  # 2 and 4: docs/results.md


def demo(output: Path, *, model: str = "shapes", seed: int = 0, threads: int | None = None) -> dict[str, Any]:
    """Evaluate a pipeline of the shapes world in 1 to 20 steps, distil it with f-distill, evaluate the student in one, and write a report.

    Args:
        output: Folder for ``report.html``, ``summary.json``, ``one_step.png``, the records and the run with its weights, which are a pipeline.
        model: "shapes", the shipped pipeline, or a folder with another of its kind.
        seed: Seed of the training run; the evaluation's prompts and noise are always the same.
        threads: CPU threads; None for all cores, at most 8.

    Returns:
        What ``summary.json`` holds.
    """
    began = time.monotonic()
    config, suite = begin("shapes_f_distill", output, seed=seed, threads=threads)
    # An alarm is told and the student scored all the same: a demo that stops shows nothing.
    config = replace(config, pipeline=replace(config.pipeline, model=model), train=replace(config.train, stop_on_alarm=False))
    print(f"flowalign demo: f-distill of {_named(model)} into one step, seed {seed}")
    pipeline = config.pipeline.build(seed=seed)
    guided = teacher_of(config, pipeline) or pipeline
    print(
        f"1/3  the teacher, guidance {config.algorithm.guidance_scale:g}, on {suite.num_prompts} held-out prompts, {suite.images_per_prompt} images each"
    )
    teacher = {}
    for num in TEACHER_STEPS:
        teacher[num] = score_model(guided, suite, num_steps=num, seed=0, title=f"teacher, {_steps(num)}")
        print(f"     {_steps(num):>8}: strict {teacher[num].scores().overall}")
    print(f"2/3  {config.steps} training steps on other prompts; the first makes {config.algorithm.num_pairs} samples of the teacher")
    evaluated = time.monotonic()
    trainer = run_training(config, pipeline=pipeline)
    trained = time.monotonic()
    print("3/3  the student on the same prompts and noise, in one step")
    student = score_model(pipeline, suite, num_steps=1, seed=0, title="student", role=trainer.result)
    phases = {"evaluation": time.monotonic() - began - (trained - evaluated), "training": trained - evaluated}
    return _finish(output, config, suite, teacher, student, phases)


def _finish(
    output: Path, config: RunConfig, suite: ShapesSuite, teacher: Mapping[int, Evaluation], student: Evaluation, phases: Mapping[str, float]
) -> dict[str, Any]:
    """Write records, pictures, report and summary, and say the result."""
    usual = teacher[config.pipeline.num_steps]
    reached = {num: teacher[num].scores().overall.mean for num in (config.pipeline.num_steps, max(teacher))}
    shares = {num: student.scores().overall.mean / mean if mean else math.nan for num, mean in reached.items()}
    usual.write(output / "records_base.jsonl")
    student.write(output / "records_one_step.jsonl")
    assert student.images is not None
    assert usual.images is not None
    images.save_png(images.grid(student.images[: 8 * suite.images_per_prompt], 8, scale=3), output / "one_step.png")
    differences, scored = compare(usual, student), student.summary()
    summary = {
        # The names of `flowalign demo`: what was trained is the student.
        "base": usual.summary(),
        "tuned": scored,
        "one_step": scored,
        "paired_difference": {measure: found.as_dict() for measure, found in differences.items()},
        "teacher_by_steps": {str(num): found.scores().overall.as_dict() for num, found in teacher.items()},
        "share_of_teacher": {str(num): share for num, share in shares.items()},
        "seconds": round(sum(phases.values()), 1),
        "seed": config.seed,
        "versions": versions(),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    moved = suite_drift(suite, usual.images, student)
    log = read_log(config.output / "log.jsonl")
    told = " and ".join(f"{share:.0%} of the strict score that the teacher has in {num} steps" for num, share in shares.items())
    report = Report(
        title="flowalign demo: one step",
        subtitle=f"f-distill of {_named(config.pipeline.model)}, teacher's guidance {config.algorithm.guidance_scale:g}, "
        f"{student.suite}, training seed {config.seed}",
        names=(f"teacher, {config.pipeline.num_steps} steps", "student, 1 step"),
        headline=headline(usual, student, name="Strict score on held-out prompts", note=f"The student has {told}."),
        comparisons=comparisons(usual, student, further=("teacher, 1 step", teacher[1])),
        scores=score_rows(usual, student),
        charts=_charts(log),
        shares=[Share(name=name, seconds=seconds) for name, seconds in phases.items()],
        tables=[_steps_table(teacher, student), Table(title="Drift and fidelity", columns=COLUMNS, rows=moved.rows())],
        configuration=yaml.safe_dump(configuration.encode(config), sort_keys=False),
        **how_made(),
        notes=[*NOTES, "In the table of drift, base and tuned are teacher and student."],
    )
    path = write_report(output / "report.html", report)
    print(f"\nstudent, 1 step: strict {student.scores().overall}, {told}")
    print(f"report {path}\nimages {output / 'one_step.png'}\nmodel  {config.output / 'weights'} (from_pretrained, num_inference_steps=1)")
    print(f"time   {sum(phases.values()):.0f} s")
    return summary


def _steps_table(teacher: Mapping[int, Evaluation], student: Evaluation) -> Table:
    rows = [
        [name, str(found.scores().overall), str(found.scores("graded").overall)]
        for name, found in [*((f"teacher, {_steps(num)}", found) for num, found in teacher.items()), ("student, 1 step", student)]
    ]
    return Table(title="By number of steps", columns=("Model", "Strict", "Graded"), rows=rows)


def _named(model: str) -> str:
    return "the shipped pipeline" if model == "shapes" else Path(model).resolve().name


def _steps(num: int) -> str:
    return f"{num} steps" if num > 1 else "1 step"


def _charts(log: list[dict[str, Any]]) -> list[Chart]:
    flat = [{"step": line["step"] + 1, **line["reward"], **line["monitor"], **line["metrics"]} for line in log]
    names = (
        ("shapes", "Student's strict score on training prompts"),
        ("pair_error", "Warm-up: distance to the teacher's samples of the same noise"),
        ("fake/error", "Fake score's error"),
        ("diversity", "Student's diversity within a prompt"),
        ("ratio/effective_share", "Effective share of the batch"),
    )
    return [Chart(title=title, curves=[curve_from_log(flat, key)]) for key, title in names if any(key in line for line in flat)]
