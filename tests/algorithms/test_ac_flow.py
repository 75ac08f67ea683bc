"""AC-Flow: what the critic is fitted on, how it weighs, when the policy may move, and where it is AWM."""

import pytest
import torch

from flowalign.algorithms import ac_flow, awm
from flowalign.core.algorithm import HasHeads
from flowalign.core.heads import Head
from flowalign.core.paths import interpolate
from flowalign.core.worlds import GaussianWorld
from tests.algorithms.test_matching import FIRST, experience, network


class Networks:
    """A policy, a reference that is the same, and a critic that says what it is told."""

    def __init__(self, net, value=lambda x, sigma, sample: torch.zeros(len(x))):
        self.net, self.value, self.judged = net, value, 0

    def __call__(self, x, sigma, sample, role):
        if role == "critic":
            self.judged += len(x)
            return self.value(x, sigma, sample)
        return self.net(x) * (1 + sigma[:, None, None])


def built(**options):
    return ac_flow.Config(**({"num_levels": 2, "wasserstein_penalty": 0.0} | options)).build()


def gradient(algorithm, networks, rows):
    networks.net.zero_grad()
    algorithm.loss("current", rows, networks).value.mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in networks.net.parameters()])


def test_a_critic_that_knows_nothing_leaves_advantage_weighted_matching():
    net, algorithm = network(), built()
    rows = algorithm.rows(experience(), FIRST)
    plain = awm.Config(weighting="uniform", advantage_max=5.0, reference_penalty=0.0, slow_penalty=0.0).build()
    assert torch.equal(gradient(algorithm, Networks(net), rows), gradient(plain, Networks(net), rows))


def test_a_critic_that_knows_everything_leaves_nothing():
    algorithm, net = built(), network()
    rows = algorithm.rows(experience(), FIRST)
    assert gradient(algorithm, Networks(net, lambda x, sigma, sample: rows["advantage"]), rows).abs().max() == 0


def test_the_advantage_is_what_the_critic_did_not_see_coming_and_is_clipped():
    algorithm = built(advantage_clip=1.0)
    rows = algorithm.rows(experience(), FIRST)
    assert rows["advantage"].abs().max() == 1.0
    said = torch.linspace(-1.5, 1.5, len(rows), dtype=torch.float64)
    found = algorithm.loss("current", rows, Networks(network(), lambda x, sigma, sample: said))
    assert torch.equal(found.metrics["critic/advantage"], (rows["advantage"] - said).clamp(-1, 1).abs())


def test_exponential_weights_are_positive_and_those_of_the_paper():
    linear, exponential = built(), built(weight="exponential", temperature=0.5)
    rows, net = linear.rows(experience(), FIRST), network()
    one, other = (algorithm.loss("current", rows, Networks(net)).value.detach() for algorithm in (linear, exponential))
    score = one / -rows["advantage"]
    assert torch.allclose(other, -torch.exp(0.5 * rows["advantage"]) * score)
    assert (other > 0).all()


def test_the_critic_regresses_the_shaped_reward_on_the_policys_own_rows():
    algorithm = built()
    rows, seen = algorithm.rows(experience(), FIRST), {}

    def value(x, sigma, sample):
        seen["x"], seen["sigma"] = x, sigma
        return torch.full((len(x),), 0.5, dtype=torch.float64)

    found = algorithm.loss("critic", rows, Networks(network(), value))
    assert torch.equal(seen["x"], interpolate(rows["x0"], rows["noise"], rows["sigma"]))
    assert torch.equal(found.value, (0.5 - rows["advantage"]).square())
    assert torch.equal(found.metrics["critic/variance"], rows["advantage"].square())
    policy = Networks(network(), value)
    algorithm.loss("current", rows, policy)
    assert policy.judged == len(rows)


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


def test_the_policy_moves_only_where_the_critic_explains_what_it_had_not_seen():
    algorithm = built(least_explained=0.1, patience=3)
    assert isinstance(algorithm, HasHeads)
    assert not isinstance(awm.Config().build(), HasHeads)
    good, bad = {"critic/error": 0.8, "critic/variance": 1.0}, {"critic/error": 0.95, "critic/variance": 1.0}
    assert algorithm.is_ready("current", good, held_back=100)
    assert not algorithm.is_ready("current", bad, held_back=0)
    assert algorithm.is_ready("critic", bad, held_back=0)
    assert not algorithm.is_ready("current", {"critic/error": 0.0, "critic/variance": 0.0}, held_back=1)
    assert algorithm.is_ready("current", {}, held_back=1)
    with pytest.raises(ValueError, match=r"for 3 steps the critic has explained no more than 0.1 .* \(now 0.050\).* or use awm"):
        algorithm.is_ready("current", bad, held_back=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ac_flow.Config(temperature=0.0), "temperature must be positive"),
        (lambda: ac_flow.Config(wasserstein_penalty=-1.0), "wasserstein_penalty not negative"),
        (lambda: ac_flow.Config(least_explained=1.0), "no critic explains everything"),
        (lambda: ac_flow.Config(critic_updates=0), "must be at least 1"),
        (lambda: Head(width=0), "needed at least 1"),
        (lambda: Head(learning_rate=float("inf")), "learning_rate must be positive"),
    ],
)
def test_settings_that_cannot_be_meant(make, message):
    with pytest.raises(ValueError, match=message):
        make()
