"""What a critic must be fitted on: the value of a state depends on how the state came about, re-noised or on a trajectory."""

import pytest
import torch

from flowalign.core.paths import interpolate
from flowalign.core.plans import ode
from flowalign.core.rollout import rollout
from flowalign.core.schedules import linear_sigmas
from flowalign.core.worlds import GaussianWorld

WORLD = GaussianWorld(0.0, 1.0)


def line(x, y):
    """Slope, intercept and residual variance of the least-squares line."""
    slope = ((x - x.mean()) * (y - y.mean())).mean() / x.var(correction=0)
    rest = y - y.mean() - slope * (x - x.mean())
    return float(slope), float(y.mean() - slope * x.mean()), float(rest.var(correction=0))


def draw(seed, num):
    return torch.randn(num, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_on_renoised_states_the_value_is_the_posterior_mean_and_half_the_variance_stays():
    x0, noise = draw(0, 100_000), draw(1, 100_000)
    x = interpolate(x0, noise, 0.5)
    slope, intercept, rest = line(x, x0)
    assert slope == pytest.approx(1.0, abs=0.015)
    assert intercept == pytest.approx(0.0, abs=0.01)
    assert rest == pytest.approx(0.5, abs=0.01)
    assert torch.allclose(WORLD.posterior_mean(x, 0.5), x)


def test_on_states_of_the_ode_the_value_is_the_end_itself_and_nothing_stays():
    states = draw(2, 1000) * 0.5**0.5  # the marginal at sigma 0.5
    done = rollout(WORLD.velocity, states, linear_sigmas(800, dtype=torch.float64), ode(800), lambda step: states, start=400)
    assert done.evaluations == 400 * 1000
    slope, _, rest = line(states, done.x0)
    assert slope == pytest.approx(2**0.5, abs=2e-3)
    assert rest < 1e-12


def test_the_value_of_a_square_has_the_posterior_variance_on_renoised_states_and_none_on_the_odes():
    x0, noise = draw(0, 200_000), draw(1, 200_000)
    x = interpolate(x0, noise, 0.5)
    value = WORLD.posterior_mean(x, 0.5).square() + 0.5**2 / 0.5  # m^2 + s^2 t^2 / var
    left = x0.square() - value
    for weight in (torch.ones_like(x), x.square()):  # what is left has no part in common with functions of the state
        product = left * weight
        assert float(product.mean()) == pytest.approx(0, abs=4 * float(product.std()) / len(x) ** 0.5)
    assert float(left.var()) < 0.9 * float(x0.square().var())
    states = draw(2, 1000) * 0.5**0.5
    done = rollout(WORLD.velocity, states, linear_sigmas(800, dtype=torch.float64), ode(800), lambda step: states, start=400)
    assert torch.allclose(done.x0.square(), states.square() / 0.5, rtol=0.01)


def test_a_critic_of_the_wrong_states_is_biased_on_the_others():
    """Fitted on re-noised states, the value of an ODE's state is off by the difference of the slopes."""
    states = draw(2, 1000) * 0.5**0.5
    done = rollout(WORLD.velocity, states, linear_sigmas(200, dtype=torch.float64), ode(200), lambda step: states, start=100)
    left = done.x0 - WORLD.posterior_mean(states, 0.5)
    assert float((left * states).mean() / states.square().mean()) == pytest.approx(2**0.5 - 1, abs=6e-3)
