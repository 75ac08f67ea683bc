"""A reward that breaks: the run stops with its state saved, on every rank, and goes on to the same last bit once the reward is mended."""

import os

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flowalign import run
from flowalign.run_config import load_config
from flowalign.train.journal import read_log
from tests.train.launch import launch, together

TRAIN = {"groups": 2, "group_size": 4, "micro_batch_size": 8, "learning_rate": 1e-2, "checkpoint_every": 10}
BROKEN = "FLOWALIGN_TEST_BROKEN"  # as what, at which call, on which rank
DISTIL = {"type": "dmd2", "num_pairs": 16, "critic_updates": 1, "least_steps": 1, "discriminator": {"taps": [0.5], "width": 8}}
calls = []


def fragile(images):
    """The mean brightness, as long as nothing breaks."""
    calls.append(len(images))
    how, at, rank = os.environ.get(BROKEN, "well 0 0").split()
    values = images.double().mean((1, 2, 3))
    if len(calls) == int(at) and os.environ.get("RANK", "0") == rank:
        if how == "raises":
            raise RuntimeError("mine broke")
        return values * float("nan")
    return values


REWARDS = [{"reward": "tests.train.test_failing.fragile"}, {"reward": {"type": "shapes", "strict": 0.0}}]


def left(path):
    """What a run has come to: its weights and its checkpoint's state."""
    folder = load_config(str(path)).output
    state = folder / "checkpoints" / "step_000004" / "state.safetensors"
    return load_file(folder / "weights" / "pytorch_lora_weights.safetensors"), load_file(state)


def log_of(path):
    timeless = ("time_s", "tflops", "utilisation")
    return [
        {key: value for key, value in line.items() if key not in timeless} for line in read_log(load_config(str(path)).output / "log.jsonl")
    ]


@pytest.mark.parametrize("how", ["raises", "nan"])
@pytest.mark.parametrize("algorithm", ["an estimator with a memory", "a distillation"])
def test_a_run_goes_on_to_the_last_bit_after_its_reward_was_mended(write_config, monkeypatch, how, algorithm):
    changes = {"advantage": "hypervolume"} if algorithm == "an estimator with a memory" else {"algorithm": DISTIL}
    changes |= {"train": TRAIN, "rewards": REWARDS, "steps": 4}
    broken, whole = write_config("broken", **changes), write_config("whole", **changes)
    monkeypatch.setenv(BROKEN, f"{how} 3 0")
    calls.clear()
    with pytest.raises((RuntimeError, ValueError), match=r"mine broke|'fragile': returned nan"):
        run.train(str(broken))
    folder = load_config(str(broken)).output
    assert [path.name for path in (folder / "checkpoints").glob("step_*")] == ["step_000002"]
    monkeypatch.delenv(BROKEN)
    run.train(str(broken))
    run.train(str(whole))
    for one, two in zip(left(broken), left(whole), strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in two)
    assert log_of(broken) == log_of(whole)


def test_what_fails_after_something_has_moved_is_not_saved_as_what_was_before(write_config, monkeypatch):
    path = write_config(train=TRAIN, rewards=REWARDS)
    trainer = run.build_trainer(load_config(str(path)), run._accelerator(load_config(str(path)), cpu=True))

    def broken(line, images):
        if line["step"] == 2:
            raise ConnectionError("the disk is full")

    trainer.after_step = broken
    trainer.folder.mkdir()
    with pytest.raises(ConnectionError, match="the disk is full"):
        trainer.fit(3)
    assert not list((trainer.folder / "checkpoints").glob("step_*"))


@pytest.fixture(scope="module")
def launched(tmp_path_factory, model):
    """Runs of two processes, each with all weights or with a part: one whose reward breaks on one of them, gone on with, and one that is left alone."""

    place = tmp_path_factory.mktemp("failing")

    def config(shard, name):
        values = {
            "steps": 4,
            "output": str(place / f"{shard} {name}"),
            "pipeline": {"type": "sd3", "model": str(model), "num_steps": 4, "max_sequence_length": 16, "lora": {"rank": 4, "alpha": 8}},
            "rewards": REWARDS,
            "algorithm": {"type": "awm", "levels": "uniform", "num_levels": 2, "num_minibatches": 1},
            "train": {**TRAIN, "shard": shard},
        }
        path = place / f"{shard} {name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    said = {}
    for shard in (False, True):
        said[shard] = launch(2, "flowalign", "train", str(config(shard, "broken")), fails=True, **{BROKEN: "raises 3 1"})
    found = {shard: [path.name for path in (place / f"{shard} broken" / "checkpoints").glob("step_*")] for shard in said}
    together("tests.train.several", *(str(config(shard, name)) for shard in (False, True) for name in ("broken", "whole")))
    return {shard: (said[shard], found[shard], place / f"{shard} broken.yaml", place / f"{shard} whole.yaml") for shard in said}


@pytest.mark.parametrize("shard", [False, True])
def test_a_reward_that_breaks_on_one_rank_stops_all_with_their_state_saved(launched, shard):
    said, checkpoints, broken, whole = launched[shard]
    assert "mine broke" in said
    assert "another process failed" in said
    assert checkpoints == ["step_000002"]
    for one, two in zip(left(broken), left(whole), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in two)
