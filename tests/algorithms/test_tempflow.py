"""TempFlow-GRPO against the linear-Gaussian chain, the official repeated forward, and its relatives in the limits where they meet."""

import math
from dataclasses import replace

import pytest
import torch

from flowalign.algorithms import flow_grpo, flow_grpo_fast, mix_grpo, tempflow_grpo
from flowalign.core.algorithm import Update
from flowalign.core.kernels import FlowSDE
from flowalign.core.plans import Plan, PlanStep, fork
from flowalign.core.schedules import flow_sigmas, flux_sigmas
from flowalign.core.step_weights import noise_aware
from tests.algorithms.chains import ODE, draw, gradients, play, slopes

SDE = FlowSDE(0.7)
PLAIN = {"kl_penalty": 0.0, "num_minibatches": 1, "clip": 0.5}


def tempflow(**changes):
    return tempflow_grpo.Config(**{**PLAIN, "step_weight": "uniform", **changes}).build()


def test_the_signal_to_noise_of_a_sample_is_one_half_at_every_step_and_flow_grpos_a_tenth():
    """Of each sample's gradient around the exact baseline: mean squared over variance. Flow-GRPO pays for the noise of the other steps."""
    built = tempflow()
    experience = play(built, groups=2000, members=1)
    trajectory, exact = experience.trajectory, slopes(SDE, ODE)
    rows = trajectory.transitions
    noise = ((rows.x_next - rows.mean) / rows.std[:, None])[:, 0]
    gain = torch.tensor(exact[1], dtype=torch.float64)[rows.step]
    # The exact baseline is the end of the path, and what a child adds to it is its noise times the step's gain.
    centred = (trajectory.x0[rows.sample, 0] - gain * noise).view(9, -1, 6)
    assert (centred - centred[..., :1]).abs().max() < 1e-12
    advantage = torch.zeros(len(trajectory.x0), 1, dtype=torch.float64).index_copy(0, rows.sample, (gain * noise)[:, None])
    plain = flow_grpo.Config(**PLAIN).build()
    chain = play(plain, groups=2000, members=12, advantage=lambda reward, number: reward)  # E[x0] = 0
    for method, made, expected in (
        (built, replace(experience, advantage=advantage), [0.5] * 9),
        (plain, chain, [0.039, 0.097, 0.085, 0.090, 0.104, 0.123, 0.137, 0.122, 0.062]),
    ):
        _, steps, values, _ = gradients(method, made, apart=True)
        found = [float(values[steps == k].mean() ** 2 / values[steps == k].var()) for k in range(9)]
        assert found == pytest.approx(expected, rel=0.17)


def test_children_share_one_evaluation_and_the_gradient_is_that_of_repeating_it():
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()
    built = tempflow(step_weight="noise", kl_penalty=0.1, clip=1e-3)
    experience = play(built, groups=2, members=3, num_steps=5, width=4)
    rows = built.rows(experience, Update(seed=0, step=0, index=0))
    counts = {}

    def velocity(x, sigma, sample, role):
        counts[role] = counts.get(role, 0) + len(x)
        return network(x) * (1 + sigma[:, None]) * (0.5 if role == "reference" else 1)

    def gradient(table):
        counts.clear()
        network.zero_grad()
        built.loss("current", table, velocity).value.mean().backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()]), dict(counts)

    shared, few = gradient(rows)
    repeated, many = gradient(type(rows)(sample=rows.sample, columns=rows.columns))
    assert (shared - repeated).abs().max() < 1e-15 + 1e-12 * repeated.abs().max()
    assert repeated.abs().max() > 1e-4
    # 6 noises x 4 forks, and the same times 6 children as in the released code.
    assert few == {"current": 24, "reference": 24}
    assert many == {"current": 144, "reference": 144}
    # The count of the plan, for one pass over one noise.
    assert built.plan(0, 5).training_evaluations * 6 == 24


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_a_micro_batch_counts_evaluations_and_never_splits_the_children_of_a_state(size):
    built = tempflow()
    rows = built.rows(play(built, groups=2, members=2, num_steps=4), Update(seed=0, step=0, index=0))
    parts = rows.split(size)
    assert [len(part.states()[0]) for part in parts] == [size] * (12 // size) + ([12 % size] if 12 % size else [])
    assert torch.equal(torch.cat([part["x_next"] for part in parts]), rows["x_next"])
    assert all(len(part) == 6 * len(part.states()[0]) for part in parts)


def test_the_noise_weight_is_the_std_over_its_mean_and_gives_the_papers_constants():
    for sigmas, level, constant in ((flow_sigmas(10, dtype=torch.float64), 0.7, 2.25), (flux_sigmas(10, mu=1.15).double(), 0.9, 1.73)):
        one = torch.zeros(1, dtype=torch.float64)
        stds = torch.stack([FlowSDE(level)(one, one, sigmas[i], sigmas[i + 1]).std for i in range(9)])
        weights = noise_aware(stds, sigmas[:9], sigmas[1:10])
        assert float(weights.mean()) == pytest.approx(1, abs=1e-12)
        assert (weights / stds).tolist() == pytest.approx([constant] * 9, abs=0.005)
    experience = play(tempflow(), groups=2, members=1)
    plain, weighted = (
        tempflow(step_weight=name).rows(experience, Update(seed=0, step=0, index=0))["advantage"] for name in ("uniform", "noise")
    )
    stds = experience.trajectory.transitions.std
    assert torch.allclose(weighted, plain * stds / stds.view(9, -1)[:, 0].mean(), rtol=1e-12)


def test_the_spread_of_a_groups_gradient_is_the_specifications():
    """Flow-GRPO's noise at the last trained step is three times TempFlow's, and at the very last one many times its signal."""
    forks = tempflow(num_children=24)
    _, steps, found, _ = gradients(forks, play(forks, groups=1500, members=1))
    assert float((found[steps == 8] / 24).std()) == pytest.approx(0.089, rel=0.06)
    plain, last = flow_grpo.Config(**PLAIN).build(), flow_grpo.Config(**PLAIN, train_last=True).build()
    _, steps, found, _ = gradients(plain, play(plain, groups=1500, members=24))
    assert float(found[steps == 8].view(1500, 24).mean(1).std()) == pytest.approx(0.271, rel=0.06)
    _, steps, found, _ = gradients(last, play(last, groups=1500, members=24))
    final = found[steps == 9].view(1500, 24).mean(1)
    assert float(final.std()) == pytest.approx(0.315, rel=0.06)
    assert abs(slopes(SDE, SDE)[0][9]) == pytest.approx(0.0111, abs=1e-4)


def as_plan(plan):
    """TempFlow's loss on a plan of our own."""
    return replace(tempflow(), plan_of=lambda step, n, seed: plan)


def test_one_fork_is_fast_with_a_window_of_that_step_and_the_same_initial_noise():
    k, children = 3, 4
    forked = as_plan(fork(SDE, 10, num_children=children, steps=range(k, k + 1)))
    fast = flow_grpo_fast.Config(**PLAIN, kernel="flow_sde", window=1, first=k, limit=k + 1).build()
    other = play(fast, groups=5, members=children, same_latent=True)
    one = play(forked, groups=5, members=1, x_init=other.trajectory.x_init[::children])
    assert (one.trajectory.x0 - other.trajectory.x0).abs().max() < 1e-14
    found = [gradients(built, experience) for built, experience in ((forked, one), (fast, other))]
    gradient = [values.view(5, -1).sum(1) for _, _, values, _ in found]
    assert (gradient[0] - gradient[1]).abs().max() < 1e-12
    assert (found[0][3].value - found[1][3].value).abs().max() < 1e-12
    assert gradient[0].abs().max() > 0.01


@pytest.mark.parametrize("compare", ["step", "prompt"])
def test_forks_with_noise_everywhere_estimate_what_flow_grpo_does(compare):
    """Path, children and completions by the SDE, weight 1: the expectation is Flow-GRPO's, with SDE continuation.

    A final state is part of its own baseline, one of 24 within a step and one of 24 * 9 within a prompt.
    """
    plan = fork(SDE, 10, num_children=1, path=SDE, completion=SDE, compare=compare)
    built, members = as_plan(plan), 24
    experience = play(built, groups=150, members=members)
    _, steps, found, _ = gradients(built, experience)
    chain_steps, chain_found = gradients(
        flow_grpo.Config(**PLAIN).build(), play(flow_grpo.Config(**PLAIN).build(), groups=150, members=24)
    )[1:3]
    exact = slopes(SDE, SDE)[0]
    for k in range(9):
        for at, values, num in ((steps, found, members * (9 if compare == "prompt" else 1)), (chain_steps, chain_found, members)):
            groups = values[at == k].view(150, members).mean(1) * num / (num - 1)
            error = float(groups.std()) / math.sqrt(150)
            assert float(groups.mean()) == pytest.approx(exact[k], abs=4 * error)


def test_of_two_steps_with_the_last_one_deterministic_all_relatives_coincide():
    sigmas = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    last_ode = Plan((PlanStep(kernel=SDE, is_trained=True), PlanStep(kernel=ODE)))
    relatives = {
        "flow_grpo": as_plan(last_ode),
        "fast": flow_grpo_fast.Config(**PLAIN, kernel="flow_sde", window=1).build(),
        "mix": mix_grpo.Config(**PLAIN, window=1, strategy="fixed").build(),
        "tempflow": tempflow(num_children=4),
    }
    members, x = 4, draw("start", (1, 1))
    found = {}
    for name, built in relatives.items():
        forks = name == "tempflow"
        start = x if forks else x.expand(members, 1)
        experience = play(built, groups=1, members=1 if forks else members, num_steps=2, sigmas=sigmas, x_init=start)
        _, _, gradient, loss = gradients(built, experience)
        found[name] = torch.cat([experience.trajectory.x0[:, 0], loss.value.detach(), gradient.sum()[None]])
    for values in found.values():
        assert (values - found["flow_grpo"]).abs().max() < 1e-14
    assert found["flow_grpo"][-1].abs() > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_children": 1}, "num_children: got 1; the children of a state are compared"),
        ({"num_children": 0, "compare": "step"}, None),
        ({"noise_level": 0.0}, "needed a positive value"),
    ],
)
def test_what_cannot_be_compared_or_scored_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tempflow_grpo.Config(**options).build().plan(0, 5)
    assert tempflow_grpo.Config(num_children=1, compare="step").build().plan(0, 5).num_leaves == 4
