"""Every algorithm through the whole loop: it trains, and evaluates the network as often as its plan and levels say."""

import math

import pytest
import torch
from accelerate import Accelerator

from flowalign.core.algorithm import Update
from flowalign.plugins import available
from flowalign.run import build_trainer
from flowalign.run_config import load_config

SMALL = {"groups": 2, "group_size": 2, "micro_batch_size": 8, "learning_rate": 1e-2}
# Options, and the evaluations of the network for an initial noise at 4 steps: rollout, training with gradient, and for each other role.
ALGORITHMS = {
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
    assert set(ALGORITHMS) == set(available("algorithms"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_trains_and_evaluates_what_it_must(write_config, name):
    options, rollout, trained, others = ALGORITHMS[name]
    built = build(write_config, algorithm={"type": name, **options})
    before = [parameter.detach().clone() for parameter in built.parameters]
    line = built.step(0)
    expected = {"rollout": rollout, "train": trained, **others}
    assert {key: value for key, value in line["evaluations"].items() if key not in ("total", "rows_per_evaluation")} == {
        key: 4 * value for key, value in expected.items()
    }
    assert line["evaluations"]["total"] == 4 * sum(expected.values())
    assert math.isfinite(line["metrics"]["loss"])
    assert line["grad_norm"] > 0
    assert any(not torch.equal(old, new) for old, new in zip(before, built.parameters, strict=True))
    if "ratio_gap_first" in line["metrics"]:
        assert line["metrics"]["ratio_gap_first"] < 1e-6


def test_micro_batches_change_nothing_where_children_share_an_evaluation(write_config):
    found = []
    for size in (1, 64):
        built = build(write_config, algorithm={"type": "tempflow_grpo", "num_children": 2}, train={**SMALL, "micro_batch_size": size})
        collected = built.collect(0)
        rows = built.algorithm.rows(collected.experience, Update(seed=0, step=0, index=0))
        built._backward("current", rows, collected.velocity, collected.experience.keep)
        found.append(torch.cat([parameter.grad.flatten() for parameter in built.parameters]))
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[1].abs().max()


def test_what_compares_whole_groups_refuses_several_processes(write_config, monkeypatch):
    built = build(write_config, algorithm={"type": "dgpo", "num_levels": 2, "level_fraction": 0.8})
    collected = built.collect(0)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(ValueError, match="compares whole groups, but 2 processes share each"):
        built.update(collected.experience, collected.velocity, Update(seed=0, step=0, index=0))


def test_nft_samples_with_the_old_policy(write_config, monkeypatch):
    built = build(write_config, algorithm={"type": "diffusion_nft"})
    seen = []
    honest = built.pipeline.rollout
    monkeypatch.setattr(built.pipeline, "rollout", lambda *a, **k: seen.append(k["role"]) or honest(*a, **k))
    built.collect(0)
    assert seen == ["old"]
