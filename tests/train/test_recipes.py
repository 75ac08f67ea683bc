"""The shipped recipes of distillation on tiny random models of the same families: they take steps."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from flowalign.config import ConfigError, encode
from flowalign.core.algorithm import Update, sample_number
from flowalign.core.plans import ode
from flowalign.core.randomness import normal
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
    "algorithm.weights.num_bins": 1,  # so few samples would leave bins unseen
    "rewards": "[]",
    "train.keep_best_by": "null",
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


def build(name, prompts, folder, *more):
    """A recipe on its family's tiny model: the configuration and the trainer."""
    flags = [*small(prompts), "--output", str(folder), *more]
    config = load_config(name, flags)
    pipe = families.pipeline(RECIPES[name])
    if hasattr(config.pipeline, "spaced"):
        pipe = config.pipeline.spaced(pipe)
    options = {"lora": config.pipeline.lora, "num_steps": 4, "guidance_scale": config.pipeline.guidance_scale}
    if hasattr(config.pipeline, "max_sequence_length"):
        options["max_sequence_length"] = 12
        flags += ["--pipeline.max_sequence_length", "12"]
        config = load_config(name, flags)
    return config, build_trainer(config, Accelerator(), pipeline=families.build(RECIPES[name], pipe=pipe, **options))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_measures_its_student_and_keeps_the_best_one(name):
    config = load_config(name)
    assert [type(entry.reward).__module__.rpartition(".")[2] for entry in config.rewards] == [config.train.keep_best_by] == ["pickscore"]
    assert config.train.stop_on_alarm


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_three_steps(prompts, tmp_path, name):
    config, built = build(name, prompts, tmp_path / "run", *(["--algorithm.warmup_steps", "1"] if "sdxl" in name else []))
    lines = [built.step(step) for step in range(3)]
    assert all(math.isfinite(value) for line in lines for value in line["metrics"].values())
    assert lines[-1]["metrics"]["push"] > 0
    assert lines[-1]["grad_norm"] > 0
    guided = config.algorithm.guidance_scale > 1
    assert ("teacher" in lines[-1]["evaluations"]) == guided
    assert built.collector.sigmas[0] > 0.9
    assert len(built.collector.sigmas) == config.algorithm.student_steps + 1


@pytest.mark.parametrize("student_steps", [1, 2])
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_trained_at_the_last_rung_is_what_the_pipeline_decodes(prompts, tmp_path, name, student_steps):
    """To rounding: a variance-preserving pipeline ends above sigma 0, in its own coordinates."""
    _, built = build(name, prompts, tmp_path / "run", "--algorithm.student_steps", str(student_steps), "--algorithm.warmup_steps", "0")
    found = built.collect(0)
    rows = built.algorithm.rows(found.experience, Update(seed=0, step=0, index=0))
    columns = {**rows.columns, "rung": torch.full_like(rows["rung"], student_steps - 1)}
    with torch.no_grad():
        made = built.algorithm.generate(replace(rows, columns=columns), found.velocity)
    # Drawn here, not divided out of the rows: a first state that is not spread as the pipeline's must show.
    pairs, chosen = found.experience, rows.sample
    numbers = sample_number(pairs.group[chosen], pairs.sample[chosen])
    noise = normal(pairs.x0.shape[1:], seed=0, purpose="student noise", step=0, prompts=pairs.prompt[chosen], samples=numbers)
    done = built.pipeline.rollout(found.velocity.cond.take(rows.sample), ode(student_steps), x_init=noise, noise=lambda step: noise)
    assert (made - done.x0).abs().max() < 2e-5 * done.x0.abs().max()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pipeline.timestep_spacing", "leading"], r'schedule of 1 steps begins at level 0\.\d+ .*timestep_spacing "trailing"'),
        (["--algorithm.student_steps", "3"], r"algorithm.student_steps: got 3, .*take a divisor of its number of training timesteps"),
        (["--algorithm.student_steps", "1001"], r"algorithm.student_steps: got 1001, .*take a divisor of its number of training timesteps"),
        (["--algorithm.levels.highest", "0.98"], r"levels.highest: got 0.98, but this model knows levels from 0.028\d to 0.936\d alone"),
        (["--algorithm.levels.lowest", "0.001"], r"levels.lowest: got 0.001, but this model knows levels from 0.028\d"),
        (["--algorithm.fake.levels", "{lowest: 0.001}"], r"fake.levels.(highest|lowest): got 0.\d+, but this model knows"),
        (["--pipeline.timestep_spacing", "leading", "--algorithm.student_steps", "2"], r"schedule of 2 steps begins at level 0\.6\d+"),
        (["--pipeline.timestep_spacing", "leading", "--algorithm.student_steps", "4"], r"schedule of 4 steps begins at level 0\.\d+"),
    ],
)
def test_levels_that_a_student_cannot_begin_at_or_a_model_does_not_know_are_refused(prompts, flags, message):
    config = load_config("sd15_f_distill", [*small(prompts), *flags])
    pipe = config.pipeline.spaced(families.pipeline("sd 1.5"))
    with pytest.raises(ValueError, match=message):
        build_trainer(config, Accelerator(), pipeline=families.build("sd 1.5", pipe=pipe, lora=None, num_steps=4))


def test_guidance_by_a_second_pass_is_refused_for_a_model_that_is_told_of_guidance(prompts, tmp_path):
    with pytest.raises(
        ConfigError, match=r"algorithm.guidance_scale: got 3.0, but this model is told of guidance already \(pipeline.guidance_scale: 3.5\)"
    ):
        build("flux_f_distill", prompts, tmp_path / "run", "--algorithm.guidance_scale", "3")
    flags = ("--algorithm.guidance_scale", "3", "--pipeline.guidance_scale", "1", "--algorithm.student_steps", "1")
    _, built = build("flux_f_distill", prompts, tmp_path / "other", *flags)
    assert built.teacher.rows_per_evaluation == 2 * built.pipeline.rows_per_evaluation


def test_the_two_recipes_of_the_shapes_world_differ_in_the_weight_alone():
    one, two = (encode(load_config(name)) for name in ("shapes_f_distill", "shapes_dmd2"))
    assert one["algorithm"].pop("type") == "f_distill"
    assert two["algorithm"].pop("type") == "dmd2"
    del one["algorithm"]["weights"], one["algorithm"]["weigh_guidance"], one["output"], two["output"]
    assert one == two
