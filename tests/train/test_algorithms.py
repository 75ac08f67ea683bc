"""Every algorithm through the whole loop: it trains, and evaluates the network as often as its plan and levels say."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from flowalign.core.algorithm import Update
from flowalign.plugins import available
from flowalign.run import build_trainer
from flowalign.run_config import load_config
from flowalign.train.journal import read_log
from tests.pipelines import families
from tests.train.launch import on_one_and_two_processes

SMALL = {"groups": 2, "group_size": 2, "micro_batch_size": 8, "learning_rate": 1e-2}
# Options, and the evaluations of the network for an initial noise at 4 steps: rollout, training with gradient, and for each other role.
ALGORITHMS = {
    "ac_flow": ({"num_levels": 2, "critic_updates": 3, "least_steps": 0}, 4, 2, {"reference": 2}),
    "awm": ({"num_levels": 2, "levels": "uniform", "reference_penalty": 0.1}, 4, 2, {"reference": 2, "ema": 2}),
    "ddpo": ({}, 4, 3, {}),
    "dgpo": ({"num_levels": 2, "level_fraction": 0.8}, 4, 2, {"reference": 2}),
    "diffusion_nft": ({}, 4, 3, {"old": 3, "reference": 3}),
    "flow_dppo": ({"num_epochs": 2}, 4, 6, {}),
    "flow_grpo": ({}, 4, 3, {"reference": 3}),
    "flow_grpo_fast": ({"window": 2, "num_children": 3, "limit": 2}, 1 + 3 * 3, 1 + 3, {}),
    "grpo_guard": ({"kl_penalty": 0.01}, 4, 3, {"reference": 3}),
    "mix_grpo": ({"window": 2, "strategy": "fixed"}, 4, 2, {}),
    "tempflow_grpo": ({"num_children": 2}, 3 + 2 * 6, 3, {"reference": 3}),
}


def build(write_config, **changes):
    return build_trainer(load_config(str(write_config(**{"train": SMALL, "advantage": "grpo", **changes}))), Accelerator())


def test_all_algorithms_are_here():
    distillations = {"dmd2", "f_distill"}  # tests/train/test_distillation.py
    assert set(ALGORITHMS) | distillations == set(available("algorithms"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_trains_and_evaluates_what_it_must(write_config, name):
    options, rollout, trained, others = ALGORITHMS[name]
    built = build(write_config, algorithm={"type": name, **options})
    before = [parameter.detach().clone() for parameter in built.cast.parameters]
    line = built.step(0)
    expected = {"rollout": rollout, "train": trained, **others}
    assert {key: value for key, value in line["evaluations"].items() if key not in ("total", "rows_per_evaluation")} == {
        key: 4 * value for key, value in expected.items()
    }
    assert line["evaluations"]["total"] == 4 * sum(expected.values())
    assert math.isfinite(line["metrics"]["loss"])
    assert line["grad_norm"] > 0
    assert any(not torch.equal(old, new) for old, new in zip(before, built.cast.parameters, strict=True))
    if "ratio_gap_first" in line["metrics"]:
        assert line["metrics"]["ratio_gap_first"] < 1e-6


def test_micro_batches_change_nothing_where_children_share_an_evaluation(write_config):
    found = []
    for size in (1, 64):
        built = build(write_config, algorithm={"type": "tempflow_grpo", "num_children": 2}, train={**SMALL, "micro_batch_size": size})
        collected = built.collect(0)
        rows = built.algorithm.rows(collected.experience, Update(seed=0, step=0, index=0))
        built.updater._backward("current", rows.split(size), collected.velocity, collected.experience.keep)
        found.append(torch.cat([parameter.grad.flatten() for parameter in built.cast.parameters]))
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[1].abs().max()


def test_what_compares_whole_groups_refuses_several_processes(write_config, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(ValueError, match="compares whole groups, but 2 processes share each"):
        build(write_config, algorithm={"type": "dgpo", "num_levels": 2, "level_fraction": 0.8})


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"type": "diffusion_nft", "num_levels": 5}, "num_levels: got 5, needed 1 to 4, the steps of the rollout"),
        ({"type": "ac_flow", "num_levels": 5, "critic": {"width": 16}}, "num_levels: got 5, needed 1 to 4"),
        ({"type": "dgpo", "num_levels": 4, "level_fraction": 0.5}, "4 levels do not fit into the 2 first steps"),
        ({"type": "awm", "levels": "discrete", "num_levels": 4}, "num_levels: 4 levels do not fit into 2 usable steps"),
        ({"type": "flow_grpo", "num_trained": 4}, "num_trained: got 4, needed at most 3 of 4 steps"),
    ],
)
def test_what_an_algorithm_cannot_do_is_refused_before_the_first_rollout(write_config, algorithm, message):
    with pytest.raises(ValueError, match=message):
        build(write_config, algorithm=algorithm)


def test_nft_samples_with_the_old_policy(write_config, monkeypatch):
    built = build(write_config, algorithm={"type": "diffusion_nft"})
    seen = []
    honest = built.pipeline.rollout
    monkeypatch.setattr(built.pipeline, "rollout", lambda *a, **k: seen.append(k["role"]) or honest(*a, **k))
    built.collect(0)
    assert seen == ["old"]


AC_FLOW = {"type": "ac_flow", "num_levels": 2, "critic": {"width": 16, "learning_rate": 1e-2}}


def weights(built):
    return torch.cat([parameter.detach().flatten() for parameter in built.cast.parameters])


def heads(built):
    return torch.cat([parameter.detach().flatten() for parameter in built.cast.heads["critic"].parameters])


def test_the_policy_stands_still_while_its_critic_warms_up_and_the_run_says_if_it_never_moved(write_config, tmp_path):
    (tmp_path / "run").mkdir()
    built = build(
        write_config, algorithm={**AC_FLOW, "least_explained": 0.999, "least_steps": 2, "patience": 3}, output=str(tmp_path / "run")
    )
    before, critic = weights(built), heads(built)
    line = built.step(0)
    assert torch.equal(weights(built), before)
    assert not torch.equal(heads(built), critic)
    assert (built.gate.is_open, built.gate.held_back, len(built.gate.evidence["critic"])) == (False, 1, 1)
    assert line["metrics"]["critic/error"] == pytest.approx(line["metrics"]["critic/square"])  # it says 0 before it learns
    assert "loss" not in line["metrics"]
    assert (line["metrics"]["held_back"], line["grad_norm"]) == (1, 0)
    fresh = build(
        write_config, algorithm={**AC_FLOW, "least_explained": 0.999, "least_steps": 2, "patience": 3}, output=str(tmp_path / "run")
    )
    with pytest.raises(ValueError, match="the policy never moved in 2 steps: critic had not shown"):
        fresh.fit(2)
    again = build(
        write_config, algorithm={**AC_FLOW, "least_explained": 0.999, "least_steps": 2, "patience": 3}, output=str(tmp_path / "run")
    )
    with pytest.raises(ValueError, match="in 3 steps the critic has not shown that it explains more than 0.999"):
        again.fit(5)  # the steps before it was stopped count


def test_the_policy_begins_with_the_evidence_and_goes_on_without(write_config, monkeypatch):
    built = build(write_config, algorithm={**AC_FLOW, "least_steps": 2})
    before = weights(built)
    verdicts = iter([False, True])
    asked = []
    monkeypatch.setattr(
        type(built.algorithm), "is_ready", lambda self, seen, held_back: asked.append((len(seen["critic"]), held_back)) or next(verdicts)
    )
    built.step(0)
    assert torch.equal(weights(built), before)
    line = built.step(1)
    assert not torch.equal(weights(built), before)
    assert math.isfinite(line["metrics"]["loss"])
    built.step(2)
    assert asked == [(0, 0), (1, 1)]


def test_filtered_samples_are_no_evidence(write_config):
    built = build(write_config, algorithm={**AC_FLOW, "least_steps": 2})
    collected = built.collect(0)
    nobody = replace(collected.experience, keep=torch.zeros_like(collected.experience.keep))
    assert built.updater.update(nobody, collected.velocity, Update(seed=0, step=0, index=0), ready=built.gate.is_open) == {}
    assert len(built.gate.evidence["critic"]) == 0
    assert not built.gate.is_open


def test_a_run_with_a_critic_resumes_to_the_same_bits(write_config, tmp_path):
    for name in ("whole", "half"):
        (tmp_path / name).mkdir()
    made = {"algorithm": {**AC_FLOW, "least_steps": 2, "least_explained": -9.0}}
    whole = build(write_config, output=str(tmp_path / "whole"), **made)
    whole.fit(4)
    half = build(write_config, output=str(tmp_path / "half"), **made)
    with pytest.raises(ValueError, match="never moved"):
        half.fit(1)
    again = build(write_config, output=str(tmp_path / "half"), **made)
    again.fit(4)
    assert torch.equal(weights(again), weights(whole))
    assert torch.equal(heads(again), heads(whole))
    assert (again.gate.is_open, again.gate.held_back, again.gate.evidence) == (True, 2, whole.gate.evidence)


def test_micro_batches_change_nothing_for_a_critic(write_config):
    found = []
    for size in (1, 64):
        built = build(write_config, algorithm={**AC_FLOW, "least_steps": 0}, train={**SMALL, "micro_batch_size": size})
        built.step(0)
        found.append((weights(built), heads(built)))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() < 1e-4


def test_a_critic_beside_full_training_reads_the_base(write_config, model):
    pipeline = {"type": "sd3", "model": str(model), "num_steps": 4, "max_sequence_length": 16, "lora": None}
    built = build(write_config, algorithm={**AC_FLOW, "least_steps": 0}, pipeline=pipeline)
    cond = built.pipeline.encode(["a photo of a red ring"])
    x = torch.randn(1, *built.pipeline.event_shape, generator=torch.Generator().manual_seed(0))
    before = built.pipeline.look(x, torch.tensor(0.5), cond)
    line = built.step(0)
    assert line["grad_norm"] > 0
    after = built.pipeline.look(x, torch.tensor(0.5), cond)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_a_critic_learns_from_features_of_image_level_and_prompt(write_config):
    built = build(write_config, algorithm={**AC_FLOW, "least_steps": 0})
    pipeline = built.pipeline

    def features(*args):
        velocity, found = pipeline.look(*args)
        assert torch.equal(velocity, pipeline.velocity(args[0], args[1], args[2], "reference"))
        return found

    cond = pipeline.encode(["a photo of a red ring", "a photo of two blue squares"])
    x = torch.randn(1, *pipeline.event_shape, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    both = features(x, torch.tensor(0.5), cond)
    assert both.shape == (2, built.cast.heads["critic"].bare[0].normalized_shape[0])
    assert not torch.equal(both[0], both[1])  # the prompt
    assert not torch.allclose(both, features(x, torch.tensor(0.4), cond))
    assert not torch.allclose(both, features(x + 0.1, torch.tensor(0.5), cond))
    alone = features(x[:1], torch.tensor(0.5), cond.take(torch.tensor([1])))
    assert torch.allclose(alone[0], both[1], atol=1e-4)
    for parameter in built.cast.parameters:
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(features(x, torch.tensor(0.5), cond), both)  # of the base, whatever was trained


def test_two_processes_train_a_critic_and_a_policy_like_one(write_config):
    algorithm = {**AC_FLOW, "least_steps": 2, "least_explained": -9.0}
    folders = on_one_and_two_processes(write_config, steps=3, train=SMALL, advantage="grpo", algorithm=algorithm)
    logs = [read_log(folder / "log.jsonl") for folder in folders]
    for one, two in zip(*logs, strict=True):
        assert one["evaluations"] == two["evaluations"]
        assert one["metrics"].keys() == two["metrics"].keys()
        for key in ("critic/error", "critic/target", "critic/square", "critic/grad_norm", "held_back"):
            assert two["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-2, abs=1e-4), key
    assert ["loss" in line["metrics"] for line in logs[1]] == [False, False, True]
    assert logs[1][2]["metrics"]["loss"] == pytest.approx(logs[0][2]["metrics"]["loss"], abs=1e-3)
    assert logs[1][2]["grad_norm"] == pytest.approx(logs[0][2]["grad_norm"], rel=2e-2)


@pytest.mark.filterwarnings("ignore")
def test_ddpo_trains_a_variance_preserving_pipeline(write_config):
    config = load_config(
        str(write_config(train=SMALL, advantage="grpo", algorithm={"type": "ddpo"}, rewards=[{"reward": "tests.train.brightness"}]))
    )
    flow = families.build("sd 1.5 guided")
    built = build_trainer(config, Accelerator(), pipeline=flow)
    before = weights(built)
    line = built.step(0)
    # All steps but the last, whose noise is 0; two calls of the denoiser for each evaluation.
    assert line["evaluations"] == {"rollout": 4 * 5, "train": 4 * 4, "total": 36, "rows_per_evaluation": 2}
    assert line["metrics"]["ratio_gap_first"] < 1e-6
    assert line["grad_norm"] > 0
    assert not torch.equal(weights(built), before)
