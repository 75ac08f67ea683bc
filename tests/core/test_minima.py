"""One Gaussian against mixtures of two: where each divergence is least, at what rates curvatures fall, and what a discriminator learns."""

import math

import pytest
import torch

from flowalign.core.adversarial import discriminator_loss
from flowalign.core.divergences import curvature, generator, names, pull

GRID = torch.linspace(-40, 40, 16001, dtype=torch.float64)
STEP = float(GRID[1] - GRID[0])
HALVES, CLOSE, UNEQUAL, SHARP = (
    (0.5, 3, 1),
    (0.5, 2, 1),
    (0.7, 3, 1),
    (0.5, 4, 0.5),
)  # weight of the left mode, half the distance, std of each
# Target, divergence, where the descent begins, and where it ends: mean and std.
MINIMA = [
    (HALVES, "reverse_kl", (3, 1), (2.9843, 1.0234)),
    (HALVES, "reverse_kl", (0, 3), (0, 2.7438)),
    (HALVES, "softened_reverse_kl", (3, 1), (2.9904, 1.0135)),
    (HALVES, "jensen_shannon", (0, 3), (0, 3.1198)),
    (HALVES, "jensen_shannon", (3, 1), (2.9687, 1.0493)),
    (HALVES, "squared_hellinger", (3, 1), (0, 3.0499)),
    (HALVES, "jeffreys", (3, 1), (0, 2.8241)),
    (HALVES, "forward_kl", (3, 1), (0, 3.1623)),
    (CLOSE, "reverse_kl", (2, 1), (0, 2.0470)),
    (CLOSE, "softened_reverse_kl", (2, 1), (0, 1.9981)),
    (CLOSE, "jensen_shannon", (2, 1), (0, 2.1964)),
    (CLOSE, "squared_hellinger", (2, 1), (0, 2.1624)),
    (CLOSE, "jeffreys", (2, 1), (0, 2.1001)),
    (CLOSE, "forward_kl", (2, 1), (0, 2.2361)),
    (UNEQUAL, "reverse_kl", (-3, 1), (-2.9905, 1.0147)),
    (UNEQUAL, "reverse_kl", (3, 1), (2.9734, 1.0379)),
    (UNEQUAL, "softened_reverse_kl", (-3, 1), (-2.9941, 1.0085)),
    (UNEQUAL, "jensen_shannon", (-3, 1), (-2.9848, 1.0245)),
    (UNEQUAL, "jensen_shannon", (-1.2, 2.8), (-1.2376, 2.8628)),
    (UNEQUAL, "squared_hellinger", (-1.2, 2.8), (-1.2041, 2.8036)),
    (UNEQUAL, "squared_hellinger", (-3, 1), (-2.9627, 1.0683)),
    (UNEQUAL, "jeffreys", (-3, 1), (-1.1236, 2.6022)),
    (UNEQUAL, "forward_kl", (-3, 1), (-1.2000, 2.9257)),
    (SHARP, "reverse_kl", (4, 0.6), (4, 0.5)),
    (SHARP, "softened_reverse_kl", (4, 0.6), (4, 0.5)),
    (SHARP, "jensen_shannon", (4, 0.6), (4, 0.5)),
    (SHARP, "jensen_shannon", (0, 4), (0, 4.0171)),
    (SHARP, "squared_hellinger", (4, 0.6), (4, 0.5)),
    (SHARP, "squared_hellinger", (0, 4), (0, 4.0005)),
    (SHARP, "jeffreys", (4, 0.6), (3.5374, 1.7526)),
    (SHARP, "forward_kl", (4, 0.6), (0, 4.0311)),
]


def log_normal(x, mean, std):
    return -0.5 * ((x - mean) / std) ** 2 - torch.log(torch.as_tensor(std, dtype=torch.float64)) - 0.5 * math.log(2 * math.pi)


def divergence_from(target, name, mean, std):
    """The divergence by quadrature, as a function whose gradient is the weighted one."""
    share, place, width = target
    teacher = torch.logaddexp(log_normal(GRID, -place, width) + math.log(share), log_normal(GRID, place, width) + math.log(1 - share))
    student = log_normal(GRID, mean, std)
    return (student.exp() * generator(name, (teacher - student).clamp(-600, 600))).sum() * STEP


def gradient(target, name, mean, std):
    """By the pull f - r f', of which expectations under a moving student have the divergence's slope: it never multiplies 0 by infinity."""
    share, place, width = target
    teacher = torch.logaddexp(log_normal(GRID, -place, width) + math.log(share), log_normal(GRID, place, width) + math.log(1 - share))
    place_of = torch.tensor([mean, std], dtype=torch.float64, requires_grad=True)
    student = log_normal(GRID, place_of[0], place_of[1])
    pulled = pull(name, (teacher - student.detach()).clamp(-600, 600))
    (found,) = torch.autograd.grad((student.exp() * pulled).sum() * STEP, place_of)
    return found


@pytest.mark.parametrize(("target", "name", "start", "end"), MINIMA)
def test_a_gaussian_ends_where_the_divergence_is_least(target, name, start, end):
    place = torch.tensor(start, dtype=torch.float64)
    for _ in range(400):
        slope = gradient(target, name, *place.tolist())
        if slope.abs().max() < 1e-9:
            break
        # Newton's step where the curvature allows it, else a short step downhill.
        bend = torch.stack(
            [
                (gradient(target, name, *(place + h).tolist()) - gradient(target, name, *(place - h).tolist())) / 2e-4
                for h in 1e-4 * torch.eye(2).double()
            ]
        )
        bend = (bend + bend.T) / 2
        step = torch.linalg.solve(bend, slope) if torch.linalg.eigvalsh(bend)[0] > 1e-3 else slope / slope.norm()
        place = place - step * min(1.0, 0.1 / float(step.norm()))
    assert place[0].item() == pytest.approx(end[0], abs=1e-3)
    assert place[1].item() == pytest.approx(end[1], abs=1e-3)


def test_the_values_at_the_minima_say_which_is_global():
    found = [float(divergence_from(HALVES, name, *place)) for name, place in (
        ("reverse_kl", (2.9843, 1.0234)),
        ("jensen_shannon", (0.0, 3.1198)),
        ("jensen_shannon", (2.9687, 1.0493)),
    )]  # fmt: skip
    assert found == pytest.approx([0.68877, 0.25682, 0.42815], abs=1e-5)


@pytest.mark.parametrize("target", [HALVES, CLOSE, UNEQUAL, SHARP])
def test_forward_kl_is_least_where_the_moments_are_the_teachers(target):
    share, place, width = target
    mean = (1 - 2 * share) * place
    std = math.sqrt(width**2 + place**2 - mean**2)
    assert gradient(target, "forward_kl", mean, std).abs().max() < 1e-10


# Powers of r that f'' falls by, towards 0 and towards infinity: table 6 of the paper's appendix.
RATES = {
    "reverse_kl": (-2, -2),
    "softened_reverse_kl": (-2, -3),
    "jensen_shannon": (-1, -2),
    "squared_hellinger": (-1.5, -1.5),
    "forward_kl": (-1, -1),
    "jeffreys": (-2, -1),
}


@pytest.mark.parametrize("name", names())
def test_curvatures_fall_at_the_published_rates(name):
    for side, rate in zip((-1.0, 1.0), RATES[name], strict=True):
        ends = curvature(name, torch.tensor([40.0, 50.0], dtype=torch.float64) * side).log()
        assert float((ends[1] - ends[0]) / (10 * side)) == pytest.approx(rate, abs=1e-9)


@pytest.mark.parametrize(("teacher", "student", "sigma"), [((0.0, 1.0), (1.0, 1.5), 0.6), ((1.0, 2.0), (-1.0, 1.0), 0.3)])
def test_a_small_network_learns_the_log_ratio_of_noised_gaussians(teacher, student, sigma):
    """Its loss is least at the log-ratio of the densities; here by a perceptron of two hidden layers, on quantiles of both laws."""
    places = (torch.arange(6_000, dtype=torch.float64) + 0.5) / 6_000
    laws = [((1 - sigma) * mean, math.hypot((1 - sigma) * std, sigma)) for mean, std in (teacher, student)]
    real, made = ((mean + std * torch.special.ndtri(places))[:, None] for mean, std in laws)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    ).double()
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = sum(part.mean() for part in discriminator_loss(network(real), network(made)))
        loss.backward()
        return loss

    optimizer.step(closure)
    x = torch.linspace(-6, 6, 601, dtype=torch.float64)
    exact = log_normal(x, *laws[0]) - log_normal(x, *laws[1])
    dense = sum(log_normal(x, *law).exp() for law in laws) > 1e-2  # where there is something to learn from
    with torch.no_grad():
        found = network(x[:, None])[:, 0]
    chosen = (exact.abs() < 3) & dense
    assert chosen.sum() > 100
    assert (found - exact)[chosen].abs().max() < 0.1
