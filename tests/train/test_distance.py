"""The distance to the base where no penalty measures it."""

import pytest
import torch
from accelerate import Accelerator

from flowalign import run
from flowalign.core.paths import interpolate
from flowalign.core.randomness import normal
from flowalign.run_config import load_config
from flowalign.train.distance import distance_to_base
from flowalign.train.journal import read_log, status

PLAIN = {"type": "flow_grpo", "kl_penalty": 0.0, "num_minibatches": 1}


def test_it_is_the_mean_squared_difference_of_velocities_and_0_before_anything_moved(write_config):
    trainer = run.build_trainer(load_config(str(write_config(algorithm=PLAIN))), Accelerator())
    found = trainer.collect(0)
    before = dict(trainer.collector.evaluations)
    assert float(distance_to_base(found.velocity, found.experience, seed=0, step=0)) == 0
    with torch.no_grad():
        for parameter in trainer.cast.parameters:
            parameter.add_(0.1)
    moved = float(distance_to_base(found.velocity, found.experience, seed=0, step=0))
    assert trainer.collector.evaluations["monitor"] == 32
    assert {**trainer.collector.evaluations, "monitor": 0} == {**before, "monitor": 0}
    x0, total = found.experience.trajectory.x0, 0.0
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # of each prompt the first image, then the second
    for place, row in enumerate(order):
        keys = {"prompts": found.experience.prompt[[row]], "samples": found.experience.sample[[row]]}
        noise = normal(x0.shape[1:], seed=0, purpose="distance to the base", step=0, **keys)
        sigma = torch.tensor([(0.3, 0.6, 0.9)[place % 3]])
        x, cond = interpolate(x0[[row]], noise, sigma), found.velocity.cond.take(torch.tensor([row]))
        with torch.no_grad():
            mine, base = (trainer.pipeline.velocity(x, sigma, cond, role) for role in ("current", "reference"))
        total += float((mine - base).square().mean())
    assert moved == pytest.approx(total / 8, rel=1e-4)
    assert moved > 0


def test_a_run_without_a_penalty_logs_it_once_in_a_few_steps_and_one_with_a_penalty_does_not(write_config):
    train = {"groups": 2, "group_size": 4, "micro_batch_size": 8, "learning_rate": 1e-2}
    plain, penalised = write_config("plain", algorithm=PLAIN, train=train, steps=6), write_config("penalised", steps=1)
    run.train(str(plain))
    run.train(str(penalised))
    lines = read_log(load_config(str(plain)).output / "log.jsonl")
    assert ["distance" in line["monitor"] for line in lines] == [True, False, False, False, False, True]
    assert [line["evaluations"].get("monitor", 0) for line in lines] == [16, 0, 0, 0, 0, 16]
    assert lines[5]["monitor"]["distance"] > lines[0]["monitor"]["distance"] > 0
    assert f"distance {lines[5]['monitor']['distance']:.4f}" in status(lines[5])
    (line,) = read_log(load_config(str(penalised)).output / "log.jsonl")
    assert "distance" not in line["monitor"]
    assert line["flops_per_row"] > 0
    assert line["metrics"]["distance/reference"] >= 0
