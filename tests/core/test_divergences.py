import math

import pytest
import torch

from flowalign.core.divergences import WEIGHTS, weight

GENERATORS = {
    "reverse_kl": lambda r: -r.log(),
    "softened_reverse_kl": lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "squared_hellinger": lambda r: 1 - r.sqrt(),
    "forward_kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
}
TABLE = {
    "reverse_kl": (1, 1, 1),
    "softened_reverse_kl": (0.9090909, 0.5, 0.0909091),
    "jensen_shannon": (0.0909091, 0.5, 0.9090909),
    "squared_hellinger": (0.0790569, 0.25, 0.7905694),
    "forward_kl": (0.1, 1, 10),
    "jeffreys": (1.1, 2, 11),
}
LOG_RATIO = torch.linspace(-4, 4, 41, dtype=torch.float64)


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_the_weight_is_the_squared_ratio_times_the_second_derivative(name):
    r = LOG_RATIO.exp().requires_grad_()
    (slope,) = torch.autograd.grad(GENERATORS[name](r).sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    expected = (r.detach() ** 2) * curvature
    assert ((weight(name, LOG_RATIO) - expected) / expected).abs().max() < 1e-9


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_the_weights_at_three_ratios_are_those_of_the_table(name):
    found = weight(name, torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64).log())
    assert found.tolist() == pytest.approx(TABLE[name], abs=1e-7)


def test_jensen_shannon_and_softened_reverse_kl_share_one_unit_of_weight():
    total = weight("jensen_shannon", LOG_RATIO) + weight("softened_reverse_kl", LOG_RATIO)
    assert (total - 1).abs().max() < 1e-15


def test_jeffreys_is_the_sum_of_both_kl_divergences():
    total = weight("reverse_kl", LOG_RATIO) + weight("forward_kl", LOG_RATIO)
    assert torch.equal(weight("jeffreys", LOG_RATIO), total)


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_the_gradient_of_the_divergence_between_gaussians_is_the_weighted_score_difference(name):
    """d D_f / d mu_q = E_q[h(r) * (score_q - score_p) * dx/dmu] for p = N(0.3, 1.2**2), q = N(mu, 0.9**2), by quadrature."""
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)

    def log_density(mean, std):
        return -0.5 * ((x - mean) / std) ** 2 - torch.log(torch.as_tensor(std, dtype=torch.float64)) - 0.5 * math.log(2 * math.pi)

    mean = torch.tensor(-0.2, dtype=torch.float64, requires_grad=True)
    log_p, log_q = log_density(0.3, 1.2), log_density(mean, 0.9)
    inner = (x > -8) & (x < 8)  # the rest weighs less than 1e-9, and its ratios overflow
    divergence = torch.trapezoid((log_q.exp() * GENERATORS[name]((log_p - log_q).exp()))[inner], x[inner])
    (slope,) = torch.autograd.grad(divergence, mean)
    scores = -(x - mean.detach()) / 0.9**2 + (x - 0.3) / 1.2**2
    weighted = log_q.detach().exp() * weight(name, (log_p - log_q).detach()) * scores
    assert torch.trapezoid(weighted[inner], x[inner]).item() == pytest.approx(slope.item(), abs=1e-6)


def test_an_unknown_divergence_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="jensen_shannon"):
        weight("js", torch.zeros(1))


def test_a_ratio_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="nan"):
        weight("forward_kl", torch.tensor([0.0, math.nan]))
