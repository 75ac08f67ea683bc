"""Wrong input is named: where, what was got, what is needed."""

import inspect
import math

import pytest
import torch

from flowalign.core import decays, paths
from flowalign.core.kernels import CPS, DDIM, DanceSDE, Euler, FlowSDE, gaussian_kl, gaussian_log_prob
from flowalign.core.links import clipped_mask, linear, on_policy_ratio, ppo_clip
from flowalign.core.penalties import velocity_mse
from flowalign.core.randomness import key
from flowalign.core.schedules import flow_sigmas, flux_sigmas, linear_sigmas, shift_sigmas

KERNELS = [Euler(), FlowSDE(0.7), DanceSDE(0.3), DDIM(1.0), CPS(0.8)]
ROWS = torch.zeros(3, 2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("sigma", "sigma_next", "word"),
    [
        (1.5, 0.5, "1.5"),
        (0.5, -0.1, "sigma_next"),
        (0.5, 0.5, "smaller"),
        (0.4, 0.6, "smaller"),
        (math.nan, 0.1, "nan"),
        (500.0, 400.0, "timestep"),
    ],
)
def test_a_kernel_refuses_levels_that_do_not_step_towards_data(kernel, sigma, sigma_next, word):
    with pytest.raises(ValueError, match=word):
        kernel(ROWS, ROWS, sigma, sigma_next)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_wrong_level_among_many_is_enough(kernel):
    with pytest.raises(ValueError, match="smaller"):
        kernel(ROWS, ROWS, torch.tensor([0.9, 0.5, 0.3]), torch.tensor([0.8, 0.6, 0.1]))


def test_levels_for_another_number_of_rows_are_refused():
    with pytest.raises(ValueError, match="one value per row"):
        inspect.unwrap(paths.expand_like)(torch.tensor([0.5, 0.6]), ROWS)  # in tests beartype would object first


@pytest.mark.parametrize("make", [lambda n: FlowSDE(n), lambda n: DanceSDE(n), lambda n: DDIM(n), lambda n: CPS(n)])
@pytest.mark.parametrize("noise", [-0.1, math.nan, math.inf])
def test_noise_that_is_negative_or_not_finite_is_refused(make, noise):
    with pytest.raises(ValueError, match="at least 0"):
        make(noise)


@pytest.mark.parametrize("make", [lambda n: DDIM(n), lambda n: CPS(n)])
def test_kernels_that_keep_coefficients_cannot_add_more_noise_than_there_is(make):
    with pytest.raises(ValueError, match="at most 1"):
        make(1.1)


@pytest.mark.parametrize("call", [gaussian_log_prob, gaussian_kl])
@pytest.mark.parametrize("std", [0.0, -1.0, math.nan])
def test_a_std_that_is_not_positive_is_refused(call, std):
    with pytest.raises(ValueError, match="std"):
        call(ROWS, ROWS, std, reduction="sum")


@pytest.mark.parametrize("call", [gaussian_log_prob, gaussian_kl])
def test_a_state_that_is_not_finite_is_named_by_its_row(call):
    broken = ROWS.clone()
    broken[1, 0] = math.nan
    with pytest.raises(FloatingPointError, match="row 1 is nan"):
        call(broken, ROWS, 1.0, reduction="mean")


def test_conversions_that_divide_by_zero_are_refused():
    for convert in (paths.x0_to_velocity, paths.velocity_to_score):
        with pytest.raises(ValueError, match="above 0"):
            convert(ROWS, ROWS, 0.0)
    for convert in (paths.noise_to_velocity, paths.score_to_velocity):
        with pytest.raises(ValueError, match="less than 1"):
            convert(ROWS, ROWS, 1.0)
    with pytest.raises(ValueError, match="alpha"):
        paths.epsilon_to_velocity(ROWS, ROWS, 0.0, 1.0)
    with pytest.raises(ValueError, match="beta: got 0"):
        paths.epsilon_to_score(ROWS, 0.0)
    with pytest.raises(ValueError, match=r"alpha\*\*2"):
        paths.v_prediction_to_velocity(ROWS, ROWS, 0.5, 0.5)
    with pytest.raises(ValueError, match="alpha, beta"):
        paths.vp_sigma(-0.1, 1.0)


def test_schedules_refuse_counts_and_shifts_that_make_no_grid():
    for call in (linear_sigmas, flow_sigmas, lambda n: flux_sigmas(n, mu=0.5)):
        with pytest.raises(ValueError, match="num_steps"):
            call(0)
    with pytest.raises(ValueError, match="shift"):
        shift_sigmas(torch.ones(2), 0.0)
    with pytest.raises(ValueError, match="sigmas"):
        shift_sigmas(torch.tensor([1000.0]), 3.0)
    with pytest.raises(ValueError, match="mu"):
        flux_sigmas(4, mu=math.inf)


def test_links_refuse_to_broadcast_and_to_clip_at_nothing():
    # Broadcasting [3] against [1] would train every row on one advantage.
    score, advantage = torch.zeros(3), torch.ones(1)
    for link in (linear, on_policy_ratio):
        with pytest.raises(ValueError, match="one of each per row"):
            inspect.unwrap(link)(score, advantage)
    for link in (ppo_clip, clipped_mask):
        with pytest.raises(ValueError, match="clip"):
            link(score, score, clip=0.0)


def test_velocities_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="velocity_mse"):
        inspect.unwrap(velocity_mse)(torch.zeros(3, 1), torch.zeros(3, 2))


def test_decays_outside_the_unit_interval_are_refused():
    for call in (decays.constant, decays.ema_warmup, lambda d: decays.linear(0.1, d)):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            call(1.5)
    with pytest.raises(ValueError, match="rate"):
        decays.linear(-0.1, 0.5)


def test_a_name_part_that_is_no_int_or_word_is_refused():
    with pytest.raises(TypeError, match="needed int or str"):
        inspect.unwrap(key)("noise", 1.0)


def test_the_flat_then_linear_decay_is_the_published_one():
    found = [decays.linear(0.0075, 0.999, start=75)(step) for step in (74, 75, 100, 150, 208, 300)]
    assert found == pytest.approx([0, 0, 0.1875, 0.5625, 0.9975, 0.999], abs=1e-12)
