"""Training beside a float16 network: scaled losses give the gradients that float32 gives, and what overflows moves nothing.

A CPU is refused float16 by the configuration; here the pipelines are put into it by hand.
"""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from flowalign import run
from flowalign.algorithms import f_distill
from flowalign.core.algorithm import Update
from flowalign.pipelines.base import FlowPipeline
from flowalign.run_config import load_config
from flowalign.train.loss_scale import GROWTH_INTERVAL, LossScale, scale_for

HALF = torch.float16


def trainer(path, dtype):
    config = load_config(str(path))
    pipe = config.pipeline.load().to(dtype)
    flow = FlowPipeline(pipe, config.pipeline.family(pipe), config.pipeline.lora, num_steps=config.pipeline.num_steps)
    return run.build_trainer(config, Accelerator(cpu=True), pipeline=flow)


def weights(built):
    return torch.cat([value.detach().flatten().clone() for value in built.pipeline.roles.trainable_parameters()])


def gradient(built, experience, factor=1.0, scale=None):
    """The gradient of a step's first update on given samples, of a loss that is multiplied by a factor."""
    velocity, honest = built.collect(0).velocity, built.algorithm.loss
    object.__setattr__(built.algorithm, "loss", lambda *args: replace(told := honest(*args), value=told.value * factor))
    if scale is not None:
        built.cast.scale.value = scale
    rows = built.algorithm.rows(experience, Update(seed=0, step=0, index=0))
    built.updater._backward("current", rows.split(built.config.micro_batch_size), velocity, experience.keep)
    if built.cast.scale is not None:
        built.cast.scale.unscale(built.cast.parameters)
    return torch.cat([parameter.grad.flatten() for parameter in built.cast.parameters]) / factor


def test_the_factor_halves_where_gradients_overflow_and_doubles_after_many_that_did_not():
    scale = LossScale(value=4.0)
    assert scale.overflows(loss=1.0, norm=math.inf)
    assert scale.overflows(loss=1.0, norm=math.nan)
    assert scale.state_dict() == {"value": 1.0, "kept": 0}
    # No factor is to blame: whoever asks must raise.
    assert not scale.overflows(loss=1.0, norm=math.inf)
    assert not LossScale(value=4.0).overflows(loss=math.nan, norm=math.nan)
    for _ in range(GROWTH_INTERVAL - 1):
        assert not scale.overflows(loss=1.0, norm=1.0)
    assert scale.value == 1.0
    assert not scale.overflows(loss=1.0, norm=1.0)
    assert scale.state_dict() == {"value": 2.0, "kept": 0}
    again = LossScale()
    again.load_state_dict({"value": 8.0, "kept": 3})
    assert again == LossScale(value=8.0, kept=3)


def test_only_float16_is_scaled_and_only_where_one_network_is_trained():
    assert scale_for(torch.float32, f_distill.Config().build()) is None
    with pytest.raises(ValueError, match="pipeline.dtype: got float16, but this algorithm trains several networks"):
        scale_for(HALF, f_distill.Config().build())


def test_small_gradients_survive_float16_by_the_scale_and_vanish_without(write_config):
    path = write_config()
    full = trainer(path, torch.float32)
    assert full.cast.scale is None
    experience = full.collect(0).experience
    expected = gradient(full, experience)

    def error(scale):
        built = trainer(path, HALF)
        assert {parameter.dtype for parameter in built.cast.parameters} == {torch.float32}
        return float((gradient(built, experience, 1e-3, scale) - expected).norm() / expected.norm())

    assert error(2.0**16) < 0.05
    assert error(1.0) > 0.2


def test_an_update_that_overflows_moves_nothing_and_the_next_tries_half(write_config):
    built = trainer(write_config(), HALF)
    built.cast.scale.value = 2.0**60
    before, line = weights(built), built.step(0)
    assert torch.equal(weights(built), before)
    assert built.cast.scale.value == 2.0 ** (60 - built.algorithm.num_updates)
    assert "loss" not in line["metrics"]
    built.cast.scale.value = 2.0**10
    line = built.step(1)
    assert not torch.equal(weights(built), before)
    assert line["metrics"]["loss_scale"] == 2.0**10
    other = trainer(write_config("other"), HALF)
    other.load_state_dict(built.state_dict())
    assert other.cast.scale == built.cast.scale


def test_gradients_that_are_not_finite_at_a_factor_of_one_are_the_runs_own(write_config):
    built = trainer(write_config(), HALF)
    built.cast.scale.value = 1.0
    honest = built.algorithm.loss
    object.__setattr__(built.algorithm, "loss", lambda *args: replace(told := honest(*args), value=told.value * 1e30))
    before = weights(built)
    with pytest.raises(FloatingPointError, match="player 'current': the gradient norm is"):
        built.step(0)
    assert torch.equal(weights(built), before)
