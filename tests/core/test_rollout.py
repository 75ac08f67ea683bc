"""Plans, rollouts and the policy gradient in the linear-Gaussian chain, where everything has a closed form."""

import pytest
import torch

from flowalign.core.kernels import Euler, FlowSDE, gaussian_log_prob
from flowalign.core.links import ppo_clip
from flowalign.core.plans import Plan, PlanStep, chain, fork, ode
from flowalign.core.randomness import generator, key, normal, uniform
from flowalign.core.rollout import explore, replay, rollout
from flowalign.core.schedules import flow_sigmas
from flowalign.core.surrogates import transition_score
from flowalign.core.worlds import GaussianWorld

WORLD = GaussianWorld(0.0, 1.0)
SIGMAS = flow_sigmas(10, dtype=torch.float64)
# Response of E[x0] to an additive parameter of the velocity at step k, exact (SDE continuation, noise 0.7).
EXACT = [-0.0102, -0.0227, -0.0348, -0.0524, -0.0795, -0.1228, -0.1890, -0.2716, -0.3380]

KNOWN = (6510301506637419378, 7981938777098864742, 0.5499100406523343)


def run(num, seed, plan):
    def noise(step):
        return torch.randn(num, 1, generator=torch.Generator().manual_seed(1000 * seed + step), dtype=torch.float64)

    x = torch.randn(num, 1, generator=torch.Generator().manual_seed(1000 * seed + 999), dtype=torch.float64)
    return rollout(WORLD.velocity, x, SIGMAS, plan, noise)


def test_a_chain_trains_all_noisy_steps_but_the_last():
    assert chain(FlowSDE(0.7), 4).trained == (0, 1, 2)
    assert chain(FlowSDE(0.7), 4, train_last=True).trained == (0, 1, 2, 3)
    assert ode(4).trained == ()


def test_a_deterministic_step_cannot_be_trained():
    with pytest.raises(ValueError, match="without noise"):
        PlanStep(kernel=Euler(), is_trained=True)


def test_a_plan_of_another_length_than_the_grid_is_refused():
    with pytest.raises(ValueError, match="has 3 steps, but the schedule has 10"):
        rollout(WORLD.velocity, torch.zeros(1, 1), SIGMAS, ode(3), lambda step: torch.zeros(1, 1))
    with pytest.raises(ValueError, match="at least one step"):
        Plan(())


def test_transitions_follow_one_another_and_lead_to_the_final_state():
    done = run(5, 0, chain(FlowSDE(0.7), 10, train_last=True))
    table = done.transitions
    for step in range(9):
        now, then = table.take((table.step == step).nonzero().squeeze(1)), table.take((table.step == step + 1).nonzero().squeeze(1))
        assert torch.equal(now.x_next, then.x)
        assert now.sample.tolist() == list(range(5))
    last = table.take((table.step == 9).nonzero().squeeze(1))
    assert torch.equal(last.x_next, done.x0)


@pytest.mark.parametrize("plan", [chain(FlowSDE(0.7), 10), fork(FlowSDE(0.7), 10, num_children=3, steps=range(2, 6))])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_states_of_different_kinds_are_never_in_one_walk_and_that_changes_nothing(plan, batch_size):
    x = torch.randn(5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kinds = torch.tensor([0, 1, 0, 2, 1])

    def noise(step):
        return torch.randn(5 * len(plan.drawn(step, 0)), 1, generator=torch.Generator().manual_seed(1 + step), dtype=torch.float64)

    walked = []

    def walk(x, seed, start, stop, take):
        walked.append(seed)
        for i in range(start, stop):
            x = take(i, x, WORLD.velocity(x, SIGMAS[i]))
        return x

    together = explore(walk, x, SIGMAS, plan, noise)
    assert len(walked[0]) == 5
    walked.clear()
    apart = explore(walk, x, SIGMAS, plan, noise, batch_size=batch_size, kinds=kinds)
    assert torch.equal(apart.x0, together.x0)
    assert apart.evaluations == together.evaluations
    order = [torch.argsort(done.transitions.step * 1000 + done.transitions.sample) for done in (apart, together)]
    assert torch.equal(apart.transitions.take(order[0]).x_next, together.transitions.take(order[1]).x_next)
    assert all(len(kinds[seed].unique()) == 1 for seed in walked)
    assert batch_size is None or max(map(len, walked)) <= batch_size


def test_replaying_the_kernel_gives_a_ratio_of_exactly_one():
    kernel = FlowSDE(0.7)
    table = run(7, 1, chain(kernel, 10)).transitions
    again = kernel(table.x, table.velocity, table.sigma, table.sigma_next)
    ratio = (gaussian_log_prob(table.x_next, again.mean, table.std, reduction="mean") - table.mean_log_prob()).exp()
    assert (ratio - 1).abs().max() < 1e-12


def policy_gradient(num_groups, group_size, seed):
    """Gradient of each row's PPO loss in an additive parameter of the velocity, ``[step, group]``; group-mean baseline, no std."""
    kernel = FlowSDE(0.7)
    done = run(num_groups * group_size, seed, chain(kernel, 10))
    reward = done.x0[:, 0].view(num_groups, group_size)
    advantage = (reward - reward.mean(1, keepdim=True)).flatten()
    table = done.transitions
    theta = torch.zeros(len(table), 1, dtype=torch.float64, requires_grad=True)
    score, _ = transition_score(kernel, table.velocity + theta, table.x, table.x_next, table.sigma, table.sigma_next, reduction="sum")
    loss = ppo_clip(score - table.mean_log_prob(), advantage[table.sample], clip=1e-4)
    (slope,) = torch.autograd.grad(-loss.sum(), theta)
    # A group-mean baseline shrinks the expectation by (G - 1) / G.
    return slope.view(9, num_groups, group_size).mean(2) * group_size / (group_size - 1)


def test_the_policy_gradient_of_flow_grpo_is_the_exact_one_within_its_interval():
    groups = policy_gradient(2000, 24, 0)
    mean, error = groups.mean(1), groups.std(1) / groups.shape[1] ** 0.5
    deviation = (mean - torch.tensor(EXACT, dtype=torch.float64)).abs() / error
    assert deviation.max() < 4, deviation  # nine normal deviates at once
    assert (error < 0.03 * torch.tensor(EXACT, dtype=torch.float64).abs()).all()  # the interval is narrow enough to mean something


def test_a_parameter_shared_by_all_steps_gets_the_sum_of_their_gradients():
    kernel, plan, num = FlowSDE(0.7), chain(FlowSDE(0.7), 10), 24
    done = run(num, 3, plan)
    advantage = (done.x0 - done.x0.mean())[:, 0]
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    log_ratio = replay(lambda x, sigma: WORLD.velocity(x, sigma) + theta, done.transitions, plan) - done.transitions.mean_log_prob()
    (tied,) = torch.autograd.grad(-ppo_clip(log_ratio, advantage[done.transitions.sample], clip=1e-4).sum() / num, theta)
    expected = 0.0
    for step in range(9):
        rows = done.transitions.take(done.transitions.step == step)
        # By hand: the score's gradient is the response of the mean times the drawn noise over the std.
        response = kernel(rows.x, rows.velocity + 1, rows.sigma, rows.sigma_next).mean - rows.mean
        drawn = (rows.x_next - rows.mean) / rows.std[:, None]
        expected += (advantage * (response * drawn)[:, 0] / rows.std).mean().item()
    assert tied.item() == pytest.approx(expected, abs=1e-12)


def test_the_mean_reward_moves_as_the_exact_gradients_say():
    def mean_reward(shift):
        x, num = torch.randn(1000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1000
        noise = [torch.randn(num, 1, generator=torch.Generator().manual_seed(step), dtype=torch.float64) for step in range(10)]
        return rollout(lambda x, sigma: WORLD.velocity(x, sigma) + shift, x, SIGMAS, chain(FlowSDE(0.7), 10), noise.__getitem__).x0.mean()

    difference = (mean_reward(0.01) - mean_reward(-0.01)).item() / 0.02
    assert difference == pytest.approx(sum(EXACT) - 0.0111, abs=3e-4)


def test_keys_are_the_same_on_every_platform():
    assert key(0, "noise", 3) == 2795928183047282413
    assert key("ab", "c") != key("a", "bc")
    assert key(1) != key("1")


def test_noise_of_a_row_depends_on_its_own_key_alone():
    prompts, samples = torch.tensor([5, 9, 2**62]), torch.tensor([0, 3, 1])
    together = normal((2, 2), seed=1, purpose="x", step=4, prompts=prompts, samples=samples)
    backwards = normal((2, 2), seed=1, purpose="x", step=4, prompts=prompts.flip(0), samples=samples.flip(0))
    assert torch.equal(together, backwards.flip(0))
    other = normal((2, 2), seed=1, purpose="y", step=4, prompts=prompts, samples=samples)
    assert not torch.equal(together, other)


def test_keyed_noise_is_standard_normal():
    many = normal((8,), seed=0, purpose="x", step=0, prompts=torch.arange(4000), samples=torch.zeros(4000, dtype=torch.int64))
    assert abs(float(many.mean())) < 4 / 32000**0.5
    assert abs(float(many.var()) - 1) < 4 * (2 / 32000) ** 0.5
    assert abs(float((many[1:, 0] * many[:-1, 0]).mean())) < 4 / 4000**0.5


def test_keyed_uniforms_fill_the_unit_interval():
    draws = [uniform(seed=0, purpose="u", step=step) for step in range(2000)]
    assert 0 <= min(draws) < 0.01
    assert 0.99 < max(draws) < 1
    assert sum(draws) / 2000 == pytest.approx(0.5, abs=4 * (1 / 12 / 2000) ** 0.5)
    assert torch.equal(torch.randn(3, generator=generator("a", 1)), torch.randn(3, generator=generator("a", 1)))


def test_a_row_of_noise_is_the_same_alone_and_among_any_mates():
    prompts, samples = torch.arange(40) % 7, torch.arange(40) // 7
    together = normal((5, 3), seed=2, purpose="mates", step=1, prompts=prompts, samples=samples)
    for row in (0, 17, 39):
        alone = normal((5, 3), seed=2, purpose="mates", step=1, prompts=prompts[row : row + 1], samples=samples[row : row + 1])
        assert torch.equal(alone[0], together[row])
    parts = [normal((5, 3), seed=2, purpose="mates", step=1, prompts=prompts[a:b], samples=samples[a:b]) for a, b in ((0, 13), (13, 40))]
    assert torch.equal(torch.cat(parts), together)


def test_every_part_of_a_name_changes_the_noise():
    def draw(seed=1, purpose="x", step=4, prompt=5, number=0):
        ids = (torch.tensor([prompt]), torch.tensor([number]))
        return normal((4,), seed=seed, purpose=purpose, step=step, prompts=ids[0], samples=ids[1])

    others = [draw(seed=2), draw(purpose="y"), draw(step=5), draw(prompt=6), draw(number=1)]
    assert all((draw() - other).abs().min() > 1e-6 for other in others)


def test_hashes_and_uniforms_have_their_known_values():
    assert key() == KNOWN[0]
    assert key("noise", 0, -1, 2**40) == KNOWN[1]
    assert uniform(seed=0, purpose="awm level", step=3, stratum=1) == KNOWN[2]


def test_noise_has_normal_quantiles():
    ids = torch.arange(2000)
    values = normal((16,), seed=3, purpose="q", step=0, prompts=ids, samples=0 * ids).double().flatten().sort().values
    expected = (torch.arange(len(values), dtype=torch.float64) + 0.5) / len(values)
    found = 0.5 * (1 + torch.erf(values / 2**0.5))
    assert (found - expected).abs().max() < 1.95 / len(values) ** 0.5  # Kolmogorov-Smirnov, p = 0.001
