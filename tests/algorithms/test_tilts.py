"""Where weighted matching ends on Gaussian data: the law tilted by the weight, and the way to it that a penalty allows.

Expectations over data and noise are Gauss-Hermite sums of AWM's own loss, exact to rounding, so a stationary velocity has gradient zero.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flowalign.algorithms import awm
from flowalign.core.algorithm import Experience, Update
from flowalign.core.gaussians import gaussian_kl
from flowalign.core.rollout import Trajectory, Transitions
from flowalign.core.worlds import GaussianWorld

LEVEL = 0.5


def nodes(world, size=60):
    """Data and noise at the nodes of a product rule, and the rule's weights."""
    points, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(size))
    weights = weights / weights.sum()
    x0 = world.mean + world.std * points
    return x0.repeat_interleave(size)[:, None], points.repeat(size)[:, None], (weights[:, None] * weights).flatten()


def slopes(world, weight, velocity, reference=None, penalty=0.0):
    """Derivatives of AWM's expected loss at a velocity, in the directions 1, x and x^2."""
    x0, noise, share = nodes(world)
    built = awm.Config(
        weighting="uniform", levels="uniform", num_levels=1, advantage_max=5.0, reference_penalty=penalty, slow_penalty=0.0
    ).build()
    num, ones = len(x0), torch.ones(len(x0), 1).double()
    trajectory = Trajectory(x_init=x0, x0=x0, sigmas=torch.tensor([1.0, 0.0]).double(), transitions=Transitions.concatenate([], x0))
    ids = torch.arange(num)
    made = Experience(trajectory=trajectory, advantage=ones, weight=ones, keep=ones[:, 0] > 0, prompt=ids, group=ids, sample=0 * ids)
    rows = built.rows(made, Update(seed=0, step=0, index=0))
    columns = {"x0": x0, "noise": noise, "sigma": torch.full((num,), LEVEL).double(), "advantage": weight(x0)[:, 0]}
    rows = replace(rows, columns={**rows.columns, **columns})
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def moved(x, sigma, sample, role):
        if role == "reference":
            return reference(x)
        return velocity(x) + theta[0] + theta[1] * x + theta[2] * x * x

    (share * built.loss("current", rows, moved).value).sum().backward()
    return theta.grad


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.5)])
def test_a_linear_reward_moves_the_mean_by_the_temperature_times_the_variance(mean, std):
    tau, world = 0.5, GaussianWorld(mean, std)
    tilted = GaussianWorld(mean + tau * std**2, std)
    found = slopes(world, lambda x0: torch.exp(tau * x0), lambda x: tilted.velocity(x, LEVEL))
    assert found.abs().max() < 1e-10
    assert slopes(world, lambda x0: torch.exp(tau * x0), lambda x: world.velocity(x, LEVEL)).abs().max() > 0.1
    if (mean, std) == (0.0, 1.0):
        assert tilted.velocity(torch.tensor([-0.5, 0.0, 0.5]), LEVEL).tolist() == pytest.approx([-0.5] * 3)


def test_a_quadratic_reward_adds_its_temperature_to_the_precision_and_n_rounds_add_n_of_them():
    """r = -(x - c)^2 / 2: precision 1 / s^2 + tau. Trained again and again on its own samples the law shrinks to a point."""
    tau, centre, world = 0.8, 1.5, GaussianWorld(0.3, 0.9)
    precision, moment = 1 / world.std**2, world.mean / world.std**2
    for rounds in range(1, 5):
        precision, moment = precision + tau, moment + tau * centre
        tilted = GaussianWorld(moment / precision, precision**-0.5)

        def weight(x0):
            return torch.exp(-tau * (x0 - centre) ** 2 / 2)

        assert slopes(world, weight, lambda x, tilted=tilted: tilted.velocity(x, LEVEL)).abs().max() < 1e-9
        assert slopes(world, weight, lambda x, world=world: world.velocity(x, LEVEL)).abs().max() > 1e-3
        assert precision == pytest.approx(1 / 0.9**2 + rounds * tau)
        world = tilted
    assert world.std < 0.5 * 0.9 * 1.1


def test_with_a_penalty_the_velocity_is_the_average_of_weighted_and_reference_velocity():
    """v = (E[A v*|x] + beta v_ref) / (E[A|x] + beta), here for A = x0^2."""
    world, beta = GaussianWorld(0.4, 0.8), 0.3
    variance = 1 / (1 / world.std**2 + ((1 - LEVEL) / LEVEL) ** 2)  # of x0 given x

    def reference(x):
        return 0.3 * x - 0.2

    def best(x):
        m = world.posterior_mean(x, LEVEL)
        square = m**2 + variance
        towards = (x * square - (m**3 + 3 * m * variance)) / LEVEL
        return (towards + beta * reference(x)) / (square + beta)

    weight = torch.square
    assert slopes(world, weight, best, reference, beta).abs().max() < 1e-10
    assert slopes(world, weight, best, reference, 0.0).abs().max() > 1e-3


def test_the_frontier_of_reward_and_kl_is_that_of_the_tilt():
    """Linear reward: E[r] gains s sqrt(2 KL), and E[r] - beta KL is greatest at a shift of s^2 / beta, which is the tilt at 1 / beta."""
    s, beta = 0.6, 0.4
    shift = torch.tensor([s**2 / beta], dtype=torch.float64, requires_grad=True)
    kl = gaussian_kl(shift[None], torch.zeros(1, 1).double(), s, reduction="sum")
    assert shift.item() == pytest.approx(s * (2 * kl.item()) ** 0.5)
    (slope,) = torch.autograd.grad(shift.sum() - beta * kl.sum(), shift)
    assert abs(float(slope)) < 1e-12
    tilted = GaussianWorld(s**2 / beta, s)
    found = slopes(GaussianWorld(0.0, s), lambda x0: torch.exp(x0 / beta), lambda x: tilted.velocity(x, LEVEL))
    assert found.abs().max() < 1e-9
