"""Processes that share weights (FSDP2) or have them all (DDP): the same numbers as one process, and checkpoints that go both ways."""

import re
import shutil
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from flowalign import run
from flowalign.core.algorithm import HasHeads
from flowalign.pipelines.bare import bare, hollow
from flowalign.run_config import load_config
from flowalign.train import engines
from flowalign.train.journal import read_log
from tests.pipelines import families
from tests.train.launch import launch

MODES = ("shared adapters", "shared adapters of bfloat16", "shared weights", "adapters")
AWM = {"type": "awm", "levels": "uniform", "num_levels": 2, "num_minibatches": 1, "reference_penalty": 0.1}
STEPS = 2


def weights_of(folder):
    file = folder / "weights" / "pytorch_lora_weights.safetensors"
    return load_file(file) if file.is_file() else load_file(folder / "weights" / "transformer" / "diffusion_pytorch_model.safetensors")


def begin_with(source, target):
    """Make a folder that holds a run's first step only."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / f"step_{STEPS:06d}")
    shutil.rmtree(target / "weights")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model):
    """Of each mode four runs of two steps: on one process, on two, and each with its second step on the other number of processes."""
    place = tmp_path_factory.mktemp("runs")

    def config(mode, name):
        shared, lora = mode.startswith("shared"), None if mode.endswith("weights") else {"rank": 4, "alpha": 8}
        dtype = "bfloat16" if mode.endswith("bfloat16") else "float32"  # the adapters are float32 in either
        values = {
            "steps": STEPS,
            "output": str(place / mode / name),
            "pipeline": {"type": "sd3", "model": str(model), "num_steps": 4, "max_sequence_length": 16, "lora": lora, "dtype": dtype},
            "rewards": [{"reward": "tests.train.brightness"}],
            "algorithm": AWM,
            "train": {
                "groups": 2,
                "group_size": 4,
                "micro_batch_size": 4,
                # Products of bfloat16 may depend on how many rows they have: the same for one process as for each of two.
                "rollout_batch_size": 4 if dtype == "bfloat16" else 64,
                "learning_rate": 1e-4 if lora is None else 1e-3,
                "shard": shared,
                "ema_decay": 0.5,
                "sample_every": 2,
                "keep_best_by": "brightness",
            },
        }
        path = place / f"{mode} {name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    for mode in MODES:
        run.train(str(config(mode, "one")))
        begin_with(place / mode / "one", place / mode / "one then two")
    asked = [str(config(mode, name)) for mode in MODES for name in ("two", "one then two")]
    (place / "said.txt").write_text(launch(2, "tests.train.several", *asked))
    for mode in MODES:
        begin_with(place / mode / "two", place / mode / "two then one")
        run.train(str(config(mode, "two then one")))
    return place


def assert_same_numbers(one, two):
    """Compare the runs of two folders: of the same numbers, as far as sums in another order allow."""
    logs = read_log(one / "log.jsonl"), read_log(two / "log.jsonl")
    for first, second in zip(*logs, strict=True):
        assert second["step"] == first["step"]
        assert second["images"] == first["images"] == 8
        assert second["evaluations"] == first["evaluations"]
        assert second["reward"] == pytest.approx(first["reward"], abs=1e-4)
        assert second["metrics"]["loss"] == pytest.approx(first["metrics"]["loss"], abs=1e-4)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-2)
    assert len(logs[0]) == STEPS
    assert logs[1][0]["grad_norm"] == pytest.approx(logs[0][0]["grad_norm"], rel=1e-4)
    expected, made = weights_of(one), weights_of(two)
    assert made.keys() == expected.keys()
    apart = torch.cat([(made[name] - expected[name]).abs().flatten() for name in expected])
    # Adam turns rounding of gradients near 0 into steps of the rate, 1e-3 or 1e-4; measured: 1e-7 to 4e-7 at most, up to 1e-9 on average.
    assert apart.max() < 1e-5
    assert apart.mean() < 1e-7


@pytest.mark.parametrize("other", ["two", "one then two", "two then one"])
@pytest.mark.parametrize("mode", MODES)
def test_losses_and_weights_are_those_of_one_process(runs, mode, other):
    assert_same_numbers(runs / mode / "one", runs / mode / other)


def test_each_process_holds_a_part_of_what_is_shared_and_all_of_what_is_not(runs):
    found = re.findall(r"HELD (\d+) OF (\d+) BY (.*)\.yaml", (runs / "said.txt").read_text())
    assert len(found) == 2 * 2 * len(MODES)  # processes, runs
    for held, number, path in found:
        share = int(held) / int(number)
        assert share == pytest.approx(0.5, abs=0.1) if "shared" in path else share == 1


def files(folder):
    """Name what a run wrote; but not which single images were best, for those are the first process's own, a part of all."""
    everything = [path.relative_to(folder) for path in folder.rglob("*")]
    return {str(path) for path in everything if path.parent.name != "scored" or path.suffix == ".jsonl"}


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_write_what_one_writes(runs, mode):
    one, two = (files(runs / mode / name) for name in ("one", "two"))
    assert two == one
    assert "samples/step_000002.png" in two
    state, other = (load_file(runs / mode / name / "checkpoints" / "step_000001" / "state.safetensors") for name in ("one", "two"))
    assert {name: value.shape for name, value in other.items()} == {name: value.shape for name, value in state.items()}


def test_shared_weights_are_a_pipeline_that_loads_anywhere(runs):
    bare = StableDiffusion3Pipeline.from_pretrained(runs / "shared weights" / "two" / "weights")
    stored = load_file(runs / "shared weights" / "two" / "weights" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in bare.transformer.state_dict().items() if name in stored)


@pytest.mark.parametrize("case", ["qwen_image", "sd3"])
def test_a_network_without_memory_is_whole_once_its_weights_are_assigned(case):
    """Tables of positions, which no file holds, are computed."""
    flow = families.build(case, lora=None)
    network, state = flow.denoiser, {name: value.clone() for name, value in flow.denoiser.state_dict().items()}
    assert {value.device.type for value in hollow(type(network), network.config).parameters()} == {"meta"}
    fresh = bare(type(network), network.config, state)
    assert {value.data_ptr() for value in fresh.parameters()} <= {value.data_ptr() for value in state.values()}
    x, cond = torch.randn(1, *flow.event_shape, generator=torch.Generator().manual_seed(0)), flow.encode(["a"])
    with torch.no_grad():
        assert torch.equal(flow.replayed(fresh.eval(), x, torch.tensor(0.5), cond), flow.velocity(x, torch.tensor(0.5), cond))


class Several(HasHeads):
    """An algorithm with a critic, as far as an engine asks."""

    heads: ClassVar = {}


@pytest.mark.parametrize(
    ("kind", "shard", "algorithm", "message"),
    [
        (DistributedType.FSDP, False, object(), "its own FSDP is switched on; .* --train.shard true"),
        (DistributedType.DEEPSPEED, False, Several(), "DeepSpeed trains one network, but this algorithm trains several .*ddp.yaml"),
        (DistributedType.MULTI_GPU, True, Several(), "train.shard: got true, but this algorithm trains several networks"),
        (DistributedType.DEEPSPEED, True, object(), "train.shard: got true, but DeepSpeed shares gradients and moments itself"),
    ],
)
def test_engines_refuse_what_they_cannot_train(kind, shard, algorithm, message):
    with pytest.raises(ValueError, match=message):
        engines.check(SimpleNamespace(distributed_type=kind), algorithm, shard=shard)


def test_deepspeed_trains_one_network_but_not_in_float16():
    engine = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    engines.check(engine, object(), shard=False, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="got float16, but DeepSpeed would scale losses itself"):
        engines.check(engine, object(), shard=False, dtype=torch.float16)


def test_ddp_and_shared_weights_train_one_network_and_ddp_several():
    for kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        for shard in (False, True):
            engines.check(SimpleNamespace(distributed_type=kind), object(), shard=shard)
    engines.check(SimpleNamespace(distributed_type=DistributedType.MULTI_GPU), Several(), shard=False)
    assert not load_config("shapes_awm").train.shard
