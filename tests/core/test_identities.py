"""Identities between samplers, surrogates and other people's formulas, exact in float64."""

import math

import pytest
import torch

from flowalign.core.kernels import CPS, DDIM, DanceSDE, Euler, FlowSDE, gaussian_kl, gaussian_log_prob, sample
from flowalign.core.links import linear, on_policy_ratio, ppo_clip
from flowalign.core.paths import flow_to_vp, interpolate, velocity_to_noise, velocity_to_score, velocity_to_x0, vp_sigma, vp_to_flow
from flowalign.core.schedules import flow_sigmas, flux_mu, flux_sigmas, linear_sigmas
from flowalign.core.surrogates import WEIGHTINGS, matching_score, transition_score
from flowalign.core.worlds import GaussianWorld

KERNELS = [FlowSDE(0.7), DanceSDE(0.3), DDIM(1.0), DDIM(0.4), CPS(0.8)]


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run_variance(kernel, std, sigmas, start=None):
    """Variance at the end of the grid for N(0, std**2) data: every step is linear in x."""
    one, now, then = torch.ones(len(sigmas) - 1, dtype=torch.float64), sigmas[:-1], sigmas[1:]
    step = kernel(one, GaussianWorld(0.0, std).velocity(one, now), now, then)  # all steps at once: one row each
    variance = 1.0 if start is None else start
    for factor, noise in zip(step.mean.tolist(), step.std.tolist(), strict=True):
        variance = factor**2 * variance + noise**2
    return variance


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (Euler(), (0.1856, 0.2321, 0.2454, 0.2488)),
        (FlowSDE(0.7), (0.2300, 0.2474, 0.2509, 0.2510)),
        (CPS(0.8), (0.1238, None, None, 0.1616)),
    ],
)
def test_final_variances_for_data_of_std_one_half(kernel, expected):
    for steps, variance in zip((10, 40, 160, 640), expected, strict=True):
        if variance is not None:
            assert run_variance(kernel, 0.5, linear_sigmas(steps, dtype=torch.float64)) == pytest.approx(variance, abs=1e-4)


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), DanceSDE(0.3), DDIM(1.0)])
def test_started_below_pure_noise_every_sde_is_of_first_order(kernel):
    world = GaussianWorld(0.0, 1.0)
    errors = []
    for steps in (100, 200, 400):
        sigmas = 0.95 * linear_sigmas(steps, dtype=torch.float64)
        errors.append(run_variance(kernel, 1.0, sigmas, start=world.marginal(0.95)[1].item() ** 2) - 1)
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(("noise_level", "expected"), [(0.7, 1.0600), (0.8, 1.1024), (0.9, 1.1640), (math.sqrt(2), 2.0)])
def test_the_first_step_of_flow_sde_inflates_the_variance_by_a_quarter_of_the_fourth_power(noise_level, expected):
    one = torch.ones(1, dtype=torch.float64)
    step = FlowSDE(noise_level)(one, one, 1.0, 1 - 1e-7)  # v = x for N(0, 1) data
    assert step.mean.item() ** 2 + step.std.item() ** 2 == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("noise_level", "expected"), [(0.8, 0.3956), (0.1, 0.4985)])
def test_cps_has_the_wrong_stationary_variance(noise_level, expected):
    x = torch.ones(1, dtype=torch.float64)
    step = CPS(noise_level)(x, 0 * x, 0.5, 0.5 - 1e-9)
    assert step.std.item() ** 2 / (1 - step.mean.item() ** 2) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kernel", [CPS(0.8), CPS(1.0), DDIM(1.0), DDIM(0.5)])
@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.9), (0.6, 0.3), (0.2, 0.0)])
def test_coefficients_of_data_and_noise_are_preserved(kernel, sigma, sigma_next):
    x0, noise = draw(0, 3, 2), draw(1, 3, 2)
    step = kernel(interpolate(x0, noise, sigma), noise - x0, sigma, sigma_next)
    kept = (step.mean - (1 - sigma_next) * x0) / noise
    assert (kept**2 + step.std**2 - sigma_next**2).abs().max() < 1e-12


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), DanceSDE(0.3)])
def test_the_drift_gains_half_the_squared_diffusion_times_the_score(kernel):
    x, velocity, sigma, sigma_next = draw(2, 4), draw(3, 4), 0.6, 0.45
    d = sigma - sigma_next
    g = 0.7 * math.sqrt(0.6 / 0.4) if isinstance(kernel, FlowSDE) else 0.3
    step = kernel(x, velocity, sigma, sigma_next)
    mean = x - velocity * d + g**2 / 2 * velocity_to_score(velocity, x, sigma) * d
    assert (step.mean - mean).abs().max() < 1e-12
    assert step.std.item() == pytest.approx(g * math.sqrt(d), abs=1e-14)


@pytest.mark.parametrize("kernel", [FlowSDE(0.0), DanceSDE(0.0), DDIM(0.0), CPS(0.0)])
@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.93), (0.7, 0.41), (0.0089, 0.0)])
def test_noise_zero_is_euler_to_the_last_bit(kernel, sigma, sigma_next):
    for dtype in (torch.float32, torch.float64):
        x, velocity = draw(4, 50).to(dtype), draw(5, 50).to(dtype)
        now, then = torch.tensor(sigma, dtype=dtype), torch.tensor(sigma_next, dtype=dtype)
        step = kernel(x, velocity, now, then)
        assert step.std.item() == 0
        assert torch.equal(sample(step, torch.ones_like(x)), Euler()(x, velocity, now, then).mean)


def test_a_level_that_rounding_left_just_below_one_is_pure_noise():
    x, velocity = draw(6, 8).float(), draw(7, 8).float()
    exact = FlowSDE(0.7)(x, velocity, torch.tensor(1.0), torch.tensor(0.96))
    rounded = FlowSDE(0.7)(x, velocity, torch.tensor(1.0 - 2**-24), torch.tensor(0.96))
    assert (exact.mean - rounded.mean).abs().max() < 1e-5
    assert rounded.std.item() == pytest.approx(exact.std.item(), rel=1e-5)


def test_ddim_is_ddpo_in_the_variance_preserving_coordinates():
    abar, abar_prev, eta = 0.3, 0.45, 1.0
    a, b, a_prev, b_prev = math.sqrt(abar), math.sqrt(1 - abar), math.sqrt(abar_prev), math.sqrt(1 - abar_prev)
    x_t, epsilon = draw(8, 5), draw(9, 5)
    std = eta * math.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
    mean = a_prev * (x_t - b * epsilon) / a + math.sqrt(1 - abar_prev - std**2) * epsilon
    velocity = ((a + b) * epsilon - x_t) / a
    step = DDIM(eta)(vp_to_flow(x_t, a, b), velocity, vp_sigma(a, b), vp_sigma(a_prev, b_prev))
    assert (flow_to_vp(step.mean, a_prev, b_prev) - mean).abs().max() < 1e-12
    assert step.std.item() * (a_prev + b_prev) == pytest.approx(std, abs=1e-12)


def test_ddim_is_the_first_order_sde_step_of_dpm_solver():
    t, u = 0.6, 0.45
    h = math.log((1 - u) / u) - math.log((1 - t) / t)
    x, velocity = draw(10, 5), draw(11, 5)
    x0 = velocity_to_x0(velocity, x, t)
    mean = u / t * math.exp(-h) * x + (1 - u) * (1 - math.exp(-2 * h)) * x0
    step = DDIM(1.0)(x, velocity, t, u)
    assert (step.mean - mean).abs().max() < 1e-12
    assert step.std.item() == pytest.approx(u * math.sqrt(1 - math.exp(-2 * h)), abs=1e-12)


def test_euler_is_the_first_order_ode_step_of_dpm_solver():
    t, u = 0.6, 0.45
    h = math.log((1 - u) / u) - math.log((1 - t) / t)
    x, velocity = draw(10, 5), draw(11, 5)
    mean = u / t * x - (1 - u) * (math.exp(-h) - 1) * velocity_to_x0(velocity, x, t)
    assert (Euler()(x, velocity, t, u).mean - mean).abs().max() < 1e-12


def test_small_ddim_steps_have_the_memoryless_diffusion():
    x = torch.zeros(1, dtype=torch.float64)
    found = [DDIM(1.0)(x, x, 0.5, 0.5 - d).std.item() ** 2 / (2 * 0.5 / 0.5 * d) for d in (0.1, 0.01, 0.001)]
    # At d = 0.1 by hand: rho^2 = u^2 (t^2 - a^2 u^2) / t^2 with a = 0.5 / 0.6 is 0.16 (0.25 - 0.1111) / 0.25 = 0.0889, over 0.2.
    assert found == pytest.approx([0.4444, 0.9231, 0.9920], abs=1e-4)


def test_the_ddpo_log_prob_is_score_matching_on_the_noisier_state():
    t, u = 0.5, 0.4
    a = (1 - t) / (1 - u)
    b2 = t**2 - (a * u) ** 2
    x_t, x_u, velocity = draw(12, 9), draw(13, 9), draw(14, 9)
    score, step = transition_score(DDIM(1.0), velocity, x_t, x_u, t, u, reduction="sum")
    rho = step.std.item()
    assert rho == pytest.approx(u * math.sqrt(b2) / t, abs=1e-14)
    constant = -math.log(rho) - 0.5 * math.log(2 * math.pi)
    weight = b2 * t**2 / (2 * a**2 * u**2)
    matching = -weight * (velocity_to_score(velocity, x_t, t) - (a * x_u - x_t) / b2) ** 2
    assert (score - constant - matching).abs().max() < 1e-12


def test_noisy_and_clean_score_targets_share_their_mean_but_not_their_variance():
    t, u, num = 0.5, 0.4, 200_000
    a = (1 - t) / (1 - u)
    b = math.sqrt(t**2 - (a * u) ** 2)
    x0, noise, between = draw(15, num), draw(16, num), draw(17, num)
    x_u = interpolate(x0, noise, u)
    x_t = a * x_u + b * between
    noisy = -between / b
    clean = -(x_t - (1 - t) * x0) / t**2
    exact = GaussianWorld(0.0, 1.0).score(x_t, t)
    assert (exact + 2 * x_t).abs().max() < 1e-12
    residuals = []
    for target in (noisy, clean):
        slope = (target * x_t).mean() / (x_t * x_t).mean()
        assert slope.item() == pytest.approx(-2, abs=0.04)
        residuals.append((target - exact).var().item())
    assert residuals == pytest.approx([5.20, 2.00], rel=0.015)
    kappa = 1 / (t**2 - (a * u) ** 2) - 1 / t**2
    assert kappa == pytest.approx(3.2, abs=1e-12)
    assert residuals[0] - residuals[1] == pytest.approx(kappa, rel=0.03)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_score_of_an_unchanged_model_is_the_recorded_one_to_the_last_bit(kernel):
    x, velocity = draw(18, 6, 3, 2).float(), draw(19, 6, 3, 2).float()
    now, then = torch.tensor(0.6), torch.tensor(0.45)
    step = kernel(x, velocity, now, then)
    x_next = sample(step, draw(20, 6, 3, 2).float())
    recorded = gaussian_log_prob(x_next, step.mean, step.std, reduction="mean")
    score, again = transition_score(kernel, velocity, x, x_next, now.expand(6), then.expand(6), reduction="mean")
    assert torch.equal(score, recorded)
    assert gaussian_kl(again.mean, step.mean, step.std, reduction="mean").max() == 0


def test_the_first_update_has_loss_zero_and_a_gradient():
    x, velocity = draw(21, 6, 4), draw(22, 6, 4).requires_grad_()
    kernel, advantage = FlowSDE(0.7), torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0], dtype=torch.float64)
    step = kernel(x, velocity.detach(), 0.6, 0.45)
    x_next = sample(step, draw(23, 6, 4))
    score, _ = transition_score(kernel, velocity, x, x_next, 0.6, 0.45, reduction="mean")
    loss = ppo_clip(score - score.detach(), advantage, clip=1e-4).mean()
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, velocity)
    assert gradient.abs().min() > 0


def test_gradient_of_a_transition_score_flows_through_the_velocity_alone():
    x, x_next, velocity = (draw(seed, 2, 3).requires_grad_() for seed in (24, 25, 26))
    score, _ = transition_score(FlowSDE(0.7), velocity, x, x_next, 0.6, 0.45, reduction="sum")
    found = torch.autograd.grad(score.sum(), (x, x_next, velocity), allow_unused=True)
    assert found[0] is None
    assert found[1] is None
    assert found[2].abs().min() > 0


def test_without_its_quadratic_term_the_log_ratio_is_centred_and_has_one_scale_for_every_std():
    shift, d, rows = 1e-3, 4096, 300
    spreads = []
    for std in (0.3, 0.05):
        mean = torch.zeros(rows, d, dtype=torch.float64)
        x_next = mean + std * draw(27, rows, d)
        log_ratio = gaussian_log_prob(x_next, mean + shift, std, reduction="mean") - gaussian_log_prob(x_next, mean, std, reduction="mean")
        guarded = (log_ratio + gaussian_kl(mean + shift, mean, std, reduction="mean")) * std
        assert abs(guarded.mean().item()) < 4.5 * 1.5625e-5 / math.sqrt(rows)
        spreads.append(guarded.std().item())
    assert spreads == pytest.approx([1.5625e-5, 1.5625e-5], rel=0.13)
    assert spreads[0] == pytest.approx(spreads[1], rel=1e-6)  # the same noise gives the same ratios


def test_rounding_the_stored_state_to_bfloat16_biases_the_ratio_by_the_known_amount():
    state = draw(28, 1, 400_000)
    error = state.bfloat16().double() - state
    assert error.pow(2).mean().item() == pytest.approx(2.76e-6, rel=0.02)
    std = 0.225  # the last trained step of SD3's ten
    mean = state - std * draw(29, 1, 400_000)
    kept = gaussian_log_prob(state, mean, std, reduction="mean")
    rounded = gaussian_log_prob(state.bfloat16().double(), mean, std, reduction="mean")
    cross = (error * (state - mean)).mean().item() / std**2
    assert (rounded - kept).item() + cross == pytest.approx(-2.7e-5, rel=0.03)


def test_a_mean_log_prob_in_float32_is_far_finer_than_the_clip_range():
    x, mean = draw(30, 4, 65_536).float(), torch.zeros(4, 65_536)
    single = gaussian_log_prob(x, mean, 0.9, reduction="mean")
    double = gaussian_log_prob(x.double(), mean.double(), 0.9, reduction="mean")
    assert (single - double).abs().max() < 2e-7


@pytest.mark.parametrize("name", list(WEIGHTINGS))
def test_the_on_policy_ratio_of_any_weighting_has_the_gradient_of_the_linear_link(name):
    x0, noise, advantage = draw(31, 5, 3), draw(32, 5, 3), draw(33, 5)
    velocity, sigma = draw(34, 5, 3).requires_grad_(), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    score = matching_score(velocity, noise, x0, sigma, weighting=WEIGHTINGS[name])
    slopes = [torch.autograd.grad(link(score, advantage).mean(), velocity, retain_graph=True)[0] for link in (linear, on_policy_ratio)]
    assert (slopes[0] - slopes[1]).abs().max() < 1e-14
    clipped = torch.autograd.grad(ppo_clip(score - score.detach(), advantage, clip=1.0).mean(), velocity)[0]
    assert (slopes[0] - clipped).abs().max() < 1e-14


def test_taking_the_ratio_before_or_after_averaging_levels_is_the_same_on_policy():
    x0, noise, velocity = draw(35, 6, 3), draw(36, 6, 3), draw(37, 6, 3).requires_grad_()
    advantage = draw(38, 2)
    score = matching_score(velocity, noise, x0, 0.4, weighting=WEIGHTINGS["ghuber"]).view(2, 3)
    first = on_policy_ratio(score.flatten(), advantage.repeat_interleave(3)).mean()
    last = on_policy_ratio(score.mean(1), advantage).mean()
    first_slope, last_slope = (torch.autograd.grad(loss, velocity, retain_graph=True)[0] for loss in (first, last))
    assert (first_slope - last_slope).abs().max() < 1e-14


def test_the_huber_scores_have_the_released_formulas():
    velocity, sigma = torch.tensor([[3.0, 1.0]], dtype=torch.float64), 0.3
    zero, mse = torch.zeros(1, 2, dtype=torch.float64), 5.0
    huber = matching_score(velocity, zero, zero, sigma, weighting=WEIGHTINGS["huber"]).item()
    ghuber = matching_score(velocity, zero, zero, sigma, weighting=WEIGHTINGS["ghuber"]).item()
    assert huber == pytest.approx(-(math.sqrt(mse + 1e-10) - 1e-5) * sigma, abs=1e-14)
    assert ghuber == pytest.approx(-((mse + 1e-10) ** 0.25 - 1e-10**0.25) * sigma / 0.25, abs=1e-14)
    assert [matching_score(zero, zero, zero, sigma, weighting=score).abs().item() for score in WEIGHTINGS.values()] == [0.0] * 5


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_half_precision_inputs_are_computed_in_float32(noise_level):
    x, velocity = draw(39, 64).bfloat16(), draw(40, 64).bfloat16()
    low = FlowSDE(noise_level)(x, velocity, 0.6, 0.45)
    high = FlowSDE(noise_level)(x.double(), velocity.double(), 0.6, 0.45)
    assert low.mean.dtype == torch.float32
    assert (low.mean - high.mean).abs().max() < 1e-6


def test_the_flux_grid_is_the_published_one():
    expected = torch.tensor([1, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0], dtype=torch.float64)
    assert (flux_sigmas(6, mu=flux_mu(1024), dtype=torch.float64) - expected).abs().max() < 1e-4
    sigmas = flux_sigmas(10, mu=1.15, dtype=torch.float64)
    x = torch.zeros(9, dtype=torch.float64)
    assert 1 / FlowSDE(0.9)(x, x, sigmas[:9], sigmas[1:10]).std.mean().item() == pytest.approx(1.726, abs=1e-3)  # TempFlow's 1.73


def test_the_mean_of_the_sd3_stds_is_the_inverse_of_tempflows_constant():
    sigmas = flow_sigmas(10, dtype=torch.float64)
    x = torch.zeros(9, dtype=torch.float64)
    assert 1 / FlowSDE(0.7)(x, x, sigmas[:9], sigmas[1:10]).std.mean().item() == pytest.approx(2.252, abs=1e-3)


def test_gradient_scale_times_std_is_the_response_of_the_mean():
    sigmas = flow_sigmas(10, dtype=torch.float64)
    x, zero, one = (torch.full((9,), value, dtype=torch.float64) for value in (0.4, 0.0, 1.0))
    step, moved = (FlowSDE(0.7)(x, velocity, sigmas[:9], sigmas[1:10]) for velocity in (zero, one))
    response = (moved.mean - step.mean).abs()
    assert (response / step.std).tolist() == pytest.approx([0.057, 0.078, 0.129, 0.188, 0.264, 0.371, 0.536, 0.825, 1.487], abs=6e-4)
    assert response.tolist() == pytest.approx([0.040, 0.058, 0.069, 0.084, 0.103, 0.131, 0.171, 0.233, 0.335], abs=6e-4)


def test_noise_and_data_predictions_add_up_to_the_state():
    x, velocity = draw(41, 4, 2), draw(42, 4, 2)
    sigma = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64)
    again = interpolate(velocity_to_x0(velocity, x, sigma), velocity_to_noise(velocity, x, sigma), sigma)
    assert (again - x).abs().max() < 1e-12
