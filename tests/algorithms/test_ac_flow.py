"""AC-Flow: what the critic is fitted on, how it weighs, when the policy may move, and where it is AWM."""

from dataclasses import replace

import pytest
import torch

from flowalign.algorithms import ac_flow, awm
from flowalign.core.algorithm import Experience, HasHeads, Update
from flowalign.core.heads import Evidence, Head
from flowalign.core.paths import interpolate
from flowalign.core.rollout import Trajectory, Transitions
from flowalign.core.worlds import GaussianWorld
from tests.algorithms.test_matching import FIRST, experience, network


class Networks:
    """A policy, a reference that is the same, features that are the latents, and a critic that says what it is told."""

    def __init__(self, net, value=lambda x, sigma, sample: torch.zeros(len(x))):
        self.net, self.value, self.asked = net, value, []

    def __call__(self, x, sigma, sample, role):
        self.asked.append(role)
        if role == "features":
            return x.flatten(1)
        if role == "critic":
            return self.value(x, sigma, sample)
        return self.net(x) * (1 + sigma[:, None, None])


def laid_out(algorithm, networks):
    """Rows with what is frozen, as the loop prepares them."""
    with torch.no_grad():
        return algorithm.look(algorithm.rows(experience(), FIRST), networks)


def built(**options):
    return ac_flow.Config(**({"num_levels": 2, "wasserstein_penalty": 0.0} | options)).build()


def gradient(algorithm, networks, rows):
    networks.net.zero_grad()
    algorithm.loss("current", rows, networks).value.mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in networks.net.parameters()])


def test_a_critic_that_knows_nothing_leaves_advantage_weighted_matching():
    net, algorithm = network(), built()
    rows = laid_out(algorithm, Networks(network()))
    plain = awm.Config(weighting="uniform", advantage_max=5.0, reference_penalty=0.0, slow_penalty=0.0).build()
    assert torch.equal(gradient(algorithm, Networks(net), rows), gradient(plain, Networks(net), rows))


def test_a_critic_that_knows_everything_leaves_nothing():
    algorithm, net = built(), network()
    rows = laid_out(algorithm, Networks(network()))
    assert gradient(algorithm, Networks(net, lambda x, sigma, sample: rows["advantage"]), rows).abs().max() == 0


def test_the_advantage_is_what_the_critic_did_not_see_coming_and_is_clipped():
    algorithm = built(advantage_clip=1.0)
    rows = laid_out(algorithm, Networks(network()))
    assert rows["advantage"].abs().max() == 1.0
    said = torch.linspace(-1.5, 1.5, len(rows), dtype=torch.float64)
    found = algorithm.loss("current", rows, Networks(network(), lambda x, sigma, sample: said))
    assert torch.equal(found.metrics["policy_advantage"], (rows["advantage"] - said).clamp(-1, 1).abs())


def test_exponential_weights_are_positive_and_those_of_the_paper():
    linear, exponential = built(), built(weight="exponential", temperature=0.5)
    net = network()
    rows = laid_out(linear, Networks(net))
    one, other = (algorithm.loss("current", rows, Networks(net)).value.detach() for algorithm in (linear, exponential))
    score = one / -rows["advantage"]
    assert torch.allclose(other, -torch.exp(0.5 * rows["advantage"]) * score)
    assert (other > 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_exponential_weights_tilt_the_data_law(temperature):
    """Data N(0, 1), R = x0: the best velocity is that of N(temperature, 1), at sigma 1/2 minus the temperature everywhere."""
    num, level = 20_000, torch.tensor([0.5, 0.0], dtype=torch.float64)
    x0 = torch.randn(num, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    done = Trajectory(x_init=x0, x0=x0, sigmas=level, transitions=Transitions.concatenate([], x0))
    column, ids = torch.ones(num, 1, dtype=torch.float64), torch.arange(num)
    made = Experience(trajectory=done, advantage=x0, weight=column, keep=column[:, 0] > 0, prompt=ids, group=ids, sample=0 * ids)
    algorithm = built(weight="exponential", temperature=temperature, num_levels=1, advantage_clip=50.0)
    rows = algorithm.rows(made, FIRST)
    rows = replace(rows, columns={**rows.columns, "features": rows["x0"], "noise": rows["noise"].double()})
    target = (rows["noise"] - rows["x0"])[:, 0]

    def nothing(x, sigma, sample, role):
        return torch.zeros(num, dtype=torch.float64) if role == "critic" else torch.zeros_like(x)

    still = algorithm.loss("current", rows, nothing).value
    weight = still / target.square()  # of a network that predicts 0
    x = interpolate(rows["x0"], rows["noise"], 0.5)[:, 0]
    design = torch.stack([x, torch.ones_like(x)], 1) * weight.sqrt()[:, None]
    slope, intercept = torch.linalg.lstsq(design, (target * weight.sqrt())[:, None]).solution[:, 0].tolist()
    world = GaussianWorld(temperature, 1.0)
    at = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64)
    assert (slope * at + intercept).tolist() == pytest.approx(world.velocity(at, 0.5).tolist(), abs=0.1)
    assert world.velocity(at, 0.5).tolist() == pytest.approx([-temperature] * 3)


def test_the_critic_regresses_the_shaped_reward_on_the_policys_own_rows():
    algorithm, seen = built(), {}

    def value(x, sigma, sample):
        seen["features"] = x
        return torch.full((len(x),), 0.5, dtype=torch.float64)

    rows = laid_out(algorithm, Networks(network()))
    found = algorithm.loss("critic", rows, Networks(network(), value))
    assert torch.equal(seen["features"], interpolate(rows["x0"], rows["noise"], rows["sigma"]).flatten(1))
    assert torch.equal(found.value, (0.5 - rows["advantage"]).square())
    assert torch.equal(found.metrics["critic/target"], rows["advantage"])
    assert torch.equal(found.metrics["critic/square"], rows["advantage"].square())


def test_what_is_frozen_is_asked_once_and_a_penalty_of_zero_not_at_all():
    for penalty, expected in ((0.0, ["features"]), (0.1, ["reference", "features"])):
        algorithm, networks = built(wasserstein_penalty=penalty), Networks(network())
        rows = laid_out(algorithm, networks)
        assert networks.asked == expected
        networks.asked.clear()
        for player in algorithm.turns(Update(seed=0, step=0, index=0), ready=True):
            algorithm.loss(player, rows, networks)
        assert networks.asked == ["critic", "current", "critic"]


def test_the_wasserstein_penalty_is_the_distance_to_the_reference():
    algorithm, net = built(wasserstein_penalty=0.3), network()
    rows = laid_out(algorithm, Networks(net))
    plain = built().loss("current", rows, Networks(net)).value
    moved = network()
    torch.nn.init.constant_(moved[3].bias, 0.25)
    other = algorithm.loss("current", rows, Networks(moved))
    distance = (moved[1:](rows["features"]) - net[1:](rows["features"])) * (1 + rows["sigma"])[:, None, None]
    assert torch.allclose(other.metrics["distance/reference"], distance.square().flatten(1).mean(1))
    free = built().loss("current", rows, Networks(moved)).value
    assert torch.allclose(other.value - free, 0.3 * other.metrics["distance/reference"])
    assert torch.allclose(algorithm.loss("current", rows, Networks(net)).value, plain)  # no distance, no penalty


def test_a_critic_on_renoised_states_finds_the_posterior_mean_and_leaves_half_the_variance():
    """Oracle N: data N(0, 1), reward x0, sigma 1/2: slope 1 and residual 1/2; on a trajectory's states it would be 1.414 and 0."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(4000, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(4000, 1, generator=generator, dtype=torch.float64)
    x = interpolate(x0, noise, 0.5).float()
    head = Head(width=32, learning_rate=1e-2)
    critic = head.build(3, seed=0, name="critic")
    optimizer = torch.optim.AdamW(critic.parameters(), lr=head.learning_rate)
    features = torch.cat([x, torch.ones_like(x), -torch.ones_like(x)], 1)  # beside constants the norm of the first layer keeps the size
    for _ in range(300):
        optimizer.zero_grad()
        loss = (critic(features) - x0[:, 0].float()).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) == pytest.approx(0.5, abs=0.03)
    middle = x[:, 0].abs() < 1.5
    exact = GaussianWorld(0.0, 1.0).posterior_mean(x, 0.5)[:, 0]
    said = critic(features).detach()
    slope = float((said[middle] * exact[middle]).mean() / exact[middle].square().mean())
    assert slope == pytest.approx(1.0, abs=0.1)


def evidence(errors, squares=None, targets=None):
    squares = squares or [1.0] * len(errors)
    return {"critic": Evidence(error=tuple(errors), square=tuple(squares), target=tuple(targets or [0.0] * len(errors)))}


def test_the_policy_begins_once_the_critic_has_shown_beyond_doubt_what_it_explains():
    algorithm = built(least_explained=0.1, least_steps=4, patience=6)
    assert isinstance(algorithm, HasHeads)
    assert not isinstance(awm.Config().build(), HasHeads)
    good, doubtful = [0.8, 0.82, 0.79, 0.8], [0.6, 1.1, 0.9, 0.7]
    assert algorithm.is_ready(evidence(good), 0)
    assert not algorithm.is_ready(evidence(good[:3]), 0)  # too few steps
    assert not algorithm.is_ready(evidence(doubtful), 0)  # too noisy
    assert not algorithm.is_ready(evidence([0.95, 0.951, 0.949, 0.95]), 0)  # too little
    assert not algorithm.is_ready(evidence([]), 0)
    assert built(least_steps=0).is_ready(evidence([]), 0)
    assert not algorithm.is_ready(evidence(doubtful), 5)
    with pytest.raises(
        ValueError, match=r"in 6 steps the critic has not shown .* more than 0.1 .* \(over the last 4: 0.175\).* or with awm"
    ):
        algorithm.is_ready(evidence(doubtful), 6)


def test_a_constant_explains_nothing():
    """Shaped rewards of mean 2 and variance 1: the best constant has error 1 and is no critic."""
    constant = evidence([1.0, 1.01, 0.99, 1.0], squares=[5.0] * 4, targets=[2.0] * 4)["critic"]
    assert constant.explained() == pytest.approx(0.0)
    assert not constant.is_better_than(0.0)
    assert evidence([0.5, 0.51, 0.49, 0.5], squares=[5.0] * 4, targets=[2.0] * 4)["critic"].is_better_than(0.4)


def course(seed, *, signal, steps=40):
    """Evidence of a critic that learns from 128 rows a step: the reward is noise, and where there is a signal its first feature too."""
    critic = Head(width=16).build(6, seed=seed, name="critic")
    optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-3)
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        features = torch.randn(128, 6, generator=generator)
        target = torch.randn(128, generator=generator) + signal * features[:, 0]
        error = (critic(features) - target).square()
        found.append((float(error.mean()), float(target.mean()), float(target.square().mean())))
        optimizer.zero_grad()
        error.mean().backward()
        optimizer.step()
    return found


def first_ready(found):
    """The step before which the policy begins, or None."""
    algorithm = built(patience=50)
    for step in range(len(found) + 1):
        error, target, square = zip(*found[max(0, step - 20) : step], strict=True) if step else ((), (), ())
        if algorithm.is_ready({"critic": Evidence(error=error, target=target, square=square)}, 0):
            return step
    return None


def test_a_critic_of_noise_does_not_begin_and_one_of_a_signal_does():
    useless = [first_ready(course(seed, signal=0.0)) for seed in range(12)]
    useful = [first_ready(course(seed, signal=1.0)) for seed in range(6)]
    assert sum(step is not None for step in useless) <= 1
    assert all(step is not None and step >= 10 for step in useful)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ac_flow.Config(temperature=0.0), "temperature must be positive"),
        (lambda: ac_flow.Config(wasserstein_penalty=-1.0), "wasserstein_penalty not negative"),
        (lambda: ac_flow.Config(least_explained=1.0), "no critic explains everything"),
        (lambda: ac_flow.Config(critic_updates=0), "must be at least 1"),
        (lambda: ac_flow.Config(least_steps=30), "least_steps: got 30, needed 0 to 20"),
        (lambda: Head(width=0), "needed at least 1"),
        (lambda: Head(learning_rate=float("inf")), "got learning_rate inf and weight_decay 0.01, needed a positive number"),
    ],
)
def test_settings_that_cannot_be_meant(make, message):
    with pytest.raises(ValueError, match=message):
        make()
