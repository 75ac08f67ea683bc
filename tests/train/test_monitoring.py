"""What a run watches by default, and what it does when a reward server is gone."""

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from flowalign import run
from flowalign.evaluate import monitors
from flowalign.pipelines.lora_files import notes_of
from flowalign.rewards.plain import PlainReward
from flowalign.run_config import load_config
from flowalign.train import checkpoint
from flowalign.train.best import Best
from flowalign.train.fit import Alarmed
from flowalign.train.journal import read_log
from flowalign.train.scoring import NamedReward, score


def log_of(path):
    return read_log(load_config(str(path)).output / "log.jsonl")


def test_every_step_is_watched_and_resuming_changes_nothing(write_config):
    whole, parts = write_config("whole"), write_config("parts")
    run.train(str(whole))
    run.train(str(parts), ["--steps", "2"])
    run.train(str(parts), ["--steps", "3"])
    assert [line["monitor"] for line in log_of(whole)] == [line["monitor"] for line in log_of(parts)]
    first = log_of(whole)[0]["monitor"]
    assert set(first) == {*monitors.PIXELS, *monitors.NORMS, "diversity"}
    assert all(first[name] > 0 for name in monitors.NORMS)


def test_norms_are_of_the_latents_and_of_the_trained_velocities(write_config):
    trainer = run.build_trainer(load_config(str(write_config())), Accelerator())
    found = trainer.collect(0)
    latents = found.experience.trajectory.x0
    assert trainer._norms(found) == {"latent_rms": pytest.approx(float(latents.square().mean().sqrt()))}  # nothing was trained yet
    rows = torch.arange(3)
    first = found.velocity(latents[rows], torch.full((3,), 0.5), rows, "current")
    second = found.velocity(latents[:1], torch.full((1,), 0.7), rows[:1], "current")
    with torch.no_grad():
        found.velocity(latents, torch.full((len(latents),), 0.5), torch.arange(len(latents)), "reference")
    expected = torch.cat([first, second]).detach().square().mean().sqrt()
    assert trainer._norms(found)["velocity_rms"] == pytest.approx(float(expected))


def test_the_best_step_by_a_watched_reward_is_kept_and_written(write_config, capsys):
    rewards = [{"reward": {"type": "shapes", "strict": 0.0}}, {"reward": "tests.train.brightness", "weight": 0.0}]
    changes = {"rewards": rewards, "steps": 8}
    train = {"groups": 2, "group_size": 4, "micro_batch_size": 8, "learning_rate": 1e-2, "keep_best_by": "brightness"}
    whole, parts = write_config("whole", train=train, **changes), write_config("parts", train=train, **changes)
    run.train(str(whole))
    run.train(str(parts), ["--steps", "6"])
    run.train(str(parts))
    lines = [line["reward"]["brightness"] for line in log_of(whole)]
    means = [sum(lines[i : i + 5]) / 5 for i in range(4)]
    best = 5 + max(range(4), key=means.__getitem__)
    folder = load_config(str(whole)).output
    assert [path.name for path in (folder / "best").glob("step_*")] == [f"step_{best:06d}"]
    assert f"(step {best}: brightness {max(means):.4f})" in capsys.readouterr().out
    files = [load_file(load_config(str(path)).output / "best_weights" / "pytorch_lora_weights.safetensors") for path in (whole, parts)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    _, state = checkpoint.load_newest(folder / "best")
    kept = torch.cat([value.flatten() for value in state["roles"]["current"].values()])
    assert float(kept.abs().sum()) == pytest.approx(float(sum(value.abs().sum() for value in files[0].values())), rel=0.5)
    last = load_file(folder / "weights" / "pytorch_lora_weights.safetensors")
    assert (best == 8) == all(torch.equal(files[0][name], last[name]) for name in last)
    for name, step in (("best_weights", best), ("weights", 8)):
        notes = notes_of(folder / name)
        assert notes["steps"] == str(step)
        assert json.loads(notes["last_rewards"]) == log_of(whole)[step - 1]["reward"]


def test_a_best_that_nothing_logs_is_refused_and_few_steps_have_none(write_config, capsys):
    train = {"groups": 2, "group_size": 4, "micro_batch_size": 8, "keep_best_by": "brightnes"}
    with pytest.raises(ValueError, match="keep_best_by: got 'brightnes', but what is logged is brightness, .*, shapes"):
        run.train(str(write_config(train=train)))
    run.train(str(write_config("few", train={**train, "keep_best_by": "brightness"})))
    assert "best weights: none, because 5 steps" in capsys.readouterr().out


def test_what_is_not_finite_is_never_the_best():
    best = Best(by="a")
    values = [1.0, 1.0, 1.0, 1.0, float("nan"), 2.0, 2.0, 2.0, 2.0, 2.0, 1.0]
    assert [best.look({"step": i, "reward": {"a": value}}) for i, value in enumerate(values)] == [False] * 9 + [True, False]
    assert (best.value, best.step) == (2.0, 10)
    other = Best(by="b")
    other.load_state_dict(best.state_dict())
    assert other.value is None


def test_a_run_stops_at_an_alarm_where_that_is_asked_for_and_goes_on_where_not(write_config, monkeypatch):
    monkeypatch.setattr(monitors, "_WINDOW", 1)
    monkeypatch.setattr(monitors, "_LEAST", -1.0)
    monkeypatch.setattr(monitors, "_SPREADS", 0.0)
    path = write_config()
    with pytest.raises(Alarmed, match=r"stopped after step 2 of 3: brightness has moved.*--train.stop_on_alarm false goes on"):
        run.train(str(path), ["--train.stop_on_alarm", "true"])
    assert len(log_of(path)) == 2
    folder = load_config(str(path)).output / "weights"
    assert (folder / "pytorch_lora_weights.safetensors").is_file()  # what it was stopped for does not cost its weights
    assert "2 steps" in (folder / "README.md").read_text()
    assert notes_of(folder)["steps"] == "2"
    run.train(str(path))
    assert len(log_of(path)) == 3


def test_an_alarm_is_told_once_and_logged_at_every_step(write_config, monkeypatch, capsys):
    monkeypatch.setattr(monitors, "_WINDOW", 1)
    monkeypatch.setattr(monitors, "_LEAST", -1.0)
    monkeypatch.setattr(monitors, "_SPREADS", 0.0)
    path = write_config()
    run.train(str(path))
    assert ["alarm" in line for line in log_of(path)] == [False, True, True]
    assert capsys.readouterr().out.count("brightness has moved") == 1


calls = []


def gone(prompts, images):
    """A server that is away at the third call."""
    calls.append(1)
    if len(calls) == 3:
        raise ConnectionError("no answer")
    return images.mean((1, 2, 3))


def test_a_run_whose_server_is_gone_saves_its_state_and_goes_on_to_the_same_weights(write_config):
    train = {"groups": 2, "group_size": 4, "micro_batch_size": 8, "learning_rate": 1e-2, "checkpoint_every": 10}
    rewards = [{"reward": "tests.train.test_monitoring.gone"}]
    calls.clear()
    broken = write_config("broken", train=train, rewards=rewards)
    with pytest.raises(ConnectionError, match="no answer"):
        run.train(str(broken))
    folder = load_config(str(broken)).output
    assert [path.name for path in sorted((folder / "checkpoints").glob("step_*"))] == ["step_000002"]
    run.train(str(broken))
    whole = write_config("whole", train=train, rewards=rewards)
    run.train(str(whole))
    one, two = (load_file(load_config(str(path)).output / "weights" / "pytorch_lora_weights.safetensors") for path in (broken, whole))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_rewards_that_work_elsewhere_are_started_first_and_waited_for_last():
    order = []

    class Far:
        def submit(self, images, prompts, metadata):
            order.append("sent")
            return lambda: order.append("waited") or torch.ones(len(images))

        def __call__(self, images, prompts, metadata):
            raise AssertionError("is not called")

    near = PlainReward(lambda images: order.append("near") or [2.0] * len(images))
    table = score(
        [NamedReward(name="near", reward=near), NamedReward(name="far", reward=Far())], torch.rand(2, 3, 4, 4), ["a"] * 2, [{}] * 2
    )
    assert order == ["sent", "near", "waited"]
    assert (table.names, table.values.tolist()) == (("near", "far"), [[2, 1], [2, 1]])
