"""The shipped recipes of distillation on tiny random models of the same families: they take steps."""

import math

import pytest
from accelerate import Accelerator

from flowalign.run import build_trainer
from flowalign.run_config import load_config
from tests.pipelines import families

# The recipe, the family's tiny model, and how deep it is tapped: tiny U-Nets have the real ones' names.
RECIPES = {"sd15_f_distill": "sd 1.5", "sdxl_f_distill": "sdxl guided", "sd35m_f_distill": "sd3", "flux_f_distill": "flux dev"}
SMALL = {
    "train.groups": 2,
    "train.group_size": 2,
    "train.micro_batch_size": 4,
    "algorithm.num_pairs": 4,
    "algorithm.least_steps": 1,
    "pipeline.num_steps": 4,
    "pipeline.dtype": "float32",
    "pipeline.gradient_checkpointing": "false",
    "pipeline.height": 16,
    "pipeline.width": 16,
}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red ring\na blue disk\n")
    return path


def small(prompts):
    return [part for key, value in {**SMALL, "prompts.source": prompts}.items() for part in (f"--{key}", str(value))]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_three_steps(prompts, tmp_path, name):
    flags = [*small(prompts), "--output", str(tmp_path / "run")]
    if "sdxl" in name:
        flags += ["--algorithm.warmup_steps", "1"]
    config = load_config(name, flags)
    pipe = families.pipeline(RECIPES[name])
    if hasattr(config.pipeline, "spaced"):
        pipe = config.pipeline.spaced(pipe)
    options = {"lora": config.pipeline.lora, "num_steps": 4, "guidance_scale": config.pipeline.guidance_scale}
    if hasattr(config.pipeline, "max_sequence_length"):
        options["max_sequence_length"] = 12
        flags += ["--pipeline.max_sequence_length", "12"]
        config = load_config(name, flags)
    built = build_trainer(config, Accelerator(), pipeline=families.build(RECIPES[name], pipe=pipe, **options))
    lines = [built.step(step) for step in range(3)]
    assert all(math.isfinite(value) for line in lines for value in line["metrics"].values())
    assert lines[-1]["metrics"]["push"] > 0
    assert lines[-1]["grad_norm"] > 0
    guided = config.algorithm.guidance_scale > 1
    assert ("teacher" in lines[-1]["evaluations"]) == guided
    assert built.collector.sigmas[0] > 0.9
    assert len(built.collector.sigmas) == config.algorithm.student_steps + 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pipeline.timestep_spacing", "leading"], r'schedule of 1 steps begins at level 0\.\d+ .*timestep_spacing "trailing"'),
        (["--algorithm.highest_level", "0.98"], r"highest_level: got 0.98, but this model knows no level above 0.93"),
    ],
)
def test_levels_that_a_student_cannot_begin_at_or_a_model_does_not_know_are_refused(prompts, flags, message):
    config = load_config("sd15_f_distill", [*small(prompts), *flags])
    pipe = config.pipeline.spaced(families.pipeline("sd 1.5"))
    with pytest.raises(ValueError, match=message):
        build_trainer(config, Accelerator(), pipeline=families.build("sd 1.5", pipe=pipe, lora=None, num_steps=4))
