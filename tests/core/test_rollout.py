"""Plans, rollouts and the policy gradient in the linear-Gaussian chain, where everything has a closed form."""

import pytest
import torch

from flowalign.core.kernels import Euler, FlowSDE, gaussian_log_prob
from flowalign.core.links import ppo_clip
from flowalign.core.plans import Plan, PlanStep, chain, ode
from flowalign.core.randomness import generator, key, normal, uniform
from flowalign.core.rollout import rollout
from flowalign.core.schedules import flow_sigmas
from flowalign.core.worlds import GaussianWorld

WORLD = GaussianWorld(0.0, 1.0)
SIGMAS = flow_sigmas(10, dtype=torch.float64)
# Response of E[x0] to an additive parameter of the velocity at step k, exact (SDE continuation, noise 0.7).
EXACT = [-0.0102, -0.0227, -0.0348, -0.0524, -0.0795, -0.1228, -0.1890, -0.2716, -0.3380]


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


def test_replaying_the_kernel_gives_a_ratio_of_exactly_one():
    kernel = FlowSDE(0.7)
    table = run(7, 1, chain(kernel, 10)).transitions
    again = kernel(table.x, table.velocity, table.sigma, table.sigma_next)
    ratio = (gaussian_log_prob(table.x_next, again.mean, table.std, reduction="mean") - table.mean_log_prob()).exp()
    assert (ratio - 1).abs().max() < 1e-12


def policy_gradient(num_groups, group_size, seed):
    """Gradient of the PPO loss in one additive parameter of the velocity per step, group-mean baseline, no std."""
    kernel = FlowSDE(0.7)
    done = run(num_groups * group_size, seed, chain(kernel, 10))
    reward = done.x0[:, 0].view(num_groups, group_size)
    advantage = (reward - reward.mean(1, keepdim=True)).flatten()
    table = done.transitions
    theta = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    mean = kernel(table.x, table.velocity + theta[table.step][:, None], table.sigma, table.sigma_next).mean
    log_ratio = gaussian_log_prob(table.x_next, mean, table.std, reduction="sum") - table.mean_log_prob()
    per_row = ppo_clip(log_ratio, advantage[table.sample], clip=1e-4)
    per_group = per_row.view(9, num_groups, group_size).sum(2) / group_size
    slopes = [-torch.autograd.grad(per_group[k].sum(), theta, retain_graph=True)[0][k] / num_groups for k in range(9)]
    tied = -torch.autograd.grad(per_group.sum(), theta)[0].sum() / num_groups
    # A group-mean baseline shrinks the expectation by (G - 1) / G.
    return torch.stack(slopes) * group_size / (group_size - 1), tied * group_size / (group_size - 1)


def test_the_policy_gradient_of_flow_grpo_is_the_exact_one_within_its_interval():
    batches = torch.stack([policy_gradient(500, 24, seed)[0] for seed in range(10)])
    mean, error = batches.mean(0), batches.std(0) / len(batches) ** 0.5
    deviation = (mean - torch.tensor(EXACT, dtype=torch.float64)).abs() / error
    assert deviation.max() < 4.5, deviation  # nine tests at once, t with nine degrees of freedom
    assert (error < 0.02).all()  # and the interval is narrow enough to mean something


def test_a_tied_parameter_gets_the_sum_of_the_steps_gradients():
    slopes, tied = policy_gradient(20, 6, 3)
    assert float(slopes.sum()) == pytest.approx(float(tied), abs=1e-12)


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
