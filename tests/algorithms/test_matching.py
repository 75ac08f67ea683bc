"""The matching family where it is one: first-step equivalence, NFT's expansion and optimum, DGPO's group sigmoid, DDPO as noisy matching."""

import math

import pytest
import torch

from flowalign.algorithms import awm, ddpo, dgpo, diffusion_nft
from flowalign.core.algorithm import Experience, Update
from flowalign.core.kernels import DDIM, FlowSDE
from flowalign.core.matching_links import group_sigmoid, negative_aware
from flowalign.core.paths import interpolate
from flowalign.core.rollout import Trajectory, Transitions
from flowalign.core.schedules import linear_sigmas
from tests.algorithms.chains import draw

IMAGES, EVENT = 6, (2, 3)
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
ADVANTAGE = torch.tensor([1.5, -0.5, -1.0, 0.25, 4.0, -4.25], dtype=torch.float64)
FIRST = Update(seed=0, step=0, index=0)


def experience(advantage=ADVANTAGE, group=GROUP):
    x0 = draw("x0", (len(group), *EVENT))
    trajectory = Trajectory(x_init=x0, x0=x0, sigmas=linear_sigmas(5, dtype=torch.float64), transitions=Transitions.concatenate([], x0))
    ones = torch.ones(len(group), 1, dtype=torch.float64)
    sample = torch.arange(len(group)) % 3
    return Experience(
        trajectory=trajectory, advantage=advantage[:, None], weight=ones, keep=ones[:, 0] > 0, prompt=9 + group, group=group, sample=sample
    )


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6), torch.nn.Unflatten(1, EVENT)
    ).double()


def gradient(built, rows, net, others=None):
    """Gradient of the mean loss; every other role is the same network unless something else is given."""
    net.zero_grad()

    def velocity(x, sigma, sample, role):
        return net(x) * (1 + sigma[:, None, None]) if role == "current" or others is None else others(x, sigma)

    built.loss("current", rows, velocity).value.mean().backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def weighted_matching(rows, net, weight):
    """Gradient of the mean of A w mse, written out."""
    net.zero_grad()
    level = rows["sigma"][:, None, None]
    prediction = net((1 - level) * rows["x0"] + level * rows["noise"]) * (1 + level)
    mse = (prediction - (rows["noise"] - rows["x0"])).square().flatten(1).mean(1)
    size = (prediction - (rows["noise"] - rows["x0"])).detach().abs().flatten(1).mean(1)
    (rows["advantage"] * weight(rows["sigma"], size) * mse).mean().backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def nft(**changes):
    return diffusion_nft.Config(**{"reference_penalty": 0.0, **changes}).build()


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("weighting", ["uniform", "adaptive"])
def test_nfts_first_step_is_advantage_weighted_matching_whatever_beta(beta, weighting):
    built, net = nft(beta=beta, weighting=weighting), network()
    rows = built.rows(experience(), FIRST)
    # |x0 hat - x0| is sigma times |v - v*|, so the coded weight is sigma^2 / (sigma times the mean size of the velocity's error).
    weight = (lambda sigma, size: 1.0) if weighting == "uniform" else (lambda sigma, size: sigma / size)
    expected = weighted_matching(rows, net, weight)
    assert (gradient(built, rows, net) - expected).abs().max() < 1e-12 * expected.abs().max() + 1e-14
    assert expected.abs().max() > 1e-3


def test_awms_first_step_is_the_same_direction_and_dgpos_is_half_of_it():
    net = network()
    plain = awm.Config(
        weighting="uniform", levels="uniform", num_levels=2, advantage_max=5.0, reference_penalty=0.0, slow_penalty=0.0
    ).build()
    rows = plain.rows(experience(), FIRST)
    expected = weighted_matching(rows, net, lambda sigma, size: 1.0)
    assert (gradient(plain, rows, net) - expected).abs().max() < 1e-12
    group = dgpo.Config(num_levels=2, reference_penalty=0.0).build()
    rows = group.rows(experience(), FIRST)
    expected = weighted_matching(rows, net, lambda sigma, size: 1.0)
    assert (gradient(group, rows, net) - 0.5 * expected).abs().max() < 1e-12
    assert expected.abs().max() > 1e-3


def test_nft_is_matching_weighted_by_the_advantage_and_its_own_quadratic_pull_to_the_old_policy():
    old, new, x0, noise = (draw(name, (5, *EVENT)) for name in ("old", "new", "x0", "noise"))
    sigma, r, beta = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0]).double(), torch.tensor([0.0, 0.3, 0.5, 0.7, 1.0]).double(), 0.7
    x = interpolate(x0, noise, sigma)
    found = negative_aware(new, old, x, x0, noise, sigma, r, beta=beta, scale=beta, weighting="uniform")
    error, change = old - (noise - x0), new - old

    def mean(values):
        return values.flatten(1).mean(1)

    expected = mean(error**2) + 2 * beta * (2 * r - 1) * mean(error * change) + beta**2 * mean(change**2)
    assert (found - expected).abs().max() < 1e-12


def test_a_flat_group_feels_nothing_but_the_pull_to_the_old_policy():
    """All rewards equal: A = 0, r = 1/2, and the gradient is that of beta |v - old|^2 alone."""
    built, net = nft(weighting="uniform", beta=2.0), network()
    rows = built.rows(experience(advantage=torch.zeros(6).double()), FIRST)
    assert gradient(built, rows, net).abs().max() < 1e-14
    others = lambda x, sigma: 0.3 * x  # noqa: E731
    found = gradient(built, rows, net, others)
    net.zero_grad()
    x = interpolate(rows["x0"], rows["noise"], rows["sigma"])
    change = (net(x) * (1 + rows["sigma"][:, None, None]) - 0.3 * x).square().flatten(1).mean(1)
    (5.0 * 2.0 * change).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()


def test_the_optimum_of_nft_is_the_old_velocity_plus_the_weighted_error_over_beta():
    old, x0, noise = draw("o", (1, 4)).expand(64, 4), draw("x", (64, 4)), draw("n", (64, 4))
    sigma, r, beta = torch.full((64,), 0.5).double(), torch.rand(64, generator=torch.Generator().manual_seed(0)).double(), 0.4
    best = old[:1] + ((2 * r - 1)[:, None] * (noise - x0 - old)).mean(0) / beta
    v = best.clone().requires_grad_()
    x = interpolate(x0, noise, sigma)
    loss = negative_aware(v.expand(64, 4), old, x, x0, noise, sigma, r, beta=beta, scale=1.0, weighting="uniform").mean()
    assert torch.autograd.grad(loss, v)[0].abs().max() < 1e-12


def test_nft_samples_with_the_old_policy_and_its_decays_are_the_published_ones():
    built = nft()
    assert built.behaviour == "old"
    assert [built.roles["old"](step) for step in (0, 1, 100, 500, 1000)] == pytest.approx([0, 0.001, 0.1, 0.5, 0.5])
    late = nft(old_rate=0.0075, old_max=0.999, old_start=75).roles["old"]
    assert [late(step) for step in (74, 75, 100, 150, 208, 300)] == pytest.approx([0, 0, 0.1875, 0.5625, 0.9975, 0.999])


def test_nft_trains_every_image_at_different_levels_of_the_grid():
    built = nft()
    seen = set()
    for step in range(20):
        rows = built.rows(experience(), Update(seed=0, step=step, index=0))
        levels = rows["sigma"].view(6, 4)
        assert all(len(set(row)) == 4 for row in levels.tolist())
        seen |= {frozenset(round(level, 3) for level in row) for row in levels.tolist()}
    assert len(seen) == 5  # each leaves out one of the five
    with pytest.raises(ValueError, match="num_levels: got 7, needed 1 to 5"):
        nft(num_levels=7).rows(experience(), FIRST)


def test_dgpos_gradient_is_that_of_the_log_sigmoid_of_the_groups_preference():
    error, reference, advantage = draw("e", (6,)).abs().requires_grad_(), draw("r", (6,)).abs(), ADVANTAGE
    beta, members = 2.0, 3
    group_sigmoid(error, reference, advantage, members=members, beta=beta).sum().backward()
    found = error.grad.clone()
    error.grad = None
    preference = -(beta * advantage * (error - reference)).view(-1, members).mean(1)
    (-torch.nn.functional.logsigmoid(preference) / beta * members).sum().backward()
    assert (found - error.grad).abs().max() < 1e-12


def test_images_of_a_dgpo_group_share_level_and_noise_and_a_micro_batch_holds_whole_groups():
    built = dgpo.Config(num_levels=2).build()
    rows = built.rows(experience(group=torch.tensor([0, 1, 0, 1, 0, 1])), FIRST)
    assert rows.is_grouped
    for part in rows.split(4):
        assert len(part) == 3
        assert (part["noise"] == part["noise"][0]).all()
        assert (part["sigma"] == part["sigma"][0]).all()
        assert len(torch.unique(part.sample % 2)) == 1
    assert len({float(level) for level in rows["sigma"].view(2, 2, 3)[0, :, 0]}) == 2


def test_dgpo_leaves_an_image_alone_that_has_gone_far_enough_since_the_rollout():
    built, net = dgpo.Config(num_levels=2, num_epochs=2, clip=1e-6, reference_penalty=0.0).build(), network()
    assert set(built.roles) == {"reference", "old"}
    rows = built.rows(experience(), FIRST)
    loss = built.loss("current", rows, lambda x, s, i, role: net(x) if role == "current" else 0.1 * x)
    change = (0.1 * interpolate(rows["x0"], rows["noise"], rows["sigma"]) - (rows["noise"] - rows["x0"])).square().flatten(1).mean(1)
    now = (net(interpolate(rows["x0"], rows["noise"], rows["sigma"])) - (rows["noise"] - rows["x0"])).square().flatten(1).mean(1)
    beyond = ((change - now) * rows["advantage"] > 0) & ((change - now).abs() > 2e-6)
    assert torch.equal(loss.metrics["clip_fraction"].bool(), beyond)
    assert 0 < int(beyond.sum()) < len(beyond)


@pytest.mark.parametrize(("against", "told"), [("reference", {"reference"}), ("ema", {"ema"})])
def test_dgpos_preference_is_against_what_it_is_told(against, told):
    built, net = dgpo.Config(num_levels=2, against=against, reference_penalty=0.0).build(), network()
    assert set(built.roles) == told
    rows = built.rows(experience(), FIRST)
    share = {"reference": 0.1, "ema": 0.3}
    found = built.loss("current", rows, lambda x, s, i, role: net(x) if role == "current" else share[role] * x).metrics["preference"]
    x, target = interpolate(rows["x0"], rows["noise"], rows["sigma"]), rows["noise"] - rows["x0"]
    errors = [(said - target).square().flatten(1).mean(1) for said in (share[next(iter(told))] * x, net(x))]
    assert torch.allclose(found, rows["advantage"] * (errors[0] - errors[1]), rtol=1e-10)


def test_ddpo_is_matching_towards_a_noisy_target_row_by_row():
    """For DDIM with eta 1: -(x_u - mu)^2 / (2 rho^2) = -lam (score - target)^2, exactly, for any states and velocities."""
    t, u = 0.5, 0.4
    x, x_u, velocity = (draw(name, (50, 1)) for name in ("x", "xu", "v"))
    step = DDIM(1.0)(x, velocity, t, u)
    a, rho = (1 - t) / (1 - u), float(step.std)
    b2 = t * t - a * a * u * u
    assert rho == pytest.approx(u * math.sqrt(b2) / t, abs=1e-12)
    score = -(x + (1 - t) * velocity) / t
    lam = b2 * t * t / (2 * a * a * u * u)
    left, right = -((x_u - step.mean) ** 2) / (2 * rho**2), -lam * (score - (a * x_u - x) / b2) ** 2
    assert (left - right).abs().max() < 1e-10
    # The noisy target's conditional variance exceeds the clean one's by kappa = 3.2.
    assert 1 / b2 - 1 / t**2 == pytest.approx(3.2)


def test_flow_grpo_is_regression_to_the_old_velocity_plus_scaled_noise():
    t, u, level = 0.5, 0.4, 0.7
    x, old, new, noise = (draw(name, (50, 1)) for name in ("x", "o", "v", "n"))
    kernel = FlowSDE(level)
    before, after = kernel(x, old, t, u), kernel(x, new, t, u)
    x_u = before.mean + before.std * noise
    s = level * math.sqrt(t / (1 - t))
    c = -(t - u) * (1 + s * s * (1 - t) / (2 * t))
    target = old + float(before.std) / c * noise
    left = -((x_u - after.mean) ** 2) / (2 * float(before.std) ** 2)
    assert (left + c * c / (2 * float(before.std) ** 2) * (new - target) ** 2).abs().max() < 1e-10
    assert c * c / (2 * float(before.std) ** 2) == pytest.approx(0.158166, abs=1e-6)


def test_ddpo_trains_ddim_with_full_noise_and_refuses_another_kernel():
    built = ddpo.Config().build()
    assert built.kernel == DDIM(1.0)
    assert built.plan(0, 10).trained == tuple(range(9))
    assert built.roles == {}
    with pytest.raises(ValueError, match="got flow_sde, but ddpo is the policy gradient of DDIM's transitions; for others use flow_grpo"):
        ddpo.Config(kernel="flow_sde").build()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: diffusion_nft.Config(beta=0.0), "beta and advantage_clip must be positive"),
        (lambda: dgpo.Config(level_fraction=0.0), r"level_fraction in \(0, 1\]"),
        (lambda: dgpo.Config(num_levels=4).build().rows(experience(), FIRST), "4 levels do not fit into the 3 first steps"),
        (lambda: dgpo.Config(num_levels=2).build().rows(experience(group=torch.tensor([0, 0, 0, 1, 1, 0])), FIRST), "needed equal ones"),
    ],
)
def test_what_cannot_be_trained_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_optimum_of_awm_is_the_weighted_mean_of_targets_reference_and_slow_copy():
    """v = (A v* + beta v_ref + b v_ema) / (A + beta + b) for every row whose sum is positive (the specification's closed form)."""
    built = awm.Config(
        weighting="uniform", levels="uniform", num_levels=2, advantage_max=5.0, reference_penalty=0.4, slow_penalty=0.7
    ).build()
    rows = built.rows(experience(ADVANTAGE.abs()), FIRST)
    target = rows["noise"] - rows["x0"]
    others = {"reference": draw("reference", target.shape), "ema": draw("ema", target.shape)}
    size = rows["advantage"].view(-1, 1, 1)
    best = (size * target + 0.4 * others["reference"] + 0.7 * others["ema"]) / (size + 0.4 + 0.7)

    def slope(at):
        leaf = at.clone().requires_grad_()
        value = built.loss("current", rows, lambda x, sigma, sample, role: others.get(role, leaf)).value
        return torch.autograd.grad(value.sum(), leaf)[0].abs().max()

    assert slope(best) < 1e-12
    assert slope(best + 0.1) > 0.01
