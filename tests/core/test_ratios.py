import inspect
import math
import warnings
from statistics import NormalDist

import pytest
import torch

from flowalign.core.adversarial import accuracy, approximate_r1, discriminator_loss, generator_loss
from flowalign.core.divergences import names
from flowalign.core.paths import interpolate
from flowalign.core.ratios import (
    RatioWeights,
    bins_of,
    density_weights,
    effective_sample_size,
    is_calibrated,
    log_ratio_of,
    quantile_edges,
    start_calibration,
)
from flowalign.core.worlds import GaussianWorld

LOGITS = torch.tensor([[0.0, 0], [2, 0], [-4, -4], [12, 8]])
BINS = torch.tensor([0, 0, 1, 1])
# h of the released code's arithmetic for LOGITS in two bins, decay 0.5; it divides by the mean plus 1e-6.
WEIGHTS = {
    "reverse_kl": (1, 1, 1, 1),
    "forward_kl": (0.448477, 1.219086, 0.011604, 2.320830),
    "jensen_shannon": (0.881233, 1.403110, 0.038063, 1.677586),
    "softened_reverse_kl": (1.104084, 0.646708, 1.843044, 0.406156),
    "squared_hellinger": (0.786716, 1.297076, 0.126548, 1.789657),
    "jeffreys": (0.663937, 1.133497, 0.397734, 1.804830),
}


def weights_of(name="jensen_shannon", logits=LOGITS, bins=BINS, calibration=None, **options):
    settings = RatioWeights(divergence=name, **({"num_bins": 2, "decay": 0.5} | options))
    # As the released code begins: with a mean of 1 that counts as much as all batches before.
    start = torch.ones(2, settings.num_bins).double() if calibration is None else calibration
    return density_weights(log_ratio_of(logits), bins, start, settings)


@pytest.mark.parametrize("name", names())
def test_weights_and_bins_are_the_published_ones(name):
    found = weights_of(name)
    assert found.weight.tolist() == pytest.approx(WEIGHTS[name], rel=4e-6, abs=1e-6)  # its two additions of 1e-6
    assert found.calibration[0].tolist() == pytest.approx([1.42957, 5.52500], abs=1e-4)


def test_reverse_kl_is_dmd2_to_the_last_bit_whatever_the_discriminator_says():
    logits = 9 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = weights_of("reverse_kl", logits, torch.arange(64) % 2)
    assert torch.equal(found.weight, torch.ones(64, dtype=torch.float64))


@pytest.mark.parametrize("name", names())
def test_strength_leads_from_dmd2_to_the_divergence_and_the_mean_is_always_1(name):
    assert torch.equal(weights_of(name, strength=0.0).weight, torch.ones(4, dtype=torch.float64))
    whole, half = weights_of(name).weight, weights_of(name, strength=0.5).weight
    assert torch.allclose(half, whole.sqrt() / whole.sqrt().mean())
    assert whole.mean().item() == pytest.approx(1)


@pytest.mark.parametrize("name", names())
def test_two_ranks_of_unequal_size_agree_with_one(name):
    """Each rank sees only its rows; what it gets is its part of the weights of the whole batch."""
    logits = torch.randn(24, 2, generator=torch.Generator().manual_seed(1))
    bins = torch.arange(24) % 3
    parts = (slice(0, 7), slice(7, 24))
    settings = RatioWeights(divergence=name, num_bins=4, decay=0.5)  # the last bin is empty
    whole = density_weights(log_ratio_of(logits), bins, start_calibration(4), settings)
    ranks = _in_step([(log_ratio_of(logits[part]), bins[part]) for part in parts], settings)
    assert torch.allclose(torch.cat([rank.weight for rank in ranks]), whole.weight, rtol=1e-12)
    assert all(torch.allclose(rank.calibration, whole.calibration, rtol=1e-12) for rank in ranks)
    assert whole.calibration[:, 3].tolist() == [1.0, 0.0]
    for rank in ranks:
        for key in ("ratio", "weight_min", "weight_mean", "weight_max", "effective_share", "clipped", "calibrated"):
            assert rank.stats[key] == pytest.approx(whole.stats[key])


def _in_step(batches, settings):
    """Run ranks that wait for each other's sums: each call of `reduce` is answered once the others' terms of the same call are known."""
    known = []

    def run(rank):
        calls = iter(range(99))

        def reduce(x, op="sum"):
            call = next(calls)
            while len(known) <= call:
                known.append({})
            known[call][rank] = x.clone()
            terms = torch.stack(list(known[call].values()))
            return terms.sum(0) if op == "sum" else terms.amax(0)

        return density_weights(*batches[rank], start_calibration(settings.num_bins), settings, reduce=reduce)

    # Terms of a later call depend on the sums of earlier ones: after as many rounds as there are calls nothing changes any more.
    for _ in range(8):
        found = [run(rank) for rank in range(len(batches))]
    return found


def test_a_bins_mean_is_of_what_was_measured_from_the_first_batch_on():
    """A ratio of 0.3 is never taken for one near 1, and a bin that was not seen is not calibrated."""
    settings = RatioWeights(num_bins=2, decay=0.9)
    calibration = start_calibration(2)
    assert not is_calibrated(calibration)
    low = torch.full((8,), 0.3, dtype=torch.float64).log()
    for _ in range(5):
        found = density_weights(low, torch.arange(8) % 2, calibration, settings)
        calibration = found.calibration
        assert calibration[0].tolist() == pytest.approx([0.3, 0.3])
        assert not is_calibrated(calibration)
        assert found.stats["calibrated"] == 0
    half = density_weights(0 * low, torch.zeros(8, dtype=torch.int64), start_calibration(2), settings)
    assert not is_calibrated(half.calibration)
    assert half.stats["calibrated"] == 0.5
    # Batches count as in any running mean: 0.9 to 1 of the next.
    after = density_weights(0 * low, torch.arange(8) % 2, calibration, settings).calibration[0, 0].item()
    known = 1 - 0.9**5
    assert after == pytest.approx((0.9 * known * 0.3 + 0.1 * 1.0) / (0.9 * known + 0.1))


def test_constant_factors_of_the_ratio_and_of_h_change_nothing():
    logits = torch.randn(64, 1, generator=torch.Generator().manual_seed(2)) / 2
    bins = torch.arange(64) % 2
    first = weights_of("forward_kl", logits, bins, decay=0.0).weight
    assert torch.allclose(weights_of("forward_kl", logits + 0.3, bins, decay=0.0).weight, first, rtol=1e-6)


def test_the_mean_ratio_over_the_student_is_1_and_the_clip_hardly_moves_it():
    """Student N(1, 1), teacher N(0, 1): log r is N(-1/2, 1), so E r = 1, E r**2 = e, and the clipped mean is a sum of normal tails."""
    x = 1 + torch.special.ndtri((torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000)
    log_ratio = GaussianWorld(0.0, 1.0).log_prob(x, 0.0) - GaussianWorld(1.0, 1.0).log_prob(x, 0.0)
    assert log_ratio.exp().mean().item() == pytest.approx(1, abs=1e-4)
    settings = RatioWeights(divergence="forward_kl", num_bins=1, decay=0.0)
    found = density_weights(log_ratio, torch.zeros(len(x), dtype=torch.int64), start_calibration(1), settings)
    cdf, low, high = NormalDist().cdf, math.log(0.1), math.log(20)
    clipped = 0.1 * cdf(low + 0.5) + cdf(high - 0.5) - cdf(low - 0.5) + 20 * cdf(-high - 0.5)
    assert found.calibration[0].item() == pytest.approx(clipped, abs=1e-5)
    assert found.stats["clipped"] == pytest.approx(cdf(low + 0.5) + cdf(-high - 0.5), abs=1e-4)
    assert 1 / found.stats["effective_share"] == pytest.approx(2.63, abs=0.01)
    assert is_calibrated(found.calibration)


def test_edges_of_equal_width_crowd_a_karras_schedule_into_one_bin_and_quantiles_do_not():
    """EDM's sigma in [0.002, 80], rho 7, uniform in the index from 0.2 to 99.8 percent."""
    place = torch.linspace(0.002, 0.998, 100_001, dtype=torch.float64)
    noise = (80 ** (1 / 7) + place * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    wide = bins_of(noise, torch.linspace(0.002, 80, 11, dtype=torch.float64)[1:-1])
    shares = torch.bincount(wide, minlength=10) / len(wide)
    assert shares.tolist() == pytest.approx([0.640, 0.096, 0.061, 0.045, 0.037, 0.030, 0.027, 0.023, 0.021, 0.019], abs=2e-3)
    even = bins_of(noise / (1 + noise), quantile_edges(noise / (1 + noise), 10))
    assert (torch.bincount(even, minlength=10) / len(even)).tolist() == pytest.approx([0.1] * 10, abs=1e-4)


def test_the_rungs_of_a_few_step_student_get_a_bin_each():
    rungs = torch.tensor([0.999, 0.937, 0.833, 0.624])
    assert bins_of(rungs, quantile_edges(rungs, 4)).tolist() == [3, 2, 1, 0]
    with pytest.raises(ValueError, match="got 5 for 4 distinct noise levels"):
        quantile_edges(rungs, 5)


@pytest.mark.parametrize(("weight", "size"), [([1, 1, 1, 1], 4), ([5, 0, 0, 0], 1), ([3, 1], 1.6)])
def test_the_effective_sample_size_counts_equal_weights(weight, size):
    assert effective_sample_size(torch.tensor(weight, dtype=torch.float32)) == pytest.approx(size)


def test_a_batch_that_lies_outside_the_clip_is_warned_of_with_what_to_do():
    with pytest.warns(UserWarning, match="most of the batch lies outside .*train the critics alone for longer"):
        found = weights_of(logits=torch.tensor([[-6.0], [-7], [-8], [0.5]]))
    assert found.stats["clipped"] == 0.75
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert weights_of().stats["clipped"] == 0.5


def test_critics_are_calibrated_when_every_bin_is_within_a_factor_of_2():
    for means, expected in (([0.5, 1.0, 2.0], True), ([1.0, 1.0, 2.1], False), ([math.nan, 1.0], False)):
        assert is_calibrated(torch.stack([torch.tensor(means), torch.ones(len(means))])) == expected


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ValueError, match=r"0 < lower < 1 < upper"):
        RatioWeights(lower=2.0)
    with pytest.raises(ValueError, match="unknown|need one of"):
        RatioWeights(divergence="hinge")
    with pytest.warns(UserWarning, match="pearson_chi_squared is not for training"):
        RatioWeights(divergence="pearson_chi_squared")
    with pytest.raises(ValueError, match="the discriminator has diverged"):
        weights_of(logits=torch.full((4, 1), math.nan))
    with pytest.raises(ValueError, match="calibration: has 3 bins, the settings 2"):
        weights_of(calibration=start_calibration(3))
    with pytest.raises(ValueError, match="bins: got one outside 0 to 1"):
        weights_of(bins=BINS + 1)
    with pytest.raises(ValueError, match="4 log-ratios and 2 bins"):
        inspect.unwrap(density_weights)(torch.zeros(4), BINS[:2], start_calibration(2), RatioWeights(num_bins=2))


def test_the_discriminator_loss_is_least_at_the_log_ratio_of_the_noised_densities():
    """The exact optimum for Gaussians at sigma 0.5, over a grid with the densities as weights: the gradient in every logit vanishes there alone."""
    real, student = GaussianWorld(0.0, 1.0), GaussianWorld(1.0, 0.7)
    x = torch.linspace(-6, 6, 601, dtype=torch.float64)
    log_p, log_q = real.log_prob(x, 0.5), student.log_prob(x, 0.5)
    for shift, is_optimal in ((0.0, True), (0.1, False)):
        logits = (log_p - log_q + shift)[:, None].requires_grad_()
        of_real, of_student = discriminator_loss(logits, logits)
        (of_real * log_p.exp() + of_student * log_q.exp()).sum().backward()
        assert (logits.grad.abs().max() < 1e-12) == is_optimal


def test_a_trained_discriminator_finds_the_log_ratio():
    """A quadratic in x can say the log-ratio of Gaussians exactly; sampled, noised to 0.5, and trained with Newton's steps."""
    generator = torch.Generator().manual_seed(3)
    real, student = GaussianWorld(0.0, 1.0), GaussianWorld(0.8, 0.7)

    def noised(world):
        x0 = world.sample(40_000, generator)
        return interpolate(x0, torch.randn(40_000, generator=generator, dtype=torch.float64), 0.5)

    def features(x):
        return torch.stack([x.square(), x, torch.ones_like(x)], 1)

    first, second = features(noised(real)), features(noised(student))
    coefficients = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)

    def loss(c):
        of_real, of_student = discriminator_loss(first @ c, second @ c)
        return of_real.mean() + of_student.mean()

    for _ in range(6):
        (slope,) = torch.autograd.grad(loss(coefficients), coefficients)
        curvature = torch.autograd.functional.hessian(loss, coefficients).reshape(3, 3)
        coefficients = (coefficients - torch.linalg.solve(curvature, slope)).detach().requires_grad_()
    x = torch.linspace(-1.5, 2, 15, dtype=torch.float64)
    exact = real.log_prob(x, 0.5) - student.log_prob(x, 0.5)
    assert ((features(x) @ coefficients).flatten() - exact).abs().max() < 0.1


def test_the_generator_loss_pulls_logits_up_and_r1_sees_only_differences():
    logits = torch.tensor([[0.0, -3.0]], requires_grad=True)
    generator_loss(logits).sum().backward()
    assert logits.grad.flatten().tolist() == pytest.approx([-0.25, -0.5 / (1 + math.exp(-3))])
    assert approximate_r1(logits, logits + 2).tolist() == [4]
    assert accuracy(torch.tensor([[1.0]]), torch.tensor([[-1.0]])) == 1
    with pytest.raises(ValueError, match="needed equal ones"):
        inspect.unwrap(approximate_r1)(torch.zeros(2, 1), torch.zeros(1, 1))
