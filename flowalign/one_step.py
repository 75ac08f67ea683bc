"""The second half of ``flowalign demo --distill``: the tuned model as a student of one step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.core.algorithm import REFERENCE
from flowalign.evaluate.charts import Chart, curve_from_log
from flowalign.evaluate.records import Evaluation
from flowalign.evaluate.report import Table
from flowalign.generate import merge, score_model
from flowalign.run import run_training
from flowalign.run_config import load_config
from flowalign.train.journal import read_log

TEACHER_STEPS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class OneStep:
    """What became of a distillation.

    Attributes:
        student: Scores of the student in one step.
        teacher: Scores of the teacher, which is the tuned model, by number of steps.
        run: The run's folder.
        seconds: What it took, evaluation included.
    """

    student: Evaluation
    teacher: dict[int, Evaluation]
    run: Path
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Return scores for ``summary.json``."""
        teacher = {str(steps): evaluation.scores().overall.mean for steps, evaluation in self.teacher.items()}
        return {
            **self.student.summary(),
            "teacher_by_steps": teacher,
            "share_of_teacher": self.share(),
            "distillation_seconds": round(self.seconds, 1),
        }

    def share(self) -> float:
        """Return the student's strict score over the teacher's at its most steps."""
        best = self.teacher[max(self.teacher)].scores().overall.mean
        return self.student.scores().overall.mean / best

    def table(self) -> Table:
        """Return the scores by number of steps."""
        rows = [
            [f"tuned, {steps} steps" if steps > 1 else "tuned, 1 step", str(found.scores().overall), str(found.scores("graded").overall)]
            for steps, found in self.teacher.items()
        ]
        rows.append(["student, 1 step", str(self.student.scores().overall), str(self.student.scores("graded").overall)])
        caption = f"The student has {self.share():.0%} of the strict score that the tuned model has in {max(self.teacher)} steps."
        return Table(title="In one step", columns=("Model", "Strict", "Graded"), rows=rows, caption=caption)

    def charts(self) -> list[Chart]:
        """Return curves of the distillation."""
        flat = [
            {"step": line["step"] + 1, **line["reward"], **line["monitor"], **line["metrics"]} for line in read_log(self.run / "log.jsonl")
        ]
        names = (
            ("shapes", "Student's strict score on training prompts"),
            ("diversity", "Student's diversity within a prompt"),
            ("ratio/effective_share", "Effective share of the batch"),
        )
        return [Chart(title=f"Distillation: {title[0].lower()}{title[1:]}", curves=[curve_from_log(flat, key)]) for key, title in names]


def distil(output: Path, run: Path, suite: Any, *, seed: int) -> OneStep:
    """Merge a run's LoRA into the shipped pipeline and distil the result into one step.

    Args:
        output: Folder of the demo; gets ``aligned`` and ``one_step``.
        run: Folder of the run that aligned it.
        suite: What both are scored on.
        seed: Seed of the distillation.
    """
    began = time.monotonic()
    aligned = output / "aligned"
    if not (aligned / "model_index.json").is_file():
        merge("shapes", lora=run, output=aligned)
    config = load_config("shapes_f_distill", ["--pipeline.model", str(aligned), "--output", str(output / "one_step"), "--seed", str(seed)])
    pipeline = config.pipeline.build(seed=seed)
    trainer = run_training(config, pipeline=pipeline)
    steps = config.algorithm.student_steps
    student = score_model(pipeline, suite, num_steps=steps, seed=0, title="one step", role=trainer.result)
    teacher = {
        num: score_model(pipeline, suite, num_steps=num, seed=0, title=f"tuned, {num} steps", role=REFERENCE) for num in TEACHER_STEPS
    }
    return OneStep(student=student, teacher=teacher, run=config.output, seconds=time.monotonic() - began)
