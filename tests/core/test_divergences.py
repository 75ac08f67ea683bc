import math

import mpmath
import pytest
import torch

from flowalign.core.divergences import DIVERGENCES, curvature, generator, names, pull, slope, weight
from flowalign.estimators.links import link

ALL = names(unsuitable=True)
# The definitions, at any precision.
GENERATORS = {
    "reverse_kl": lambda r: -mpmath.log(r),
    "softened_reverse_kl": lambda r: (r + 1) * mpmath.log(mpmath.mpf(1) / 2 + 1 / (2 * r)),
    "jensen_shannon": lambda r: r * mpmath.log(r) - (r + 1) * mpmath.log((r + 1) / 2),
    "squared_hellinger": lambda r: 1 - mpmath.sqrt(r),
    "forward_kl": lambda r: r * mpmath.log(r),
    "jeffreys": lambda r: (r - 1) * mpmath.log(r),
    "neyman_chi_squared": lambda r: (1 - r) ** 2 / r,
    "pearson_chi_squared": lambda r: (r - 1) ** 2,
}
TABLE = {
    "reverse_kl": (1, 1, 1),
    "softened_reverse_kl": (0.9090909, 0.5, 0.0909091),
    "jensen_shannon": (0.0909091, 0.5, 0.9090909),
    "squared_hellinger": (0.0790569, 0.25, 0.7905694),
    "forward_kl": (0.1, 1, 10),
    "jeffreys": (1.1, 2, 11),
    "neyman_chi_squared": (20, 2, 0.2),
    "pearson_chi_squared": (0.02, 2, 200),
}
SHORT = dict(rkl="reverse_kl", srkl="softened_reverse_kl", js="jensen_shannon", sh="squared_hellinger", kl="forward_kl", jef="jeffreys")
TABLED = SHORT | {"chi": "pearson_chi_squared"}
# (mean p, std p, mean q, std q): divergence and its derivatives in the mean and std of q, for each name.
GAUSSIANS = {
    (0, 1, 0.5, 1): """rkl .12500000 .50000000 0  srkl .06437740 .26473649 .05881588  js .06062260 .23526351 -.05881588
        sh .03076677 .12115415 -.03028854  kl .12500000 .50000000 -.25000000  jef .25000000 1.00000000 -.25000000
        chi .28402542 1.28402542 -1.28402542""",
    (0, 1, 1, 1.5): """rkl .71953489 1.00000000 .83333333  srkl .52095470 .76162513 .76729602  js .19858019 .23837487 .06603731
        sh .11036537 .13686687 .05088640  kl .34990955 .44444444 .07407407  jef 1.06944444 1.44444444 .90740741""",
    (0, 1, 2, 0.7): """rkl 2.10167494 2.00000000 -.72857143  srkl 1.27439862 1.53144814 -.15774303  js .82727632 .46855186 -.57082840
        sh .50455200 .33251543 -.43356123  kl 4.24536587 4.08163265 -13.14868805  jef 6.34704082 6.08163265 -13.87725948""",
    (1, 2, -1, 1): """rkl .81814718 -.50000000 -.75000000  srkl .37017963 -.26503081 -.34955866  js .44796755 -.23496919 -.40044134
        sh .26770495 -.14645901 -.27827212  kl 2.80685282 -2.00000000 -7.00000000  jef 3.62500000 -2.50000000 -7.75000000""",
}
VARIANCES = {  # Var_q[h] / E_q[h]**2 for p = N(0, 1), q = N(d, 1), in the order of SHORT
    0.5: (0, 0.04947, 0.06264, 0.06449, 0.28403, 0.07101),
    1.0: (0, 0.11203, 0.25637, 0.28403, 1.71828, 0.42957),
    2.0: (0, 0.10295, 1.2242, 1.71828, 53.598, 13.3995),
    3.0: (0, 0.04872, 4.0699, 8.48774, 8102.1, 2025.5),
}


def gaussian_cases():
    for world, text in GAUSSIANS.items():
        words = text.split()
        for name, *numbers in zip(*[iter(words)] * 4, strict=True):
            yield pytest.param(world, TABLED[name], [float(number) for number in numbers], id=f"{world}-{name}")


def log_density(x, mean, std):
    return -0.5 * ((x - mean) / std) ** 2 - torch.log(torch.as_tensor(std, dtype=torch.float64)) - 0.5 * math.log(2 * math.pi)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("order", "function"), [(0, generator), (1, slope), (2, curvature)], ids=["f", "slope", "curvature"])
def test_f_and_its_derivatives_are_right_from_ratios_of_e60_to_e_minus_60(name, order, function):
    log_ratio = [-60.0, -44.5, -21.0, -3.0, -0.5, 0.3, 1.0, 7.0, 21.0, 44.5, 60.0]
    found = function(name, torch.tensor(log_ratio, dtype=torch.float64)).tolist()
    with mpmath.workdps(250):
        for place, value in zip(log_ratio, found, strict=True):
            r = mpmath.exp(mpmath.mpf(place))
            expected = mpmath.diff(GENERATORS[name], r, order, h=r * mpmath.mpf(10) ** -60) if order else GENERATORS[name](r)
            assert abs(value - expected) <= 2e-13 * abs(expected), (place, value, float(expected))


@pytest.mark.parametrize("name", ALL)
def test_f_is_0_where_student_and_teacher_agree_and_convex_everywhere(name):
    assert generator(name, torch.zeros(1)).item() == 0
    assert (curvature(name, torch.linspace(-60, 60, 121, dtype=torch.float64)) > 0).all()


@pytest.mark.parametrize("name", ALL)
def test_the_weight_is_the_squared_ratio_times_the_curvature(name):
    log_ratio = torch.linspace(-60, 60, 241, dtype=torch.float64)
    expected = torch.exp(2 * log_ratio) * curvature(name, log_ratio)
    assert ((weight(name, log_ratio) - expected) / expected).abs().max() < 1e-13


@pytest.mark.parametrize("name", ALL)
def test_the_pull_is_f_minus_r_times_its_slope_and_falls_by_the_weight(name):
    log_ratio = torch.linspace(-6, 6, 49, dtype=torch.float64, requires_grad=True)
    found = pull(name, log_ratio)
    parts = generator(name, log_ratio), log_ratio.exp() * slope(name, log_ratio)
    assert (found - (parts[0] - parts[1])).abs().max() < 1e-12 * max(part.abs().max().item() for part in parts)
    (falls,) = torch.autograd.grad(found.sum(), log_ratio)
    assert torch.allclose(-falls, weight(name, log_ratio.detach()), rtol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_the_weights_at_three_ratios_are_those_of_the_table(name):
    found = weight(name, torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64).log())
    assert found.tolist() == pytest.approx(TABLE[name], abs=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_float32_weights_are_those_of_float64_as_far_as_its_range_goes(name):
    log_ratio = torch.linspace(-60, 60, 241)
    exact = weight(name, log_ratio.double())
    holds = exact < torch.finfo(torch.float32).max
    found = weight(name, log_ratio)
    assert found.dtype == torch.float32
    assert torch.allclose(found[holds].double(), exact[holds], rtol=1e-4)
    assert bool(holds.all()) == (name != "pearson_chi_squared")
    assert torch.isinf(found[~holds]).all()


def test_weights_of_half_precision_ratios_are_not_rounded_to_half_precision():
    log_ratio = torch.tensor([0.1, 3.0], dtype=torch.bfloat16)
    assert torch.equal(weight("jensen_shannon", log_ratio), torch.sigmoid(log_ratio.float()))


@pytest.mark.parametrize("name", ALL)
def test_bounded_weights_are_bounded_and_the_others_are_not(name):
    largest = weight(name, torch.tensor([-60.0, 60.0], dtype=torch.float64)).max()
    assert DIVERGENCES[name].is_bounded == (largest <= 1) == (largest < 1e8)


def test_only_the_chi_squares_are_unsuitable_and_they_say_why():
    assert set(ALL) - set(names()) == {"neyman_chi_squared", "pearson_chi_squared"}
    assert all(len(DIVERGENCES[name].unsuitable) > 20 for name in set(ALL) - set(names()))


@pytest.mark.parametrize("function", [generator, slope, curvature, weight, pull])
def test_jensen_shannon_with_softened_reverse_kl_and_reverse_with_forward_kl_add_up(function):
    """Up to a multiple of r - 1, which no divergence sees, js + srkl = rkl, and rkl + kl = jeffreys."""
    log_ratio = torch.linspace(-4, 4, 41, dtype=torch.float64)
    js, srkl, rkl, kl, jeffreys = (function(SHORT[name], log_ratio) for name in ("js", "srkl", "rkl", "kl", "jef"))
    assert (js + srkl - rkl).abs().max() < 1e-12
    assert (rkl + kl - jeffreys).abs().max() < 1e-12


@pytest.mark.parametrize(("world", "name", "expected"), list(gaussian_cases()))
def test_divergences_between_gaussians_and_their_weighted_gradients_are_the_exact_ones(world, name, expected):
    """E_q[h (score_q - score_p) dx] with x = mean + std z, against closed forms and finite differences of the specification's table."""
    mean_p, std_p, mean_q, std_q = world
    z = torch.linspace(-14 * max(1, std_p / std_q), 14 * max(1, std_p / std_q), 40_001, dtype=torch.float64)
    x = mean_q + std_q * z
    log_q = log_density(x, mean_q, std_q)
    log_ratio = log_density(x, mean_p, std_p) - log_q

    def mean(values):  # over q; where q underflows so does the product with every weight
        return torch.trapezoid(torch.nan_to_num(values * log_q.exp()), x).item()

    scores = -(x - mean_q) / std_q**2 + (x - mean_p) / std_p**2
    weighted = weight(name, log_ratio) * scores
    assert [mean(generator(name, log_ratio)), mean(weighted), mean(weighted * z)] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("distance", list(VARIANCES))
def test_the_relative_variance_of_the_weights_orders_the_divergences_as_published(distance):
    z = torch.linspace(-14, 14, 28_001, dtype=torch.float64)
    density = log_density(z, 0.0, 1.0).exp()
    log_ratio = log_density(z + distance, 0.0, 1.0) - log_density(z, 0.0, 1.0)
    for name, expected in zip(SHORT.values(), VARIANCES[distance], strict=True):
        h = weight(name, log_ratio)
        first, second = (torch.trapezoid(density * power, z).item() for power in (h, h * h))
        assert second / first**2 - 1 == pytest.approx(expected, rel=1e-3, abs=1e-9), name


@pytest.mark.parametrize(
    ("name", "linked"),
    [("reverse_kl",) * 2, ("forward_kl",) * 2, ("jensen_shannon",) * 2, ("pearson_chi_squared", "chi_square")],
)
def test_the_links_of_preference_objectives_are_the_pulls_seen_from_the_policy(name, linked):
    """With u = policy / target = 1 / r the divergence is E_target[g(u)], g(u) = u f(1 / u); a link is g'(u), by finite differences."""
    u = torch.linspace(0.2, 5, 25, dtype=torch.float64)

    def g(value):
        return value * generator(name, -value.log())

    step = 1e-5
    difference = (g(u + step) - g(u - step)) / (2 * step)
    assert torch.allclose(link(linked, u.log()), difference, rtol=1e-7, atol=1e-8)
    assert torch.equal(link(linked, u.log()), pull(name, -u.log()))


def test_an_unknown_divergence_is_answered_with_the_known_ones_and_the_nearest():
    with pytest.raises(ValueError, match="jensen_shannon"):
        weight("js", torch.zeros(1))
    with pytest.raises(ValueError, match="did you mean 'squared_hellinger'"):
        weight("hellinger", torch.zeros(1))


@pytest.mark.parametrize("function", [generator, slope, curvature, weight, pull])
def test_a_ratio_that_is_not_a_number_is_refused(function):
    with pytest.raises(ValueError, match="nan"):
        function("forward_kl", torch.tensor([0.0, math.nan]))
