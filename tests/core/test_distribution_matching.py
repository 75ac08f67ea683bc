"""Distribution matching against exact answers: gradients of divergences between noised Gaussians, and the published fixtures."""

import inspect
import math

import pytest
import torch

from flowalign.core.distribution_matching import (
    dmd_scale,
    exact_scale,
    guidance_direction,
    matching_direction,
    pseudo_huber,
    push,
    regress,
)
from flowalign.core.divergences import generator, names, weight
from flowalign.core.paths import interpolate, velocity_to_score, vp_sigma, x0_to_velocity
from flowalign.core.ratios import RatioWeights, density_weights, start_calibration
from flowalign.core.worlds import GaussianWorld

X = torch.tensor([[0.0, 1, 2, 3], [2, -1, 0, 1]])
TEACHER = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]])
FAKE = torch.tensor([[0.5, 2, 1, 0], [0, 1, 2, 1]])
# Divergence at sigma 0.6 and its derivatives in the clean student's mean and std.
NOISED = {
    (0, 1, 1, 1.5): {
        "reverse_kl": (0.30769231, 0.12820513),
        "softened_reverse_kl": (0.18977488, 0.10629996),
        "jensen_shannon": (0.11791743, 0.02190516),
        "squared_hellinger": (0.06205788, 0.01384625),
        "forward_kl": (0.22222222, 0.01851852),
        "jeffreys": (0.52991453, 0.14672365),
    },
    (1, 2, -1, 1): {
        "reverse_kl": (-0.32, -0.14769231),
        "jensen_shannon": (-0.16224297, -0.09614653),
        "squared_hellinger": (-0.09229012, -0.06202494),
        "forward_kl": (-0.61538462, -0.66272189),
        "jeffreys": (-0.93538462, -0.81041420),
    },
}
# Where gradient flow from N(3, 1) ends for the teacher 1/2 N(3, 1) + 1/2 N(-3, 1).
FIXED_POINTS = {
    "reverse_kl": (2.9843, 1.0234),
    "softened_reverse_kl": (2.9904, 1.0135),
    "jensen_shannon": (2.9687, 1.0493),
    "squared_hellinger": (0, 3.0499),
    "jeffreys": (0, 2.8241),
    "forward_kl": (0, 3.1623),
}


def published(weights=None):
    x = X.clone().requires_grad_()
    scale = dmd_scale(x, TEACHER)
    loss = push(x, FAKE - TEACHER, scale if weights is None else scale * weights).mean()
    loss.backward()
    return loss.item(), x.grad


def test_the_loss_and_gradient_of_dmd_are_the_published_ones():
    loss, gradient = published()
    assert loss == pytest.approx(0.91840047, abs=1e-6)
    expected = torch.tensor([[-0.0625, 0.125, 0, -0.125], [-1 / 6, 1 / 6, 1 / 3, 1 / 6]])
    assert torch.allclose(gradient, expected, atol=1e-6)
    loss, weighted = published(torch.tensor([0.5, 1.5]))
    assert loss == pytest.approx(1.78515148, abs=2e-6)
    assert torch.allclose(weighted, gradient * torch.tensor([[0.5], [1.5]]))


def test_a_push_is_half_the_squared_distance_to_where_it_leads():
    generator = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(5, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(5, generator=generator, dtype=torch.float64)
    step = weights[:, None, None] * direction
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    plain = 0.5 * (first - (first - step).detach()).square().mean((1, 2))
    found = push(second, direction, weights)
    assert torch.allclose(found, plain, rtol=1e-12)
    plain.sum().backward()
    found.sum().backward()
    assert torch.allclose(first.grad, second.grad, rtol=1e-12)


def test_a_push_keeps_steps_that_are_far_below_the_rounding_of_the_sample():
    x = torch.full((1, 1), 1000.0, requires_grad=True)
    push(x, torch.full((1, 1), 1e-6)).sum().backward()
    assert x.grad.item() == pytest.approx(1e-6)


def test_nothing_flows_into_directions_targets_or_weights():
    leaves = [torch.ones(2, 3, requires_grad=True) for _ in range(2)] + [torch.ones(2, requires_grad=True)]
    for move in (push, regress):
        x = torch.zeros(2, 3, requires_grad=True)
        move(x, leaves[0] * leaves[1], leaves[2]).sum().backward()
        assert x.grad is not None
        assert all(leaf.grad is None for leaf in leaves)


def test_a_push_and_a_regression_to_where_it_leads_have_one_gradient():
    x = X.clone().requires_grad_()
    (push(x, FAKE - TEACHER).sum() - regress(x, X - (FAKE - TEACHER)).sum() / 2).backward()
    assert x.grad.abs().max() < 1e-7


def test_guidance_and_matching_add_up_to_the_direction_to_the_guided_prediction():
    unconditional, guidance = torch.full_like(X, 0.3), 2.5
    guided = unconditional + guidance * (TEACHER - unconditional)
    whole = matching_direction(FAKE, TEACHER) + guidance_direction(TEACHER, guided)
    assert torch.allclose(whole, FAKE - guided, atol=1e-6)
    assert torch.allclose(guidance_direction(TEACHER, guided), (1 - guidance) * (TEACHER - unconditional), atol=1e-6)
    assert not guidance_direction(TEACHER, TEACHER).any()
    # Two pushes, one with h and one without, are one push of the weighted sum.
    h, scale = torch.tensor([0.5, 1.5]), dmd_scale(X, guided)
    x = X.clone().requires_grad_()
    (push(x, matching_direction(FAKE, TEACHER), h * scale) + push(x, guidance_direction(TEACHER, guided), scale)).sum().backward()
    direction = h[:, None] * matching_direction(FAKE, TEACHER) + guidance_direction(TEACHER, guided)
    assert torch.allclose(x.grad, scale[:, None] * direction / 4, atol=1e-7)


@pytest.mark.parametrize("sigma", [0.05, 0.6, 0.97])
def test_predictions_differ_by_the_exact_scale_of_what_the_scores_differ_by(sigma):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    first, second = GaussianWorld(1.0, 2.0), GaussianWorld(-1.0, 0.5)
    predicted = first.posterior_mean(x, sigma) - second.posterior_mean(x, sigma)
    scores = first.score(x, sigma) - second.score(x, sigma)
    assert torch.allclose(exact_scale(sigma, x) * predicted, (1 - sigma) * scores, rtol=1e-10)
    assert torch.allclose(velocity_to_score(x0_to_velocity(first.posterior_mean(x, sigma), x, sigma), x, sigma), first.score(x, sigma))


def test_the_exact_scale_is_the_signal_to_noise_ratio_of_the_variance_preserving_process():
    alpha, beta = math.cos(0.4), math.sin(0.4)
    found = exact_scale(vp_sigma(alpha, beta), torch.zeros(3, 2))
    assert found.tolist() == pytest.approx([(alpha / beta) ** 2] * 3)


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, table in NOISED.items() for name in table])
def test_pushing_by_exact_predictions_is_the_gradient_of_the_noised_divergence(world, name):
    """The student x0 = mean + std z, noised to 0.6, over a grid of z and of the noise with normal weights: autograd through `push`."""
    sigma = 0.6
    mean_p, std_p, mean_q, std_q = world
    axis = torch.linspace(-14, 14, 281, dtype=torch.float64)
    z, noise = (grid.flatten() for grid in torch.meshgrid(axis, axis, indexing="ij"))
    density = torch.exp(-(z.square() + noise.square()) / 2) / (2 * math.pi) * (axis[1] - axis[0]) ** 2
    mean, std = (torch.tensor(float(value), dtype=torch.float64, requires_grad=True) for value in (mean_q, std_q))
    x0 = mean + std * z
    x = interpolate(x0.detach(), noise, sigma)
    teacher, student = GaussianWorld(float(mean_p), float(std_p)), GaussianWorld(float(mean_q), float(std_q))
    direction = matching_direction(student.posterior_mean(x, sigma), teacher.posterior_mean(x, sigma))
    h = weight(name, teacher.log_prob(x, sigma) - student.log_prob(x, sigma))
    (push(x0, direction, h * exact_scale(sigma, x0)) * density).sum().backward()
    assert (mean.grad.item(), std.grad.item()) == pytest.approx(NOISED[world][name], abs=1e-7)


# The divergences themselves at sigma 0.6, in the order of the names above.
NOISED_VALUES = {
    (0, 1, 1, 1.5): (0.18344265, 0.10990241, 0.07354024, 0.03810290, 0.13493342, 0.31837607),
    (1, 2, -1, 1): (0.40696323, None, 0.22414435, 0.12324383, 0.74995984, 1.15692308),
}


@pytest.mark.parametrize("world", NOISED_VALUES)
def test_noised_divergences_have_the_specifications_values(world):
    sigma, x = 0.6, torch.linspace(-30, 30, 30_001, dtype=torch.float64)
    teacher, student = GaussianWorld(float(world[0]), float(world[1])), GaussianWorld(float(world[2]), float(world[3]))
    log_p, log_q = (law.log_prob(x[:, None], torch.full((len(x),), sigma, dtype=torch.float64)) for law in (teacher, student))
    for name, expected in zip(NOISED[(0, 1, 1, 1.5)], NOISED_VALUES[world], strict=True):
        if expected is not None:
            found = float((log_q.exp() * generator(name, (log_p - log_q).clamp(-600, 600))).sum() * (x[1] - x[0]))
            assert found == pytest.approx(expected, abs=1e-7), name


@pytest.mark.parametrize("name", list(FIXED_POINTS))
def test_normalised_weights_leave_the_fixed_points_of_every_divergence_where_they_are(name):
    """Descent of a Gaussian student with two modes to match, weights of mean 1 and exact scores: only covering divergences leave the mode they start in."""
    samples = torch.special.ndtri((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    # Squared Hellinger and Jeffreys leave (3, 1) too, but so slowly that they are started on their way.
    place = torch.tensor([2.5, 1.6] if name in ("squared_hellinger", "jeffreys") else [3.0, 1.0], dtype=torch.float64)
    settings = RatioWeights(divergence=name, lower=1e-9, upper=1e9, num_bins=0)
    modes, bins = torch.tensor([3.0, -3.0], dtype=torch.float64), torch.zeros(1000, dtype=torch.int64)
    for _ in range(30):
        leaf = place.clone().requires_grad_()
        x = leaf[0] + leaf[1] * samples
        here, std = x.detach(), place[1]
        parts = -0.5 * (here[:, None] - modes).square()
        score_p = (torch.softmax(parts, 1) * (modes - here[:, None])).sum(1)
        log_ratio = torch.logsumexp(parts, 1) - math.log(2) + 0.5 * samples.square() + std.log()
        found = density_weights(log_ratio, bins, start_calibration(0), settings)
        push(x, -samples / std - score_p, found.weight).mean().backward()
        # Natural steps of a Gaussian: mean by std**2, log std by half of std.
        place = torch.stack([place[0] - 0.5 * std**2 * leaf.grad[0], std * torch.exp(-0.25 * std * leaf.grad[1])])
    assert place.tolist() == pytest.approx(FIXED_POINTS[name], abs=5e-3)


def test_a_fake_score_that_regresses_on_the_velocity_learns_the_students_exact_one():
    """Least squares on noise - x0 over affine functions of x is the velocity of the Gaussian that the samples come from."""
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 + 1.3 * torch.randn(100_000, generator=generator, dtype=torch.float64)
    noise = torch.randn(100_000, generator=generator, dtype=torch.float64)
    x = interpolate(x0, noise, 0.4)
    slope, offset = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    features = torch.stack([x, torch.ones_like(x)], 1)
    gradient = torch.autograd.grad(regress(slope * x + offset, noise - x0).mean(), [slope, offset])
    found = torch.linalg.solve(2 * features.T @ features / len(x), -torch.stack(gradient))
    probe = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    assert torch.allclose(found[0] * probe + found[1], GaussianWorld(0.5, 1.3).velocity(probe, 0.4), atol=0.03)


def test_shapes_that_would_broadcast_are_refused():
    bare = inspect.unwrap(push)  # in tests beartype would object first
    with pytest.raises(ValueError, match="push: got shapes"):
        bare(X, FAKE[:1])
    with pytest.raises(ValueError, match="one for each of 2 rows"):
        bare(X, FAKE, torch.ones(1))
    with pytest.raises(ValueError, match="eps: got 0"):
        dmd_scale(X, TEACHER, eps=0.0)
    with pytest.raises(ValueError, match="above 0"):
        exact_scale(0.0, X)


def test_every_trainable_divergence_is_covered_here():
    assert set(FIXED_POINTS) == set(NOISED[0, 1, 1, 1.5]) == set(names())


def test_the_pseudo_huber_distance_is_quadratic_near_and_linear_far():
    target = torch.zeros(2, 3, dtype=torch.float64)
    for size, expected in ((1e-3, 1e-6 / (2 * 0.5)), (1e3, 1e3 - 0.5)):
        found = pseudo_huber(torch.full((2, 3), size, dtype=torch.float64), target, width=0.5)
        torch.testing.assert_close(found.double(), torch.full((2,), expected, dtype=torch.float64), rtol=1e-5, atol=0)
    far = torch.tensor([[1.0, 0.0], [1e4, 0.0]], dtype=torch.float64, requires_grad=True)
    pseudo_huber(far, torch.zeros(2, 2, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(far.grad[0], far.grad[1], rtol=2e-3, atol=0)
    with pytest.raises(ValueError, match="width: got 0"):
        pseudo_huber(target, target, width=0.0)
