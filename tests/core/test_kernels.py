"""Oracles of samplers on Gaussian data, where every step is linear and variances follow a recursion."""

import inspect
import math

import pytest
import torch

from flowalign.core.kernels import CPS, DDIM, DanceSDE, Euler, FlowSDE, gaussian_kl, gaussian_log_prob, reduce_event
from flowalign.core.schedules import flow_sigmas, linear_sigmas
from flowalign.core.worlds import GaussianWorld

STOCHASTIC = [FlowSDE(0.7), DanceSDE(0.3), DDIM(1.0), CPS(0.8)]


def final_variance(kernel, sigmas, std=1.0):
    """Variance at the end, by propagating x = 1 (the mean's factor) and the kernel's std through each step."""
    one, now, then = torch.ones(len(sigmas) - 1, dtype=torch.float64), sigmas[:-1], sigmas[1:]
    step = kernel(one, GaussianWorld(0.0, std).velocity(one, now), now, then)  # all steps at once: one row each
    variance = 1.0
    for factor, noise in zip(step.mean.tolist(), step.std.tolist(), strict=True):
        variance = factor**2 * variance + noise**2
    return variance


@pytest.mark.parametrize(
    ("kernel", "linear", "sd3"),
    [
        (Euler(), (0.7726, 0.9377, 0.9841, 0.9960), (0.6685, 0.9943)),
        (FlowSDE(0.7), (0.9313, 0.9990, 1.0087, 1.0067), (0.7840, 1.0009)),
        (FlowSDE(math.sqrt(2)), (1.0120, 1.0005, 1.0000, 1.0000), (0.8925, 0.9979)),
        (DanceSDE(0.3), (0.7873, 0.9419, 0.9851, 0.9963), (0.6791, 0.9945)),
        (DDIM(1.0), (0.6483, 0.8864, 0.9691, 0.9921), (0.5207, 0.9859)),
        (CPS(0.8), (0.5237, 0.6111, 0.6395, 0.6491), (0.4538, 0.6442)),
    ],
)
def test_final_variances_are_those_of_the_recursion(kernel, linear, sd3):
    for steps, expected in zip((10, 40, 160, 640), linear, strict=True):
        assert final_variance(kernel, linear_sigmas(steps, dtype=torch.float64)) == pytest.approx(expected, abs=6e-5)
    for steps, expected in zip((10, 640), sd3, strict=True):
        assert final_variance(kernel, flow_sigmas(steps, dtype=torch.float64)) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("kernel", [Euler(), DanceSDE(0.3), DDIM(1.0)])
def test_marginals_are_kept_in_the_limit(kernel):
    errors = [abs(final_variance(kernel, linear_sigmas(n, dtype=torch.float64)) - 1) for n in (80, 320)]
    assert errors[1] < errors[0] / 3  # first order: a quarter, with room


def test_cps_does_not_keep_marginals():
    assert abs(final_variance(CPS(0.8), linear_sigmas(640, dtype=torch.float64)) - 1) > 0.3


def test_the_first_flow_sde_step_inflates_the_variance_by_a_known_amount():
    sigmas = linear_sigmas(1_000_000, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    step = FlowSDE(0.7)(one, GaussianWorld(0.0, 1.0).velocity(one, 1.0), float(sigmas[0]), float(sigmas[1]))
    assert float(step.mean) ** 2 + float(step.std) ** 2 == pytest.approx(1 + 0.7**4 / 4, abs=1e-4)


def test_flow_sde_stds_on_the_sd3_grid():
    sigmas = flow_sigmas(10, dtype=torch.float64)
    x = torch.zeros(1, 1, dtype=torch.float64)
    stds = [float(FlowSDE(0.7)(x, x, float(a), float(b)).std) for a, b in zip(sigmas[:-1], sigmas[1:], strict=True)]
    expected = [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.0063]
    assert stds == pytest.approx(expected, abs=6e-4)
    assert sum(stds[:9]) / 9 == pytest.approx(0.4440, abs=1e-4)


def test_cps_stds_on_the_sd3_grid():
    sigmas = flow_sigmas(10, dtype=torch.float64)
    x = torch.zeros(1, 1, dtype=torch.float64)
    stds = [float(CPS(0.8)(x, x, float(a), float(b)).std) for a, b in zip(sigmas[:-1], sigmas[1:], strict=True)]
    expected = [0.9131, 0.8686, 0.8157, 0.7517, 0.6727, 0.5727, 0.4421, 0.2644, 0.0085, 0]
    assert stds == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kernel", [FlowSDE(0.0), DanceSDE(0.0), DDIM(0.0), CPS(0.0)])
def test_without_noise_every_kernel_is_euler(kernel):
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    step = kernel(x, v, 0.8, 0.55)
    assert float(step.std) == 0
    assert (step.mean - Euler()(x, v, 0.8, 0.55).mean).abs().max() < 1e-12


def test_cps_with_ddim_noise_is_ddim():
    x, v, t, u = torch.full((1, 1), 0.4, dtype=torch.float64), torch.full((1, 1), -0.7, dtype=torch.float64), 0.6, 0.45
    h = math.log((1 - u) / u) - math.log((1 - t) / t)
    ratio = math.sqrt(1 - math.exp(-2 * h))
    same = CPS(2 / math.pi * math.asin(ratio))(x, v, t, u)
    ddim = DDIM(1.0)(x, v, t, u)
    assert float(same.std) == pytest.approx(float(ddim.std), abs=1e-12)
    assert float(same.mean) == pytest.approx(float(ddim.mean), abs=1e-12)


@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_a_level_for_each_row_gives_what_single_levels_give(kernel):
    generator = torch.Generator().manual_seed(1)
    x, v = (torch.randn(3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    now, then = torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64), torch.tensor([0.8, 0.5, 0.1], dtype=torch.float64)
    together = kernel(x, v, now, then)
    for row in range(3):
        alone = kernel(x[row : row + 1], v[row : row + 1], float(now[row]), float(then[row]))
        assert (together.mean[row] - alone.mean[0]).abs().max() < 1e-12
        assert float(together.std[row]) == pytest.approx(float(alone.std), abs=1e-12)


def test_the_true_kl_and_the_released_one_at_the_worked_point():
    x, zero, one = (torch.full((1, 1), value, dtype=torch.float64) for value in (0.3, 0.0, 1.0))
    first, second = FlowSDE(0.7)(x, zero, 0.5, 0.4), FlowSDE(0.7)(x, one, 0.5, 0.4)
    divergence = float(gaussian_kl(first.mean, second.mean, first.std, reduction="mean"))
    assert divergence == pytest.approx(0.158166, abs=1e-6)
    assert 0.1 * divergence == pytest.approx(0.0158166, abs=1e-7)


def test_kl_of_each_sd3_step():
    sigmas = flow_sigmas(10, dtype=torch.float64)
    x, zero, one = (torch.full((1, 1), value, dtype=torch.float64) for value in (0.3, 0.0, 1.0))
    found = []
    for now, then in zip(sigmas[:9].tolist(), sigmas[1:10].tolist(), strict=True):
        first, second = FlowSDE(0.7)(x, zero, now, then), FlowSDE(0.7)(x, one, now, then)
        found.append(float(gaussian_kl(first.mean, second.mean, first.std, reduction="mean")))
    assert found == pytest.approx([0.0016, 0.0031, 0.0084, 0.0177, 0.0349, 0.0688, 0.1435, 0.3402, 1.1052], abs=1e-4)


def test_the_log_ratio_has_the_known_mean_and_std():
    d, rows = 4096, 400
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(rows, d, generator=generator, dtype=torch.float64)
    mean = torch.zeros(rows, d, dtype=torch.float64)
    x_next = mean + 0.3 * noise
    ratio = gaussian_log_prob(x_next, mean + 1e-3, 0.3, reduction="mean") - gaussian_log_prob(x_next, mean, 0.3, reduction="mean")
    assert float(ratio.mean()) == pytest.approx(-5.556e-6, abs=3 * 5.208e-5 / rows**0.5)
    assert float(ratio.std()) == pytest.approx(5.208e-5, rel=0.12)


def test_ddpo_is_noisy_score_matching_row_by_row():
    t, u = 0.5, 0.4
    a = (1 - t) / (1 - u)
    b2, rho = t**2 - (a * u) ** 2, u * math.sqrt(t**2 - (a * u) ** 2) / t
    generator = torch.Generator().manual_seed(3)
    x_t, x_u, v = (torch.randn(8, 1, generator=generator, dtype=torch.float64) for _ in range(3))
    mean = DDIM(1.0)(x_t, v, t, u).mean
    score = -(x_t + (1 - t) * v) / t
    weight = b2 * t**2 / (2 * a**2 * u**2)
    left = -((x_u - mean) ** 2) / (2 * rho**2)
    right = -weight * (score - (a * x_u - x_t) / b2) ** 2
    assert (left - right).abs().max() < 1e-12


def test_flow_grpo_regresses_on_the_old_velocity_plus_noise():
    t, u, noise_level = 0.5, 0.4, 0.7
    d = t - u
    s2 = noise_level**2 * t / (1 - t)
    c_v = -d * (1 + s2 * (1 - t) / (2 * t))
    generator = torch.Generator().manual_seed(4)
    x, old, new, eps = (torch.randn(6, 1, generator=generator, dtype=torch.float64) for _ in range(4))
    kernel = FlowSDE(noise_level)
    step = kernel(x, old, t, u)
    x_next = step.mean + step.std * eps
    target = old + step.std / c_v * eps
    score = gaussian_log_prob(x_next, kernel(x, new, t, u).mean, step.std, reduction="sum")
    regression = -(c_v**2) / (2 * s2 * d) * (new - target).squeeze(1) ** 2
    assert (score - regression).std() < 1e-10
    assert c_v**2 / (2 * s2 * d) == pytest.approx(0.158166, abs=1e-6)


def test_the_log_prob_is_that_of_torch():
    x, mean, std = torch.randn(3, 4, generator=torch.Generator().manual_seed(5)), torch.zeros(3, 4), torch.tensor([0.5, 1.0, 2.0])
    expected = torch.distributions.Normal(mean, std[:, None]).log_prob(x)
    assert torch.allclose(gaussian_log_prob(x, mean, std, reduction="sum"), expected.sum(1), atol=1e-5)
    assert torch.allclose(gaussian_log_prob(x, mean, std, reduction="mean"), expected.mean(1), atol=1e-6)


@pytest.mark.parametrize("call", [gaussian_log_prob, gaussian_kl])
def test_a_deterministic_step_has_no_density(call):
    with pytest.raises(ValueError, match="std"):
        call(torch.zeros(1, 2), torch.zeros(1, 2), 0.0, reduction="mean")


def test_an_unknown_reduction_is_refused():
    # beartype would refuse the word first; outside tests there is no beartype.
    with pytest.raises(ValueError, match="reduction"):
        inspect.unwrap(reduce_event)(torch.zeros(1, 2), "median")
