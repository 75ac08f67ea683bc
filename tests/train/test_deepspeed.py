"""DeepSpeed's ZeRO-2 on two CPU processes: the same numbers as one process without it, and checkpoints that go both ways."""

import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flowalign import run
from tests.train.launch import launch
from tests.train.test_sharding import AWM, STEPS, assert_same_numbers, begin_with

pytest.importorskip("deepspeed")

MODES = ("adapters", "weights")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model):
    """Of each mode four runs of two steps: on one process, on two under DeepSpeed, and each with its second step the other way."""
    place = tmp_path_factory.mktemp("runs")

    def config(mode, name):
        lora = None if mode == "weights" else {"rank": 4, "alpha": 8}
        values = {
            "steps": STEPS,
            "output": str(place / mode / name),
            "pipeline": {"type": "sd3", "model": str(model), "num_steps": 4, "max_sequence_length": 16, "lora": lora},
            "rewards": [{"reward": "tests.train.brightness"}],
            "algorithm": AWM,
            "train": {
                "groups": 2,
                "group_size": 4,
                "micro_batch_size": 4,
                "learning_rate": 1e-4 if lora is None else 1e-3,
                "ema_decay": 0.5,
                "sample_every": 2,
            },
        }
        path = place / f"{mode} {name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    for mode in MODES:
        run.train(str(config(mode, "one")))
        begin_with(place / mode / "one", place / mode / "one then two")
    asked = [str(config(mode, name)) for mode in MODES for name in ("two", "one then two")]
    (place / "said.txt").write_text(launch(2, "tests.train.zero", *asked, ACCELERATE_USE_CPU="false"))
    for mode in MODES:
        begin_with(place / mode / "two", place / mode / "two then one")
        run.train(str(config(mode, "two then one")))
    return place


@pytest.mark.parametrize("other", ["two", "one then two", "two then one"])
@pytest.mark.parametrize("mode", MODES)
def test_losses_and_weights_are_those_of_one_process(runs, mode, other):
    assert_same_numbers(runs / mode / "one", runs / mode / other)


def test_each_process_holds_a_half_of_gradients_and_moments(runs):
    found = re.findall(r"HELD (\d+) OF (\d+) BY", (runs / "said.txt").read_text())
    assert len(found) == 2 * 2 * len(MODES)  # processes, runs
    for held, number in found:
        assert int(held) / int(number) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_holds_what_one_process_writes(runs, mode):
    state, other = (load_file(runs / mode / name / "checkpoints" / "step_000001" / "state.safetensors") for name in ("one", "two"))
    assert {name: value.shape for name, value in other.items()} == {name: value.shape for name, value in state.items()}
    moments = [name for name in state if name.endswith(("exp_avg", "exp_avg_sq"))]
    assert moments
    for name in moments:
        assert torch.allclose(other[name], state[name], rtol=1e-3, atol=1e-7)


def test_a_loss_that_is_not_finite_moves_nothing(runs, tmp_path):
    source = yaml.safe_load((runs / "adapters one.yaml").read_text())
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(source | {"output": str(tmp_path / "broken"), "steps": 3}))
    shutil.copytree(runs / "adapters" / "two", tmp_path / "broken")
    said = launch(2, "tests.train.zero", str(path), ACCELERATE_USE_CPU="false", BREAK_LOSS="1")
    assert "player 'current': the loss is nan" in said
    assert said.count("MOVED False") == 2
