"""Utilisation: operations are those of the real network's products, shares are of the peak, and running out of memory is said with advice."""

import math

import pytest
import torch
from accelerate import Accelerator

from flowalign import run
from flowalign.config import ConfigError
from flowalign.core.flops import flops_of
from flowalign.pipelines.roles import LoRA
from flowalign.run_config import claim_folder, load_config
from flowalign.train import flops, overlap
from flowalign.train.flops import Utilisation, measure, measured_peak, peak_of
from flowalign.train.journal import Clock, read_log, status
from flowalign.train.memory import Exhausted
from tests.pipelines import families


def test_the_backward_of_adapters_needs_no_gradient_of_frozen_weights_and_that_of_all_weights_does():
    adapters = measure(families.build("sd3"), Accelerator(), None)
    whole = measure(families.build("sd3", lora=None), Accelerator(), None)
    assert adapters.forward == pytest.approx(whole.forward, rel=0.2)  # the adapters' own products
    assert 0.8 < adapters.backward / adapters.forward < 1.5
    assert (
        1.8 < whole.backward / whole.forward < 2.25
    )  # two products for each, five for the two of attention, which computes its scores again
    guided = measure(families.build("sd3 guided"), Accelerator(), None)
    assert guided.forward == 2 * adapters.forward


def test_counting_leaves_gradients_and_hooks_as_they_were():
    flow, calls = families.build("sd3", lora=LoRA(rank=2, alpha=2)), []
    flow.encode(["a"])
    flow.denoiser.register_forward_hook(lambda *args: calls.append(1))
    first, *others = flow.roles.trainable_parameters()
    first.grad = torch.full_like(first, 3.0)
    measure(flow, Accelerator(), None)
    assert calls == []
    assert torch.equal(first.grad, torch.full_like(first, 3.0))
    assert all(parameter.grad is None for parameter in others)


def test_what_checkpointing_computes_again_is_not_counted():
    plain, spare = families.build("flux dev"), families.build("flux dev")
    spare.denoiser.enable_gradient_checkpointing()
    one, two = (measure(flow, Accelerator(), None) for flow in (plain, spare))
    assert two.forward == one.forward
    assert 0.7 * one.backward < two.backward <= one.backward


def test_compiled_blocks_are_counted_too():
    layer, x = torch.nn.Linear(8, 16, bias=False), torch.ones(4, 8)
    layer.compile(backend="eager")
    assert flops_of(lambda: layer(x)) == 2 * 4 * 8 * 16


def test_shares_are_operations_over_time_devices_and_peak():
    cost = Utilisation(forward=1e12, backward=2e12, peak=100e12)
    evaluations = {"rollout": 80, "train": 30, "reference": 20, "completion": 10, "total": 140, "rows_per_evaluation": 2}
    told = cost.of(evaluations, {"rollout": 2.0, "train": 4.0, "reward": 1.0, "total": 10.0}, num_devices=2)
    assert told["tflops"] == pytest.approx({"rollout": 20.0, "train": 110 / 8, "total": 200 / 20})
    assert told["utilisation"] == pytest.approx({"rollout": 0.2, "train": 0.1375, "total": 0.1})
    unknown = Utilisation(forward=1e12, backward=2e12, peak=None).of(
        {"train": 1, "total": 1, "rows_per_evaluation": 2}, {"train": 1.0, "total": 2.0}, num_devices=1
    )
    assert unknown == {"flops_per_row": 5e11, "tflops": {"train": 3.0, "total": 1.5}}


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H100 NVL", torch.float16, 835e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("Tesla T4", torch.float16, 65e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2e12),
        ("NVIDIA GeForce GTX 1080", torch.float16, None),
    ],
)
def test_peaks_are_found_by_name(name, dtype, peak):
    assert peak_of(name, dtype) == peak


def test_a_measured_peak_is_that_of_products(monkeypatch):
    monkeypatch.setattr(flops, "SIZE", 512)
    monkeypatch.setattr(flops, "SECONDS", 0.02)
    peak = measured_peak(torch.device("cpu"), torch.float32)
    assert 1e7 < peak < 1e14


def test_every_step_logs_what_it_did_in_a_second_and_its_share_of_a_given_peak(write_config):
    path = write_config(steps=2, algorithm={"type": "flow_grpo"})
    config = load_config(str(path), ["--train.peak_tflops", "0.001"])
    trainer = run.run_training(config)
    cost = measure(trainer.pipeline, trainer.accelerator, 0.001)
    for line in read_log(config.output / "log.jsonl"):
        evaluations, spent = line["evaluations"], line["time_s"]
        assert line["tflops"]["rollout"] == pytest.approx(evaluations["rollout"] * cost.forward / spent["rollout"] / 1e12)
        passes = evaluations["train"] * (cost.forward + cost.backward) + evaluations["reference"] * cost.forward
        assert line["tflops"]["train"] == pytest.approx(passes / spent["train"] / 1e12)
        assert line["tflops"]["total"] < max(line["tflops"]["rollout"], line["tflops"]["train"])
        assert line["utilisation"] == pytest.approx({name: value / 0.001 for name, value in line["tflops"].items()})
        assert f"{100 * line['utilisation']['total']:.0f}% of peak" in status(line)


def test_a_run_goes_on_with_another_peak_and_otherwise_shared_weights(write_config):
    path = str(write_config(steps=1))
    assert not claim_folder(load_config(path))
    assert claim_folder(load_config(path, ["--train.peak_tflops", "2.0", "--train.shard", "true"]))
    with pytest.raises(ConfigError, match=r"train.learning_rate"):
        claim_folder(load_config(path, ["--train.learning_rate", "0.5"]))


def test_a_cpu_has_no_share_unless_asked(write_config):
    config = load_config(str(write_config(steps=1)))
    run.run_training(config)
    (line,) = read_log(config.output / "log.jsonl")
    assert "utilisation" not in line
    assert line["tflops"]["total"] > 0
    assert "of peak" not in status(line)


@pytest.mark.parametrize("peak", ["-1.0", "0.0", ".inf"])
def test_a_peak_that_is_none_is_refused(write_config, peak):
    with pytest.raises(ValueError, match=r'peak_tflops: got .* needed a positive number, "measured" or null'):
        load_config(str(write_config()), ["--train.peak_tflops", peak])


@pytest.mark.parametrize(
    ("phase", "advice"),
    [("rollout", "lower train.rollout_batch_size"), ("train", "lower train.micro_batch_size"), ("reward", "batch_size")],
)
def test_out_of_memory_is_said_once_with_what_helps_there(write_config, monkeypatch, phase, advice):
    built = run.build_trainer(load_config(str(write_config())), Accelerator())
    built.folder.mkdir()

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore lines")

    place = {"rollout": (built.pipeline, "decode"), "train": (built.updater, "update"), "reward": (overlap.StepScores, "finish")}[phase]
    monkeypatch.setattr(*place, full)
    with pytest.raises(
        Exhausted, match=rf"step 0, {phase}: out of memory \(CUDA out of memory. Tried to allocate 20.00 GiB.\).*{advice}"
    ) as said:
        built.fit(1)
    assert str(said.value).count("bfloat16 help") == 1


def test_the_clock_waits_for_the_device_before_a_phase_ends():
    waits = []
    clock = Clock(wait=lambda: waits.append(clock.phases[:]))
    with clock.phase("rollout"):
        assert waits == []
    assert waits == [["rollout"]]
    assert clock.phases == []
    assert math.isfinite(clock.take()["rollout"])
