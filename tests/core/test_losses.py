import pytest
import torch

from flowalign.core.decays import constant, ema_warmup, linear
from flowalign.core.links import clipped_mask, on_policy_ratio, ppo_clip
from flowalign.core.links import linear as linear_link
from flowalign.core.paths import interpolate
from flowalign.core.penalties import scaled_kernel_kl, velocity_mse
from flowalign.core.surrogates import WEIGHTINGS, matching_score


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    x0, noise = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    sigma = torch.rand(6, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    advantage = torch.randn(6, generator=generator, dtype=torch.float64)
    velocity = interpolate(x0, noise, sigma) @ weight
    return weight, velocity, x0, noise, sigma, advantage


def gradient(loss, weight):
    return torch.autograd.grad(loss, weight, retain_graph=True)[0]


def test_awm_with_advantage_one_is_flow_matching(problem):
    weight, velocity, x0, noise, sigma, _ = problem
    score = matching_score(velocity, noise, x0, sigma, weighting=WEIGHTINGS["uniform"])
    ours = gradient(linear_link(score, torch.ones(6, dtype=torch.float64)).mean(), weight)
    theirs = gradient((velocity - (noise - x0)).square().mean(), weight)
    assert (ours - theirs).abs().max() < 1e-12


def test_the_on_policy_ratio_has_the_gradient_of_the_linear_link(problem):
    weight, velocity, x0, noise, sigma, advantage = problem
    score = matching_score(velocity, noise, x0, sigma, weighting=WEIGHTINGS["ghuber"])
    difference = gradient(on_policy_ratio(score, advantage).mean(), weight) - gradient(linear_link(score, advantage).mean(), weight)
    assert difference.abs().max() < 1e-12


def test_ghuber_is_a_reweighted_matching_error(problem):
    weight, velocity, x0, noise, sigma, advantage = problem
    mse = (velocity - (noise - x0)).square().mean(1)
    fixed = (sigma * (mse + 1e-10) ** (0.25 - 1)).detach()
    ours = gradient(linear_link(matching_score(velocity, noise, x0, sigma, weighting=WEIGHTINGS["ghuber"]), advantage).mean(), weight)
    assert (ours - gradient((advantage * fixed * mse).mean(), weight)).abs().max() < 1e-12


@pytest.mark.parametrize(("name", "factor"), [("sigma", lambda s: s), ("sigma_squared", lambda s: s**2)])
def test_weightings_multiply_the_error(problem, name, factor):
    _, velocity, x0, noise, sigma, _ = problem
    mse = (velocity - (noise - x0)).square().mean(1)
    assert (matching_score(velocity, noise, x0, sigma, weighting=WEIGHTINGS[name]) + factor(sigma) * mse).abs().max() < 1e-12


def test_awm_and_nft_and_dgpo_take_the_same_first_step(problem):
    weight, velocity, x0, noise, sigma, advantage = problem
    advantage = advantage.clamp(-1, 1)
    old, target = velocity.detach(), noise - x0
    awm = gradient((advantage * (velocity - target).square().mean(1)).mean(), weight)
    for beta in (0.3, 1.0):
        plus, minus = beta * velocity + (1 - beta) * old, (1 + beta) * old - beta * velocity
        r = 0.5 + 0.5 * advantage
        nft = (r * (plus - target).square().mean(1) + (1 - r) * (minus - target).square().mean(1)) / beta
        assert (gradient(nft.mean(), weight) - awm).abs().max() < 1e-12
    mse = (velocity - target).square().mean(1)
    share = torch.sigmoid((advantage * (mse - mse.detach())).mean()).detach()
    assert (gradient((share * advantage * mse).mean(), weight) - 0.5 * awm).abs().max() < 1e-12


def test_ppo_clips_exactly_the_four_known_cases():
    ratio = torch.tensor([1.2, 0.8, 1.2, 0.8], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    loss = ppo_clip(ratio.log(), advantage, clip=0.1)
    assert loss.tolist() == pytest.approx([-1.1, 0.9, 1.2, -0.8])
    (slope,) = torch.autograd.grad(loss.sum(), ratio)
    assert slope.tolist() == pytest.approx([0, 0, 1, -1])
    assert clipped_mask(ratio.detach().log(), advantage, clip=0.1).tolist() == [True, True, False, False]


def test_at_ratio_one_ppo_is_the_plain_policy_gradient():
    log_ratio = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (slope,) = torch.autograd.grad(ppo_clip(log_ratio, advantage, clip=1e-4).sum(), log_ratio)
    assert slope.tolist() == pytest.approx((-advantage).tolist())


def test_penalties_are_in_their_stated_units():
    a, b = torch.zeros(2, 3), torch.full((2, 3), 0.2)
    assert velocity_mse(a, b).tolist() == pytest.approx([0.04, 0.04])
    scaled = scaled_kernel_kl(a, b, torch.tensor(0.5), torch.tensor([0.6, 0.9]), torch.tensor([0.5, 0.7]), reduction="mean")
    assert scaled.tolist() == pytest.approx([0.08 * 0.1, 0.08 * 0.2], rel=1e-5)


def test_decays_are_the_published_schedules():
    assert [linear(0.001, 0.5)(step) for step in (0, 1, 100, 500, 1000)] == pytest.approx([0, 0.001, 0.1, 0.5, 0.5])
    assert [linear(0.001, 0.3)(step) for step in (1, 100, 300)] == pytest.approx([0.001, 0.1, 0.3])
    warm = [ema_warmup(0.9)(step) for step in (0, 7, 15, 31, 79, 80)]
    assert warm == pytest.approx([0.1, 0.4706, 0.64, 0.7805, 0.8989, 0.9], abs=1e-4)
    assert constant(1.0)(10) == 1.0
    with pytest.raises(ValueError, match="decay"):
        constant(1.5)
