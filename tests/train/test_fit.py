"""The loop: what must not change a result, what must be refused, and what must survive."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from flowalign import run
from flowalign.core.algorithm import Update
from flowalign.run_config import load_config
from flowalign.train import checkpoint
from flowalign.train.journal import read_log
from tests.train.launch import end_at, on_one_and_two_processes

FLOW_GRPO = {"type": "flow_grpo", "kl_penalty": 0.01, "num_minibatches": 1}


def trainer(path, *overrides):
    config = load_config(str(path), overrides)
    return run.build_trainer(config, Accelerator())


def train(path, *overrides):
    config = load_config(str(path), overrides)
    run.run_training(config)
    return load_file(config.output / "weights" / "pytorch_lora_weights.safetensors"), read_log(config.output / "log.jsonl")


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def gradient(built, step=0, index=0):
    found = built.collect(step)
    experience, velocity = found.experience, found.velocity
    rows = built.algorithm.rows(experience, Update(seed=0, step=step, index=index))
    sums, _ = built.updater._backward("current", rows.split(built.config.micro_batch_size), velocity, experience.keep)
    found = torch.cat([p.grad.flatten() for p in built.cast.parameters])
    for parameter in built.cast.parameters:
        parameter.grad = None
    return found, sums


@pytest.mark.parametrize("algorithm", [{"type": "awm", "num_levels": 2, "levels": "uniform"}, FLOW_GRPO], ids=["awm", "flow_grpo"])
def test_micro_batches_change_nothing_beyond_rounding(write_config, algorithm):
    path = write_config(algorithm=algorithm)
    small, whole = (gradient(trainer(path, "--train.micro_batch_size", size))[0] for size in ("4", "64"))
    assert (small - whole).abs().max() < 1e-5 * whole.abs().max()
    assert whole.abs().max() > 0


def test_before_the_first_update_ratio_is_one_and_kl_is_zero(write_config):
    built = trainer(write_config(algorithm=FLOW_GRPO))
    found = built.collect(0)
    experience, velocity, advantages = found.experience, found.velocity, found.advantages
    rows = built.algorithm.rows(experience, Update(seed=0, step=0, index=0))
    loss = built.algorithm.loss("current", rows, velocity)
    assert (loss.metrics["ratio"] - 1).abs().max() < 1e-6
    assert loss.metrics["kl/reference"].abs().max() < 1e-9
    assert abs(float(loss.value.detach().mean())) < 1e-5  # minus the mean advantage, which is 0 within groups
    assert float(advantages.advantage.abs().max()) > 0.1


def test_awm_sees_the_same_noise_and_level_under_every_role(write_config):
    built = trainer(write_config())
    found = built.collect(0)
    experience, velocity = found.experience, found.velocity
    seen = []

    def watched(x, sigma, sample, role):
        seen.append((x, sigma))
        return velocity(x, sigma, sample, role)

    rows = built.algorithm.rows(experience, Update(seed=0, step=0, index=0))
    loss = built.algorithm.loss("current", rows, watched)
    assert len(seen) == 3  # reference, slow copy, current
    assert all(torch.equal(x, seen[0][0]) and torch.equal(sigma, seen[0][1]) for x, sigma in seen)
    assert loss.metrics["distance/reference"].abs().max() == 0


def test_a_penalty_of_zero_costs_no_pass(write_config):
    algorithm = {"type": "awm", "levels": "uniform", "num_levels": 2, "reference_penalty": 0.0, "slow_penalty": 0.0}
    built = trainer(write_config(algorithm=algorithm))
    assert built.algorithm.roles == {}
    found = built.collect(0)
    experience, velocity = found.experience, found.velocity
    calls = []
    rows = built.algorithm.rows(experience, Update(seed=0, step=0, index=0))
    built.algorithm.loss("current", rows, lambda *a: calls.append(a[3]) or velocity(*a))
    assert calls == ["current"]


def test_minibatches_are_disjoint_whole_groups_that_cover_everything(write_config):
    built = trainer(write_config(train={"groups": 4, "group_size": 2}))
    experience = built.collect(0).experience
    shares = [built.algorithm.rows(experience, Update(seed=0, step=0, index=i)).sample.unique() for i in range(2)]
    assert sorted(torch.cat(shares).tolist()) == list(range(8))
    assert all(len(experience.group[share].unique()) == 2 for share in shares)


def test_an_interrupted_run_ends_with_the_same_bits_as_an_uninterrupted_one(write_config, tmp_path):
    expected, log = train(write_config("whole"))
    part = write_config("parts")
    train(part, "--steps", "1")
    weights, resumed = train(part, "--steps", "3")
    assert same(weights, expected)
    strip = [[{k: line[k] for k in ("step", "reward", "metrics", "grad_norm")} for line in lines] for lines in (log, resumed)]
    assert strip[0] == strip[1]


def test_an_interrupted_run_goes_on_with_what_its_estimator_remembered(write_config, tmp_path):
    def config(folder):
        return write_config(output=str(tmp_path / folder), advantage={"type": "ssb", "max_age": 3})

    _, whole = train(config("whole"), "--steps", "3")
    path = config("parts")
    train(path, "--steps", "2")
    weights, parts = train(path, "--steps", "3")
    forgetful = write_config(output=str(tmp_path / "last"), advantage={"type": "ssb", "max_age": 1})
    _, single = train(forgetful, "--steps", "3")

    def remembered(log):
        return [line["advantage"]["remembered"] for line in log]

    assert remembered(parts) == remembered(whole)
    assert remembered(whole)[2] > remembered(single)[2] > 0  # three steps' samples, not one's
    assert same(weights, load_file(tmp_path / "whole" / "weights" / "pytorch_lora_weights.safetensors"))


def test_a_truncated_checkpoint_is_passed_over_and_this_is_said(write_config, capsys):
    expected, _ = train(write_config("whole"))
    path = write_config("broken")
    train(path, "--steps", "2")
    newest = load_config(str(path)).output / "checkpoints" / "step_000002" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    weights, log = train(path, "--steps", "3")
    assert same(weights, expected)
    assert [line["step"] for line in log] == [0, 1, 2]
    assert "truncated or altered" in capsys.readouterr().err


def test_without_any_whole_checkpoint_the_run_stops_instead_of_starting_over(write_config):
    path = write_config()
    train(path, "--steps", "1")
    for file in load_config(str(path)).output.glob("checkpoints/*/state.json"):
        file.write_text("{")
    with pytest.raises(ValueError, match="none of its 1 checkpoints is whole"):
        train(path, "--steps", "2")


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"a": torch.ones(3)})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="previous one is untouched"):
        checkpoint.save(tmp_path, 2, {"a": torch.zeros(3)})
    step, state = checkpoint.load_newest(tmp_path)
    assert step == 1
    assert torch.equal(state["a"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_checkpoints_hold_nested_state_and_refuse_what_would_need_pickle(tmp_path):
    state = {"a": {0: {"m": torch.ones(2)}, 3: [1.5, None, True]}, "b": "text"}
    checkpoint.save(tmp_path, 7, state)
    step, loaded = checkpoint.load_newest(tmp_path)
    assert step == 7
    assert torch.equal(loaded["a"][0]["m"], torch.ones(2))
    assert loaded["a"][3] == [1.5, None, True]
    with pytest.raises(TypeError, match="without pickling"):
        checkpoint.save(tmp_path, 8, {"f": print})


def test_a_run_that_is_killed_and_interrupted_resumes_to_the_same_bits(write_config):
    path = write_config("broken off", steps=7)
    checkpoints = load_config(str(path)).output / "checkpoints"
    # Steps count from 0 and checkpoints are named by the steps done: each kill but the first has an earlier one to go on from.
    for place, number, reached in (("current", 1, 1), ("tensors", 3, 2), ("rename", 4, 3)):
        ended = end_at(path, place, number, update=1)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert (checkpoints / f"step_{number:06d}.partial").is_dir() == (place != "current")
        assert checkpoint.load_newest(checkpoints)[0] == reached
    ended = end_at(path, "interrupt", 4)
    assert ended.returncode == 130, ended.stderr
    assert "the state is saved" in ended.stderr
    assert checkpoint.load_newest(checkpoints)[0] == 5
    weights, log = train(path)
    expected, unbroken = train(write_config("whole", steps=7))
    assert same(weights, expected)
    assert [line["step"] for line in log] == list(range(7))
    assert [line["metrics"] for line in log] == [line["metrics"] for line in unbroken]
    assert not any(checkpoints.glob("*.partial"))


def test_two_processes_train_like_one(write_config):
    # One update a step: the first step's loss and gradient are those of the same weights.
    awm = {"type": "awm", "levels": "uniform", "num_levels": 2, "num_minibatches": 1, "reference_penalty": 0.1}
    folders = on_one_and_two_processes(write_config, steps=2, algorithm=awm)
    logs = [read_log(folder / "log.jsonl") for folder in folders]
    weights = [load_file(folder / "weights" / "pytorch_lora_weights.safetensors") for folder in folders]
    for (one, two), error in zip(zip(*logs, strict=True), (1e-6, 1e-3), strict=True):
        assert one["images"] == two["images"] == 8
        assert two["reward"] == pytest.approx(one["reward"], abs=error)
        assert two["advantage"] == pytest.approx(one["advantage"], abs=10 * error)
        assert two["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], abs=error)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=100 * error)
    # Adam turns rounding of near-zero gradients into steps of the learning rate; the velocity's weights still agree closely.
    difference = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    assert difference < 5e-3


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("nan", r"reward 'brightness': returned nan for sample 1 \(prompt 'a photo"),
        ("length", r"returned shape \(7,\) for 8 images, needed \(8,\)"),
        ("list", r"reward 'brightness': returned list, needed a tensor \[batch\] or an object with 'values'"),
    ],
)
def test_a_broken_reward_is_named(write_config, broken, message):
    path = write_config(rewards=[{"reward": {"type": "tests.train.brightness", "broken": broken}}])
    with pytest.raises(ValueError, match=message):
        train(path)


def test_a_reward_that_may_skip_leaves_the_sample_out(write_config):
    path = write_config(rewards=[{"reward": {"type": "tests.train.brightness", "broken": "nan"}, "may_skip": True}], steps=1)
    _, log = train(path)
    assert log[0]["advantage"]["kept"] == pytest.approx(7 / 8)


def test_a_loss_that_is_not_finite_stops_before_anything_moves(write_config, monkeypatch):
    built = trainer(write_config())
    before = [parameter.detach().clone() for parameter in built.cast.parameters]
    honest = built.pipeline.velocity
    monkeypatch.setattr(built.pipeline, "velocity", lambda *a, **k: honest(*a, **k) * float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"step 0, player 'current': the loss is nan \(last finite: none yet\); it was not updated"
    ):
        built.step(0)
    assert all(torch.equal(old, new) for old, new in zip(before, built.cast.parameters, strict=True))


def test_weights_that_are_not_finite_are_never_saved(write_config):
    path = write_config()
    with pytest.raises(FloatingPointError, match="step 0, player 'current': the norm of its weights is .*this step is not saved"):
        train(path, "--train.learning_rate", "1e30", "--algorithm.num_minibatches", "1")
    assert not (load_config(str(path)).output / "checkpoints").exists()


def test_a_policy_gradient_through_a_velocity_that_is_not_finite_names_step_and_player(write_config, monkeypatch):
    built = trainer(write_config(algorithm={"type": "flow_grpo"}))
    found = built.collect(0)
    experience, velocity = found.experience, found.velocity
    with pytest.raises(FloatingPointError, match=r"step 0, player 'current': gaussian_log_prob: row 0 is nan.*it was not updated"):
        built.updater.update(experience, lambda *a, **k: velocity(*a, **k) * float("nan"), Update(seed=0, step=0, index=0), ready=True)


def test_a_folder_of_another_configuration_is_refused_with_what_changed(write_config):
    path = write_config()
    train(path, "--steps", "1")
    with pytest.raises(ValueError, match=r"changed: train.learning_rate: 0.01 -> 0.02"):
        train(path, "--train.learning_rate", "0.02")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("--train.group_size", "1"), "train.group_size: got 1; a group estimator compares"),
        (("--train.groups", "9999"), "a step takes 9999 prompts, but there are"),
        (("--train.max_grad_norm", ".nan"), "train.max_grad_norm: got nan, needed a positive number"),
        (("--train.learning_rate", ".inf"), "train.learning_rate: got inf, needed a positive number"),
        (("--rewards.0.weight", "0", "--rewards.1.weight", "0"), "rewards: got none of positive weight"),
        (("--pipeline.dtype", "float16"), "float16 is not usable on a CPU"),
        (("--train.lerning_rate", "1"), "train.lerning_rate: unknown key; did you mean 'learning_rate'"),
        (("--algorithm.type", "awn"), "algorithm.type: unknown type 'awn' of algorithms: did you mean 'awm'"),
        (("--train.learning_rate", "fast"), "train.learning_rate: needs float, got 'fast'"),
        (("--advantage", "gpro"), "did you mean 'grpo'"),
        (("--steps", "0"), "steps: got 0, needed at least 1"),
        (("--algorithm.num_levels", "0"), "algorithm: num_levels: got 0"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused_with_the_place(write_config, override, message):
    with pytest.raises(ValueError, match=message):
        trainer(write_config(), *override)


def test_the_average_of_the_weights_is_what_is_saved_when_asked_for(write_config):
    last, _ = train(write_config("last"))
    averaged, _ = train(write_config("averaged"), "--train.ema_decay", "0.9")
    assert not same(last, averaged)


def adapters(built, role):
    """The role's weights as one vector."""
    state = built.pipeline.roles.state_dict()
    found = state[role] if role in state else state["roles"][role]
    return torch.cat([tensor.flatten() for tensor in found.values()])


def test_roles_follow_their_recursions_and_rates_their_formulas(write_config):
    awm = {
        "type": "awm",
        "levels": "uniform",
        "num_levels": 1,
        "num_minibatches": 2,
        "slow_penalty": 0.5,
        "slow_rate": 0.3,
        "slow_max": 0.8,
    }
    sizes = {
        "groups": 2,
        "group_size": 4,
        "micro_batch_size": 8,
        "learning_rate": 1e-2,
        "warmup": 5,
        "ema_decay": 0.15,
        "max_grad_norm": 1e-4,
    }
    built = trainer(write_config(algorithm=awm, train=sizes))
    slow, average = adapters(built, "ema"), adapters(built, "average")
    rates, norms = [], []
    honest = built.cast.optimizer.step

    def step(*args, **options):
        rates.append(built.cast.optimizer.param_groups[0]["lr"])
        norms.append(float(torch.stack([p.grad.norm() for p in built.cast.parameters]).norm()))
        return honest(*args, **options)

    built.cast.optimizer.step = step
    for number in range(3):
        built.step(number)
        current = adapters(built, "current")
        decay = min(0.8, 0.3 * number)
        slow = decay * slow + (1 - decay) * current
        decay = min(0.15, (1 + number) / (10 + number))
        average = decay * average + (1 - decay) * current
        assert torch.allclose(adapters(built, "ema"), slow, atol=1e-7)
        assert torch.allclose(adapters(built, "average"), average, atol=1e-7)
    assert rates == pytest.approx([1e-2 * min(1.0, number / 5) for number in range(1, 7)])
    assert norms == pytest.approx([1e-4] * 6, rel=1e-2)  # the clip divides by norm + 1e-6


def test_samples_that_are_not_kept_have_no_part_in_the_loss(write_config):
    built = trainer(
        write_config(algorithm={"type": "awm", "num_levels": 2, "levels": "uniform", "num_minibatches": 1, "reference_penalty": 0.3})
    )
    found = built.collect(0)
    experience, update = found.experience, Update(seed=0, step=0, index=0)
    rows = built.algorithm.rows(experience, update)

    def gradient_of(rows, keep):
        sums, _ = built.updater._backward("current", rows.split(built.config.micro_batch_size), found.velocity, keep)
        flat = torch.cat([p.grad.flatten() for p in built.cast.parameters])
        built.cast.optimizer.zero_grad(set_to_none=True)
        return flat, {name: float(total / number) for name, (total, number) in sums.items()}

    keep = torch.tensor([True, False, True, True, False, True, True, False])
    alone = rows.take(keep[rows.sample].nonzero()[:, 0])
    masked, left_out = gradient_of(rows, keep), gradient_of(alone, torch.ones(8, dtype=torch.bool))
    assert torch.allclose(masked[0], left_out[0], atol=1e-6 * float(left_out[0].abs().max()))
    assert masked[1] == pytest.approx(left_out[1], rel=1e-5)
    before = [parameter.detach().clone() for parameter in built.cast.parameters]
    assert built.updater.update(replace(experience, keep=torch.zeros(8, dtype=torch.bool)), found.velocity, update, ready=True) == {}
    assert all(torch.equal(old, new) for old, new in zip(before, built.cast.parameters, strict=True))


def test_estimators_with_a_memory_meet_prompts_and_samples_under_lasting_ids(write_config, monkeypatch):
    built = trainer(write_config(advantage="ssb"))
    seen = []
    honest = type(built.estimator).update
    monkeypatch.setattr(type(built.estimator), "update", lambda e, batch, state: seen.append(batch) or honest(e, batch, state))
    for step in range(3):
        built.collect(step)
    ids = torch.cat([batch.sample_uid for batch in seen])
    assert len(ids.unique()) == len(ids) == 24
    for step, batch in enumerate(seen):
        assert set(batch.group_id.tolist()) == {prompt.uid for prompt in built.draw(step)}


def test_full_weights_train_too(write_config, model):
    path = write_config(pipeline={"type": "sd3", "model": str(model), "num_steps": 4, "max_sequence_length": 16, "lora": None}, steps=1)
    config = load_config(str(path), ["--train.learning_rate", "1e-4"])
    run.run_training(config)
    assert (config.output / "weights" / "model_index.json").is_file()


def test_a_run_writes_its_log_samples_and_resolved_configuration(write_config):
    path = write_config(steps=1)
    _, log = train(path, "--train.sample_every", "1")
    folder = load_config(str(path)).output
    assert {path.name for path in (folder / "samples").iterdir()} == {"base.png", "step_000001.png"}
    assert set(log[0]["time_s"]) >= {"rollout", "reward", "train", "total"}
    assert set(log[0]["reward"]) == {"shapes", "brightness"}
    again = load_config(str(folder / "config.yaml"))
    assert again == replace(load_config(str(path)), train=again.train)
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[0])["images"] == 8


def test_samples_over_time_differ_by_the_weights_alone(write_config):
    """A rate that moves nothing: the base's grid again; and no sampling of grids changes what is trained."""
    path = write_config(steps=2)
    train(path, "--train.sample_every", "1", "--train.learning_rate", "1e-30")
    folder = load_config(str(path)).output / "samples"
    pictures = [(folder / name).read_bytes() for name in ("base.png", "step_000001.png", "step_000002.png")]
    assert pictures[0] == pictures[1] == pictures[2]
    weights = [train(write_config(f"every_{every}", steps=2), "--train.sample_every", str(every))[0] for every in (0, 1)]
    assert same(*weights)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_gets_every_step(write_config, tmp_path, monkeypatch, tracker):
    pytest.importorskip(tracker)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    logged = []
    honest = Accelerator.log
    monkeypatch.setattr(
        Accelerator, "log", lambda self, values, step=None, **k: logged.append((step, values)) or honest(self, values, step=step, **k)
    )
    path = write_config(steps=2)
    _, log = train(path, "--train.trackers", f"[{tracker}]")
    assert [step for step, _ in logged] == [0, 1]
    assert [values["reward/shapes"] for _, values in logged] == [line["reward"]["shapes"] for line in log]
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        files = [file.parent for file in load_config(str(path)).output.rglob("events.out.tfevents.*")]
        written = [EventAccumulator(str(folder)).Reload() for folder in set(files)]
        points = [event for events in written if "reward/shapes" in events.Tags()["scalars"] for event in events.Scalars("reward/shapes")]
        assert [(event.step, event.value) for event in points] == [
            (i, pytest.approx(line["reward"]["shapes"])) for i, line in enumerate(log)
        ]


def test_a_tracker_that_is_not_there_is_refused_and_not_left_out(write_config, monkeypatch):
    with pytest.raises(ValueError, match=r"train.trackers\[0\]: got 'tensorbord'.*did you mean 'tensorboard'"):
        train(write_config(), "--train.trackers", "[tensorbord]")
    honest = run.importlib.util.find_spec
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else honest(name, *rest))
    with pytest.raises(ValueError, match=r"wandb is not installed; pip install 'flowalign-diffusion\[wandb\]'"):
        train(write_config(), "--train.trackers", "[wandb]")


def test_a_key_that_could_be_two_is_refused_before_it_is_lost():
    with pytest.raises(ValueError, match="the key 'critic/error' holds '/'"):
        checkpoint.flatten({"evidence": {"critic/error": 1.0}})
