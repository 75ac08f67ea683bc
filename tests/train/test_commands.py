"""Commands as a user gives them: what a run is evaluated by, what survives an unlucky moment, and what is refused before anything is claimed."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file

from flowalign import evaluation, generate, run
from flowalign.run_config import load_config
from flowalign.train import checkpoint
from flowalign.train.journal import read_log


def weights_of(path):
    return load_file(load_config(str(path)).output / "weights" / "pytorch_lora_weights.safetensors")


# -- unlucky moments ------------------------------------------------------------------------------------------------------------


def test_a_kill_between_the_log_and_the_checkpoint_loses_and_repeats_no_line(write_config, monkeypatch):
    whole = write_config("whole")
    run.train(str(whole))
    path = write_config("killed")
    honest, saved = checkpoint.save, []

    def save(folder, step, *rest, **options):
        if step == 2:
            raise RuntimeError("killed here")
        saved.append(step)
        return honest(folder, step, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(RuntimeError, match="killed here"):
            run.train(str(path))
    folder = load_config(str(path)).output
    assert saved == [1]
    assert [line["step"] for line in read_log(folder / "log.jsonl")] == [0, 1]  # step 1 is logged and not in a checkpoint
    run.train(str(path))
    lines, expected = read_log(folder / "log.jsonl"), read_log(load_config(str(whole)).output / "log.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line["metrics"] for line in lines] == [line["metrics"] for line in expected]
    assert all(torch.equal(tensor, weights_of(whole)[name]) for name, tensor in weights_of(path).items())


def test_broken_checkpoints_beyond_the_one_gone_on_from_are_cleared_away(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"a": torch.full((3,), float(step))}, keep=9)
    (tmp_path / "step_000003" / "state.json").write_text("{")
    assert checkpoint.load_newest(tmp_path)[0] == 2
    checkpoint.save(tmp_path, 2, {"a": torch.zeros(3)}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"]


def test_a_disk_that_fills_up_inside_safetensors_is_told_like_any_other(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.save(tmp_path, 1, {"a": torch.zeros(3)})


def test_two_processes_do_not_train_in_one_folder(write_config):
    path = write_config()
    folder = load_config(str(path)).output
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(ValueError, match="another process works in this folder"):
        run.train(str(path))
    run.train(str(path), ["--steps", "1"])  # a lock that was left behind is none


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_is_answered_saved_and_gone_on_from(write_config, monkeypatch, capsys, number):
    path = write_config()
    honest = run.Trainer.step
    monkeypatch.setattr(run.Trainer, "step", lambda trainer, step: (os.kill(os.getpid(), number), honest(trainer, step))[1])
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 1 of 3; the state is saved"):
        run.train(str(path))
    assert signal.getsignal(number) is before
    assert "stopping after this step" in capsys.readouterr().err
    monkeypatch.setattr(run.Trainer, "step", honest)
    run.train(str(path))
    assert [line["step"] for line in read_log(load_config(str(path)).output / "log.jsonl")] == [0, 1, 2]


# -- refused before anything is claimed -----------------------------------------------------------------------------------------


def test_a_mistake_in_any_part_claims_no_folder(write_config):
    path = write_config(rewards=[{"reward": {"type": "tests.train.brightness", "broken": "length"}}, {"reward": "no_such_reward"}])
    with pytest.raises(ValueError, match="no_such_reward"):
        run.train(str(path))
    path = write_config(advantage={"type": "grpo", "epz": 1e-4})
    with pytest.raises(ValueError, match="advantage: recipe 'grpo': unknown option 'epz': did you mean 'eps'"):
        run.train(str(path))
    assert not load_config(str(write_config())).output.exists()


def test_a_group_of_one_is_for_estimators_with_a_baseline_of_their_own(write_config):
    train = {"groups": 2, "group_size": 1, "learning_rate": 1e-2}
    path = write_config(train=train, algorithm={"type": "flow_grpo", "num_minibatches": 1}, advantage="remax")
    trainer = run.build_trainer(load_config(str(path)), Accelerator())
    found = trainer.collect(0)
    # Each image is compared with the ODE's from its own noise: one sample of a prompt has something to learn from.
    assert found.experience.advantage.shape[0] == 2
    assert found.experience.keep.all()
    assert (found.experience.advantage != 0).all()
    assert trainer.step(0)["grad_norm"] > 0
    # One that compares with the whole batch needs no others of its prompt either.
    batch = run.build_trainer(load_config(str(write_config(train=train, advantage="reinforce_pp"))), Accelerator()).collect(0)
    assert batch.experience.advantage.shape[0] == 2
    assert (batch.experience.advantage != 0).any() == (batch.rewards.values[0] != batch.rewards.values[1]).any()
    with pytest.raises(ValueError, match="group_size: got 1; a group estimator compares the samples of a prompt"):
        run.build_trainer(load_config(str(write_config(train=train, advantage="grpo"))), Accelerator())


@pytest.mark.parametrize(
    ("advantage", "message"),
    [
        ({"type": "grpo", "eps": "small"}, "advantage: recipe 'grpo': eps: got 'small', needed a number"),
        (["combine_rewards", {"stage": "centre"}], r"advantage\[1\]: unknown stage 'centre': did you mean 'center'"),
        ([{"type": "combine_rewards"}], r"advantage\[0\]: got \{'type': 'combine_rewards'\}, needed a stage's name"),
        (3, "advantage: needs a recipe's name, a mapping with a 'type' or a list of stages, got 3"),
    ],
)
def test_an_estimator_is_read_as_strictly_as_the_rest(write_config, advantage, message):
    with pytest.raises(ValueError, match=message):
        run.build_trainer(load_config(str(write_config(advantage=advantage))), Accelerator())


def test_reward_weights_beside_a_list_of_stages_are_refused_and_not_left_out(write_config):
    rewards = [{"reward": {"type": "shapes"}, "weight": 2.0}, {"reward": "tests.train.brightness"}]
    path = write_config(rewards=rewards, advantage=["combine_rewards", "center", "broadcast_steps"])
    with pytest.raises(ValueError, match="weights have no meaning beside a list of stages"):
        run.build_trainer(load_config(str(path)), Accelerator())


def test_more_minibatches_than_groups_are_refused(write_config):
    path = write_config(algorithm={"type": "awm", "num_minibatches": 3})
    with pytest.raises(ValueError, match="3 minibatches of whole groups need as many train.groups, got 2"):
        run.build_trainer(load_config(str(path)), Accelerator())


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps one state for the process; give it back as it was."""
    shared = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    AcceleratorState._shared_state.update(shared)


def test_gradient_accumulation_of_accelerate_is_refused(write_config, monkeypatch, fresh_accelerate):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        run.train(str(write_config()))


def test_a_pipeline_on_the_cpu_is_trained_there_where_there_is_a_gpu_too(write_config, monkeypatch):
    config = replace(load_config(str(write_config())), steps=1)
    asked = []
    monkeypatch.setattr(run, "Accelerator", lambda **options: asked.append(options["cpu"]) or Accelerator(**options))
    run.run_training(config, pipeline=config.pipeline.build(seed=0))
    assert asked == [True]


def test_a_pipeline_on_another_device_than_accelerates_is_refused(write_config, monkeypatch, fresh_accelerate):
    config = load_config(str(write_config()))
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    with pytest.raises(ValueError, match="pipeline: is on cpu, but accelerate works on meta"):
        run.run_training(config, pipeline=config.pipeline.build(seed=0))


def test_fewer_steps_than_a_run_has_are_refused(write_config):
    path = write_config()
    run.train(str(path), ["--steps", "2"])
    with pytest.raises(ValueError, match="steps: got 1, but .* holds a run of 2 steps already"):
        run.train(str(path), ["--steps", "1"])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, "it has no GenEval metadata"),
        ({"prompt": "a", "include": [{"cls": "circle", "count": 1}]}, r"include\[0\]: got .*, needed a 'class' and a 'count'"),
        ({"prompt": "a", "include": [{"class": "circle", "count": "x"}]}, r"include\[0\]: got"),
        ({"prompt": "a", "include": [{"class": "whale", "count": 1}]}, "metadata: class 'whale' is not in the shapes world"),
    ],
)
def test_a_record_that_a_reward_cannot_read_is_named_by_its_line_before_anything_is_sampled(write_config, tmp_path, record, message):
    good = {"prompt": "a circle", "include": [{"class": "circle", "count": 1}]}
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(line) for line in (good, record)) + "\n")
    path = write_config(prompts={"source": str(tmp_path / "prompts.jsonl")}, rewards=[{"reward": "shapes"}])
    with pytest.raises(ValueError, match=f"prompts.jsonl, line 2: reward 'shapes' cannot score 'a': {message}"):
        run.train(str(path))
    assert not load_config(str(path)).output.exists()


# -- evaluate and sample --------------------------------------------------------------------------------------------------------


SMALL = {"num_prompts": 6, "images_per_prompt": 1}


def test_a_run_is_evaluated_with_its_own_settings_and_paired_with_its_base(write_config, model, tmp_path, capsys):
    path = write_config()
    run.train(str(path), ["--train.learning_rate", "1e-1"])
    folder = load_config(str(path)).output
    result = evaluation.evaluate(str(model), lora=folder, output=tmp_path / "found", **SMALL)
    assert result["settings"]["num_steps"] == 4  # the run's, not the family's default
    assert result["settings"]["max_sequence_length"] == 16
    assert {"base", "tuned", "paired_difference"} <= result.keys()
    names = sorted(file.name for file in (tmp_path / "found").iterdir())
    assert names == ["records.jsonl", "records_base.jsonl", "report.html", "summary.json"]
    assert json.loads((tmp_path / "found" / "summary.json").read_text())["tuned"] == result["tuned"]
    assert "strict on shapes" in capsys.readouterr().out


def test_two_models_are_compared_with_one_models_settings(write_config, model, monkeypatch):
    path = write_config()
    run.train(str(path))
    folder = load_config(str(path)).output
    built = []
    honest = generate.score_model
    monkeypatch.setattr(evaluation, "score_model", lambda pipeline, *a, **k: built.append(pipeline) or honest(pipeline, *a, **k))
    result = evaluation.evaluate(str(model), lora=folder, against=str(model), **SMALL)
    tuned, base = built
    assert base is not tuned
    assert base.num_steps == tuned.num_steps == 4
    assert result["base"]["strict"] == evaluation.evaluate(str(model), lora=folder, **SMALL)["base"]["strict"]


def test_a_configuration_that_happens_to_lie_around_is_not_taken(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("my: 1\n")
    monkeypatch.chdir(tmp_path)
    settings, _ = generate.open_model("shapes", None)
    assert settings.num_steps == 8


def test_a_file_of_weights_brings_the_settings_of_its_run_and_a_run_is_no_model(write_config, model):
    path = write_config(steps=1)
    run.train(str(path))
    folder = load_config(str(path)).output
    settings, _ = generate.open_model(str(model), folder / "weights" / "pytorch_lora_weights.safetensors")
    assert settings.num_steps == 4
    with pytest.raises(ValueError, match=f"is a run; name the model that it trained and the run as --lora {folder}"):
        generate.open_model(str(folder), None)


def test_the_distance_to_the_base_is_0_before_training_and_that_of_the_role_after(write_config):
    config = load_config(str(write_config(steps=2)), ["--train.ema_decay", "0.9"])
    pipeline = config.pipeline.build(seed=0)
    assert generate.velocity_distance(pipeline, ["a", "b"], "current") == 0
    trainer = run.run_training(config, pipeline=pipeline)
    last, average = (generate.velocity_distance(pipeline, ["a", "b"], role) for role in ("current", trainer.result))
    assert 0 < average != last > 0


def test_full_weights_bring_the_settings_of_their_run(write_config, model):
    path = write_config(pipeline={"type": "sd3", "model": str(model), "num_steps": 3, "max_sequence_length": 16, "lora": None}, steps=1)
    run.train(str(path))
    settings, pipeline = generate.open_model(str(load_config(str(path)).output / "weights"), None)
    assert settings.num_steps == pipeline.num_steps == 3
    assert settings.lora is None


def test_samples_are_a_labelled_grid_and_change_with_the_lora(write_config, model, tmp_path):
    path = write_config()
    run.train(str(path), ["--train.learning_rate", "1e-1"])
    folder = load_config(str(path)).output
    first, second = (
        generate.sample(str(model), ["a red ring"], lora=lora, num_images=2, num_steps=4, output=tmp_path / f"{name}.png").read_bytes()
        for name, lora in (("base", None), ("tuned", folder))
    )
    assert first.startswith(b"\x89PNG")
    assert first != second
    with pytest.raises(ValueError, match="at least one prompt"):
        generate.sample(str(model), [])


# -- a user's own files ---------------------------------------------------------------------------------------------------------

REWARD = '''
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Config:
    """Redness."""

    channel: int = 0

    def build(self):
        return lambda images, prompts, metadata: images[:, self.channel].mean((1, 2))
'''


def test_a_reward_in_the_folder_one_works_in_is_found(write_config, tmp_path):
    work = tmp_path / "work"
    (work / "my_rewards").mkdir(parents=True)
    (work / "my_rewards" / "red.py").write_text(REWARD)
    path = write_config(rewards=[{"reward": {"type": "my_rewards.red"}}], steps=1)
    command = [str(Path(sys.executable).with_name("flowalign")), "train", str(path)]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "red" in read_log(tmp_path / "run" / "log.jsonl")[0]["reward"]
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["rewards"][0]["reward"] == {"type": "my_rewards.red", "channel": 0}
