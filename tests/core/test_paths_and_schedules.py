import pytest
import torch

from flowalign.core import paths
from flowalign.core.schedules import flow_sigmas, shift_sigmas
from flowalign.core.worlds import GaussianWorld, MixtureWorld

SIGMAS = (0.01, 0.3, 0.7, 0.99)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_conversions_of_the_straight_path_agree_with_its_definition(sigma):
    x0, noise = draw(0, 3, 4), draw(1, 3, 4)
    x, velocity = paths.interpolate(x0, noise, sigma), noise - x0
    assert (paths.velocity_to_x0(velocity, x, sigma) - x0).abs().max() < 1e-12
    assert (paths.velocity_to_noise(velocity, x, sigma) - noise).abs().max() < 1e-12
    assert (paths.velocity_to_score(velocity, x, sigma) + noise / sigma).abs().max() < 1e-11


@pytest.mark.parametrize("sigma", SIGMAS)
def test_every_conversion_undoes_its_inverse(sigma):
    x, velocity = draw(2, 3, 4), draw(3, 3, 4)
    level = torch.full((3,), sigma, dtype=torch.float64)
    there_and_back = [
        paths.x0_to_velocity(paths.velocity_to_x0(velocity, x, level), x, level),
        paths.noise_to_velocity(paths.velocity_to_noise(velocity, x, level), x, level),
        paths.score_to_velocity(paths.velocity_to_score(velocity, x, level), x, level),
    ]
    for result in there_and_back:
        assert (result - velocity).abs().max() < 1e-11


def test_variance_preserving_predictions_convert_to_the_same_velocity():
    alpha, beta = 0.8, 0.6
    x0, noise = draw(0, 2, 5), draw(1, 2, 5)
    x_t = alpha * x0 + beta * noise
    expected = noise - x0
    assert (paths.epsilon_to_velocity(noise, x_t, alpha, beta) - expected).abs().max() < 1e-12
    assert (paths.v_prediction_to_velocity(alpha * noise - beta * x0, x_t, alpha, beta) - expected).abs().max() < 1e-12
    assert (paths.velocity_to_epsilon(expected, x_t, alpha, beta) - noise).abs().max() < 1e-12
    assert (paths.velocity_to_v_prediction(expected, x_t, alpha, beta) - (alpha * noise - beta * x0)).abs().max() < 1e-12
    # The same density in two scales: scores differ by the factor of the states.
    score = paths.epsilon_to_score(noise, beta)
    flow = paths.velocity_to_score(expected, paths.vp_to_flow(x_t, alpha, beta), paths.vp_sigma(alpha, beta))
    assert (flow - (alpha + beta) * score).abs().max() < 1e-10
    x, sigma = paths.vp_to_flow(x_t, alpha, beta), paths.vp_sigma(alpha, beta)
    assert (x - paths.interpolate(x0, noise, sigma)).abs().max() < 1e-12
    assert (paths.flow_to_vp(x, alpha, beta) - x_t).abs().max() < 1e-12


def test_a_level_outside_zero_to_one_is_refused():
    with pytest.raises(ValueError, match="sigma"):
        paths.interpolate(torch.zeros(1, 2), torch.zeros(1, 2), 1.5)


def test_the_sd3_grids_are_those_of_the_released_code():
    ten = [1, 0.96013, 0.91335, 0.85769, 0.79037, 0.70728, 0.60215, 0.46488, 0.27805, 0.00893, 0]
    fourteen = [1, 0.9731, 0.9430, 0.9094, 0.8715, 0.8283, 0.7787, 0.7213, 0.6539, 0.5738, 0.4769, 0.3574, 0.2062, 0.0089, 0]
    assert (flow_sigmas(10) - torch.tensor(ten)).abs().max() < 1e-4
    assert (flow_sigmas(14) - torch.tensor(fourteen)).abs().max() < 1e-4


@pytest.mark.parametrize("steps", [4, 10, 28])
def test_the_sd3_grid_is_that_of_diffusers(steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    assert (flow_sigmas(steps) - scheduler.sigmas).abs().max() < 1e-6


def test_shifting_by_one_changes_nothing():
    grid = torch.linspace(1, 0, 7)
    assert torch.equal(shift_sigmas(grid, 1.0), grid)


def test_the_score_of_a_mixture_is_the_gradient_of_its_log_density():
    world = MixtureWorld(torch.tensor([[2.0, 0.0], [-1.0, 1.0]]), 0.3, torch.tensor([0.3, 0.7]))
    x = draw(4, 5, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(world.log_prob(x, 0.4).sum(), x)
    assert (gradient - world.score(x.detach(), 0.4)).abs().max() < 1e-10


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_a_mixture_of_one_is_the_gaussian_world(sigma):
    one, mixture = GaussianWorld(0.7, 0.4), MixtureWorld(torch.tensor([[0.7]], dtype=torch.float64), 0.4, torch.ones(1))
    x = draw(5, 6, 1)
    for name in ("score", "posterior_mean", "velocity"):
        assert (getattr(one, name)(x, sigma) - getattr(mixture, name)(x, sigma)).abs().max() < 1e-10


def test_the_exact_velocity_agrees_with_score_and_posterior_mean():
    world, x, sigma = GaussianWorld(0.3, 0.6), draw(6, 4, 3), 0.35
    velocity = world.velocity(x, sigma)
    assert (paths.velocity_to_x0(velocity, x, sigma) - world.posterior_mean(x, sigma)).abs().max() < 1e-12
    assert (paths.velocity_to_score(velocity, x, sigma) - world.score(x, sigma)).abs().max() < 1e-12
