"""``flowalign demo --distill``, made small: every part runs, and what it leaves is a pipeline that samples in one step."""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from flowalign import demo, one_step
from flowalign.cli import main
from flowalign.run_config import load_config

SMALL = {
    "steps": 3,
    "algorithm.num_pairs": 32,
    "algorithm.warmup_steps": 1,
    "algorithm.least_steps": 1,
    "algorithm.critic_updates": 1,
    "algorithm.weights.num_bins": 1,  # so few samples would leave bins unseen
    "train.groups": 4,
    "train.group_size": 2,
}


def test_the_demo_of_distillation_leaves_a_report_and_a_pipeline_of_one_step(tmp_path, monkeypatch, capsys):
    words = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(demo, "load_config", lambda name: load_config(name, words))
    monkeypatch.setattr(demo, "NUM_PROMPTS", 12)
    monkeypatch.setattr(demo, "IMAGES_PER_PROMPT", 2)
    monkeypatch.setattr(one_step, "TEACHER_STEPS", (1, 8))
    summary = one_step.demo(tmp_path, seed=1, threads=1)
    assert set(summary["teacher_by_steps"]) == {"1", "8"}
    assert summary["share_of_teacher"]["8"] == summary["one_step"]["strict"]["overall"]["mean"] / summary["teacher_by_steps"]["8"]["mean"]
    assert json.loads((tmp_path / "summary.json").read_text())["seed"] == 1
    page = (tmp_path / "report.html").read_text()
    assert "teacher, 8 steps" in page
    assert "Student, 1 step" in page
    assert (tmp_path / "one_step.png").stat().st_size > 1000
    assert "num_inference_steps=1" in capsys.readouterr().out
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "run" / "weights", text_encoder_3=None, tokenizer_3=None)
    made = pipe("a photo of a red ring", num_inference_steps=1, guidance_scale=1.0, max_sequence_length=16, output_type="pt").images
    assert made.shape == (1, 3, 32, 32)
    assert torch.isfinite(made).all()


def test_another_pipeline_is_distilled_from_its_folder_and_the_other_demo_takes_none(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(one_step, "demo", lambda output, **options: asked.append((str(output), options)))
    main(["demo", "--distill", "--model", str(tmp_path)])
    assert asked == [("runs/demo_distill", {"model": str(tmp_path), "seed": 0, "threads": None})]
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--model", str(tmp_path)])
    assert stopped.value.code == 2
    assert "only --distill takes it" in capsys.readouterr().err
