"""Exact worlds against definitions: densities, quadrature and samples."""

import math

import pytest
import torch

from flowalign.core.kernels import CPS, DanceSDE, Euler, FlowSDE, sample
from flowalign.core.paths import interpolate, velocity_to_noise, velocity_to_score, velocity_to_x0
from flowalign.core.schedules import linear_sigmas
from flowalign.core.worlds import GaussianWorld, MixtureWorld

MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.5, -1.5]], dtype=torch.float64)
MIXTURE = MixtureWorld(MEANS, torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64), torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64))
GAUSSIAN = GaussianWorld(torch.tensor([0.7, -0.4], dtype=torch.float64), torch.tensor([0.5, 1.5], dtype=torch.float64))


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("world", [GAUSSIAN, MIXTURE])
@pytest.mark.parametrize("sigma", [0.0, 0.01, 0.3, 0.8, 1.0])
def test_the_score_is_the_gradient_of_the_log_density(world, sigma):
    x = draw(0, 7, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(world.log_prob(x, sigma).sum(), x)
    assert (gradient - world.score(x.detach(), sigma)).abs().max() < 1e-12


@pytest.mark.parametrize("world", [GAUSSIAN, MIXTURE])
def test_velocity_score_and_posterior_mean_are_three_views_of_one_thing(world):
    x, sigma = draw(1, 5, 2), torch.tensor([0.01, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    velocity = world.velocity(x, sigma)
    assert (velocity_to_x0(velocity, x, sigma) - world.posterior_mean(x, sigma)).abs().max() < 1e-12
    assert (velocity_to_score(velocity, x, sigma) - world.score(x, sigma)).abs().max() < 1e-10


@pytest.mark.parametrize("world", [GAUSSIAN, MIXTURE])
def test_at_the_ends_of_the_path_the_velocity_is_what_it_must_be(world):
    x = draw(2, 6, 2)
    mean, _ = world.marginal(0.0)
    assert (world.velocity(x, 1.0) - (x - mean)).abs().max() < 1e-12  # the noise is x, the data are unknown
    assert (world.velocity(x, 0.0) + x).abs().max() < 1e-12  # the data are x, the noise is unknown


@pytest.mark.parametrize("sigma", [0.2, 0.6])
def test_the_posterior_mean_is_the_integral_of_bayes_rule(sigma):
    world = MixtureWorld(torch.tensor([[1.5], [-0.5]], dtype=torch.float64), 0.4, torch.tensor([0.3, 0.7], dtype=torch.float64))
    x0 = torch.linspace(-8, 8, 8001, dtype=torch.float64)[:, None]
    prior = world.log_prob(x0, 0.0)
    for value in (-1.2, 0.1, 0.9):
        posterior = torch.softmax(prior - 0.5 * ((value - (1 - sigma) * x0[:, 0]) / sigma) ** 2, 0)
        exact = world.posterior_mean(torch.tensor([[value]], dtype=torch.float64), sigma).item()
        assert (posterior * x0[:, 0]).sum().item() == pytest.approx(exact, abs=1e-9)


def test_the_density_of_a_mixture_integrates_to_one():
    world = MixtureWorld(torch.tensor([[1.5], [-0.5]], dtype=torch.float64), 0.4)
    x = torch.linspace(-10, 10, 4001, dtype=torch.float64)[:, None]
    for sigma in (0.0, 0.5, 1.0):
        assert torch.trapezoid(world.log_prob(x, sigma).exp(), x[:, 0]).item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("world", [GAUSSIAN, MIXTURE])
def test_noised_samples_have_the_marginal_mean_and_std(world):
    num, sigma = 40_000, 0.4
    x = interpolate(world.sample(num, torch.Generator().manual_seed(3)), draw(4, num, 2), sigma)
    mean, std = world.marginal(sigma)
    assert ((x.mean(0) - mean).abs() / std).max() < 4.5 / math.sqrt(num)
    assert (x.std(0) / std - 1).abs().max() < 4.5 * 1.5 / math.sqrt(num)


@pytest.mark.parametrize("world", [GAUSSIAN, MIXTURE])
def test_the_exact_velocity_is_the_best_prediction_of_noise_minus_data(world):
    num, sigma = 40_000, 0.35
    x0, noise = world.sample(num, torch.Generator().manual_seed(5)), draw(6, num, 2)
    x = interpolate(x0, noise, sigma)
    residual = noise - x0 - world.velocity(x, sigma)
    for feature in (torch.ones_like(x), x, torch.sin(2 * x), x.flip(1)):
        product = residual * feature
        assert (product.mean(0).abs() / (product.std(0) / math.sqrt(num))).max() < 4.5


def test_a_mixture_of_one_component_is_the_gaussian_world():
    one = MixtureWorld(torch.tensor([[0.7, -0.4]], dtype=torch.float64), 0.5)
    same = GaussianWorld(torch.tensor([0.7, -0.4], dtype=torch.float64), 0.5)
    x, sigma = draw(7, 4, 2), torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    for ours, theirs in ((one.velocity, same.velocity), (one.posterior_mean, same.posterior_mean), (one.log_prob, same.log_prob)):
        assert (ours(x, sigma) - theirs(x, sigma)).abs().max() < 1e-12


@pytest.mark.parametrize("kernel", [Euler(), FlowSDE(0.7), DanceSDE(0.3), DanceSDE(1.0)])
@pytest.mark.parametrize(("mean", "std"), [(0.5, 1.0), (-1.0, 0.5), (0.3, 0.1)])
def test_two_hundred_steps_bring_mean_and_std_home(kernel, mean, std):
    world, sigmas = GaussianWorld(mean, std), linear_sigmas(200, dtype=torch.float64)
    now, then = sigmas[:-1], sigmas[1:]
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(200, 2)  # where 0 and 1 go says how each step maps the line
    step = kernel(x, world.velocity(x, now), now, then)
    at, variance = 0.0, 1.0
    for (offset, end), noise in zip(step.mean.tolist(), step.std.tolist(), strict=True):
        at, variance = offset + (end - offset) * at, (end - offset) ** 2 * variance + noise**2
    assert at == pytest.approx(mean, abs=0.01)
    assert math.sqrt(variance) == pytest.approx(std, abs=0.01)


def test_an_sde_brings_a_mixture_home_and_cps_does_not():
    world = MixtureWorld(torch.tensor([[1.0], [-1.0]], dtype=torch.float64), 0.3)
    sigmas = linear_sigmas(40, dtype=torch.float64).tolist()
    spread = {}
    for kernel in (FlowSDE(0.7), CPS(0.8)):
        x = draw(8, 2000, 1)
        for step, (now, then) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            x = sample(kernel(x, world.velocity(x, now), now, then), draw(100 + step, 2000, 1))
        spread[kernel] = (x.abs() - 1).std().item()
    assert spread[FlowSDE(0.7)] == pytest.approx(0.3, abs=0.04)
    assert spread[CPS(0.8)] < 0.25


def test_velocities_of_worlds_carry_their_noise_in_any_dtype():
    world, x = GaussianWorld(0.3, 0.7), draw(9, 5)
    exact = velocity_to_noise(world.velocity(x, 0.4), x, 0.4)
    single = velocity_to_noise(world.velocity(x.float(), 0.4), x.float(), 0.4)
    assert single.dtype == torch.float32
    assert (single - exact).abs().max() < 1e-6


def test_worlds_without_a_density_are_refused():
    with pytest.raises(ValueError, match="std"):
        GaussianWorld(0.0, 0.0)
    with pytest.raises(ValueError, match="weights"):
        MixtureWorld(MEANS, 0.3, torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="one per component"):
        MixtureWorld(MEANS, torch.tensor([0.3, 0.4]))
