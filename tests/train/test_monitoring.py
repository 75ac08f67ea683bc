"""What a run watches by default, and what it does when a reward server is gone."""

import pytest
import torch
from safetensors.torch import load_file

from flowalign import run
from flowalign.evaluate import monitors
from flowalign.rewards.plain import PlainReward
from flowalign.run_config import load_config
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
    assert set(log_of(whole)[0]["monitor"]) == {*monitors.PIXELS, "diversity"}


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
