"""Plans with windows and forks, replay, and the linear-Gaussian chain with deterministic continuations."""

import math

import pytest
import torch

from flowalign.core.kernels import CPS, DDIM, DanceSDE, Euler, FlowSDE, sample
from flowalign.core.plans import Plan, PlanStep, chain, ode, window
from flowalign.core.rollout import replay, rollout
from flowalign.core.schedules import flow_sigmas, linear_sigmas
from flowalign.core.worlds import GaussianWorld
from tests.algorithms.chains import slopes

WORLD = GaussianWorld(0.0, 1.0)
SIGMAS = flow_sigmas(10, dtype=torch.float64)
SDE = FlowSDE(0.7)


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tree(children):
    steps = [PlanStep(kernel=SDE if n else Euler(), num_children=max(n, 1), is_trained=bool(n)) for n in children]
    return Plan(tuple(steps))


def test_evaluations_count_a_common_prefix_once():
    assert chain(SDE, 10).evaluations == 10
    assert tree([2, 0, 3, 0]).evaluations == 1 + 2 + 2 + 6
    assert tree([2, 0, 3, 0]).num_leaves == 6


def test_a_fork_is_separate_rollouts_that_share_their_prefix():
    plan, sigmas, x = tree([2, 0, 3, 0]), linear_sigmas(4, dtype=torch.float64), draw(0, 2, 1)
    noise = {0: draw(1, 4, 1), 2: draw(2, 12, 1)}
    calls = []

    def velocity(x, sigma):
        calls.append(len(x))
        return WORLD.velocity(x, sigma)

    done = rollout(velocity, x, sigmas, plan, noise.__getitem__)
    assert calls == [2, 4, 4, 12]
    alone = Plan(tuple(PlanStep(kernel=step.kernel) for step in plan.steps))
    for leaf in range(12):
        own = {0: noise[0][leaf // 3][None], 2: noise[2][leaf][None]}
        one = rollout(WORLD.velocity, x[leaf // 6][None], sigmas, alone, own.__getitem__)
        assert (one.x0[0] - done.x0[leaf]).abs().max() < 1e-14


def test_a_shared_transition_points_at_its_first_descendant():
    done = rollout(
        WORLD.velocity, draw(0, 2, 1), linear_sigmas(4, dtype=torch.float64), tree([2, 0, 3, 0]), lambda i: draw(i, 4 if i == 0 else 12, 1)
    )
    table = done.transitions
    assert table.sample[table.step == 0].tolist() == [0, 3, 6, 9]
    assert table.sample[table.step == 2].tolist() == list(range(12))


@pytest.mark.parametrize("kernel", [SDE, DanceSDE(0.3), DDIM(1.0), CPS(0.8)])
def test_replaying_an_unchanged_model_gives_the_recorded_log_probs_to_the_last_bit(kernel):
    weight = draw(5, 6, 6, dtype=torch.float32)
    plan, sigmas = chain(kernel, 5), flow_sigmas(5)

    def velocity(x, sigma):
        return torch.tanh(x @ weight) * (1 + sigma)

    done = rollout(velocity, draw(6, 4, 6, dtype=torch.float32), sigmas, plan, lambda i: draw(50 + i, 4, 6, dtype=torch.float32))
    assert torch.equal(replay(velocity, done.transitions, plan), done.transitions.mean_log_prob())


def test_replay_keeps_the_order_of_the_rows():
    plan = chain(SDE, 10)
    done = rollout(WORLD.velocity, draw(0, 3, 1), SIGMAS, plan, lambda i: draw(i, 3, 1))
    order = torch.randperm(27, generator=torch.Generator().manual_seed(0))
    shuffled = done.transitions.take(order)
    assert (replay(WORLD.velocity, shuffled, plan) - replay(WORLD.velocity, done.transitions, plan)[order]).abs().max() < 1e-12


def test_replay_sees_a_changed_model():
    plan = chain(SDE, 10)
    done = rollout(WORLD.velocity, draw(0, 3, 1), SIGMAS, plan, lambda i: draw(i, 3, 1))
    changed = replay(lambda x, sigma: WORLD.velocity(x, sigma) + 0.1, done.transitions, plan)
    assert (changed - done.transitions.mean_log_prob()).abs().min() > 1e-6


def test_an_ode_rollout_asks_for_no_noise_and_leaves_no_rows():
    def refuse(step):
        raise AssertionError(step)

    done = rollout(WORLD.velocity, draw(0, 3, 1), SIGMAS, ode(10), refuse)
    assert len(done.transitions) == 0
    assert replay(WORLD.velocity, done.transitions, ode(10)).tolist() == []


def test_a_window_trains_its_steps_and_follows_the_ode_elsewhere():
    done = rollout(WORLD.velocity, draw(0, 3, 1), SIGMAS, window(SDE, 10, start=4, size=2), lambda i: draw(i, 3, 1))
    assert done.transitions.step.unique().tolist() == [4, 5]
    before = rollout(WORLD.velocity, draw(0, 3, 1), SIGMAS[:5], ode(4), lambda i: draw(i, 3, 1))
    assert torch.equal(done.transitions.x[:3], before.x0)


def test_exact_slopes_of_the_chain_are_those_of_the_oracle():
    sde = [-0.0102, -0.0227, -0.0348, -0.0524, -0.0795, -0.1228, -0.1890, -0.2716, -0.3380, -0.0111]
    deterministic = [-0.0340, -0.0520, -0.0655, -0.0846, -0.1125, -0.1538, -0.2123, -0.2815, -0.3380, -0.0111]
    assert slopes(SDE, SDE)[0] == pytest.approx(sde, abs=6e-5)
    assert slopes(SDE, Euler())[0] == pytest.approx(deterministic, abs=6e-5)


def test_exact_slopes_are_what_autograd_finds_through_the_sampler():
    x, theta = draw(0, 1), torch.zeros(10, dtype=torch.float64, requires_grad=True)
    for k in range(10):
        x = sample(SDE(x, WORLD.velocity(x, float(SIGMAS[k])) + theta[k], float(SIGMAS[k]), float(SIGMAS[k + 1])), draw(k, 1))
    (found,) = torch.autograd.grad(x.sum(), theta)
    assert found.tolist() == pytest.approx(slopes(SDE, SDE)[0], abs=1e-12)


def test_signal_to_noise_of_each_step_is_that_of_the_oracle():
    _, noise = slopes(SDE, SDE)
    initial = math.prod(
        SDE(torch.ones(1, dtype=torch.float64), WORLD.velocity(torch.ones(1, dtype=torch.float64), now), now, then).mean.item()
        for now, then in zip(SIGMAS[:-1].tolist(), SIGMAS[1:].tolist(), strict=True)
    )
    variance = initial**2 + sum(w**2 for w in noise)
    assert variance == pytest.approx(0.7840, abs=1e-4)
    found = [w**2 / (variance + w**2) for w in noise]
    assert found == pytest.approx([0.039, 0.097, 0.085, 0.090, 0.104, 0.123, 0.137, 0.122, 0.062, 0.0001], abs=6e-4)


def test_reward_stds_at_each_branch_point_peak_at_the_second_step():
    _, noise = slopes(SDE, Euler())
    assert noise == pytest.approx([0.596, 0.664, 0.507, 0.450, 0.426, 0.415, 0.396, 0.341, 0.227, 0.006], abs=6e-4)


@pytest.mark.parametrize("k", [0, 4, 8])
def test_the_policy_gradient_of_a_fork_is_the_exact_one(k):
    """TempFlow: one noisy step, children grouped by their parent, ODE everywhere else; times K / (K - 1)."""
    seeds, children = 20_000, 6
    plan = tree([children if step == k else 0 for step in range(10)])
    done = rollout(WORLD.velocity, draw(1, seeds, 1), SIGMAS, plan, lambda step: draw(2, seeds * children, 1))
    reward = done.x0.view(seeds, children)
    advantage = (reward - reward.mean(1, keepdim=True)).flatten()
    rows = done.transitions
    theta = torch.zeros(len(rows), 1, dtype=torch.float64, requires_grad=True)
    score = replay(lambda x, sigma: WORLD.velocity(x, sigma) + theta, rows, plan)
    (per_row,) = torch.autograd.grad((advantage[rows.sample] * score).sum(), theta)
    per_seed = per_row.view(seeds, children).mean(1) * children / (children - 1)
    exact, error = slopes(SDE, Euler())[0][k], per_seed.std().item() / math.sqrt(seeds)
    assert per_seed.mean().item() == pytest.approx(exact, abs=4.5 * error)
    assert error < 0.01 * abs(exact)


def test_a_flow_sde_chain_of_one_noisy_step_is_a_window_of_one():
    sigmas = linear_sigmas(2, dtype=torch.float64)
    last_ode = Plan((PlanStep(kernel=SDE, is_trained=True), PlanStep(kernel=Euler())))
    assert window(SDE, 2, start=0, size=1) == last_ode
    one, forked = (
        rollout(WORLD.velocity, x, sigmas, plan, lambda step: draw(3, 4, 1))
        for x, plan in ((draw(0, 1, 1).expand(4, 1), last_ode), (draw(0, 1, 1), tree([4, 0])))
    )
    assert (one.x0 - forked.x0).abs().max() < 1e-15
    assert (one.transitions.mean_log_prob() - forked.transitions.mean_log_prob()).abs().max() < 1e-14


def test_plans_without_meaning_are_refused():
    with pytest.raises(ValueError, match="children would be equal"):
        PlanStep(kernel=Euler(), num_children=2)
    with pytest.raises(ValueError, match="window"):
        window(SDE, 10, start=8, size=3)
    with pytest.raises(ValueError, match="without noise"):
        window(Euler(), 10, start=0, size=1)


def test_noise_of_the_wrong_number_of_children_is_refused():
    with pytest.raises(ValueError, match=r"noise\(0\).*children"):
        rollout(WORLD.velocity, draw(0, 2, 1), linear_sigmas(2, dtype=torch.float64), tree([3, 0]), lambda step: draw(0, 2, 1))


def test_an_increasing_grid_is_refused():
    with pytest.raises(ValueError, match="decrease"):
        rollout(WORLD.velocity, draw(0, 2, 1), SIGMAS.flip(0), ode(10), lambda step: draw(0, 2, 1))


def test_rows_of_another_plan_are_refused():
    done = rollout(WORLD.velocity, draw(0, 2, 1), SIGMAS, chain(SDE, 10), lambda i: draw(i, 2, 1))
    with pytest.raises(ValueError, match="pass the plan of the rollout"):
        replay(WORLD.velocity, done.transitions, chain(SDE, 4))
