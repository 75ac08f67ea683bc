"""Every policy gradient on the linear-Gaussian chain against the exact slope of E[x0], step by step.

A step's slope is an expectation over that step's noise alone. With the other steps' noise shared by all that is compared, two nodes of
the noise, 1 and -1, give it without error: Gauss-Hermite quadrature of two nodes is exact for the product of a linear reward and a linear
score. Drawn noise gives it within its interval.
"""

import math

import pytest
import torch

from flowalign.algorithms import ddpo, flow_dppo, flow_grpo, flow_grpo_fast, grpo_guard, mix_grpo, tempflow_grpo
from flowalign.core.kernels import CPS, DDIM, DanceSDE, FlowSDE
from flowalign.core.schedules import flow_sigmas
from tests.algorithms.chains import ODE, WORLD, draw, gradients, play, slopes

FREE = {"kl_penalty": 0.0, "num_minibatches": 1}
WIDE = {**FREE, "clip": 0.5}
SDE = FlowSDE(0.7)
CHAINS = {
    "flow_grpo": (flow_grpo.Config(**WIDE), SDE),
    "dance_grpo": (flow_grpo.Config(**WIDE, kernel="dance_sde"), DanceSDE(0.3)),
    "ddim": (flow_grpo.Config(**WIDE, kernel="ddim"), DDIM(1.0)),
    "flow_cps": (flow_grpo.Config(**WIDE, kernel="cps"), CPS(0.8)),
    "flow_dppo": (flow_dppo.Config(**FREE, delta=1.0), SDE),
    "ddpo": (ddpo.Config(**WIDE, noise_level=1.0), DDIM(1.0)),
    "branch_grpo": (flow_grpo.Config(**WIDE, depths=(0, 3, 6), num_children=2), SDE),
}
WINDOWS = {
    "flow_grpo_fast": (flow_grpo_fast.Config(**WIDE), CPS(0.8)),
    "flow_grpo_fast_from_one_state": (flow_grpo_fast.Config(**WIDE, num_children=6), CPS(0.8)),
    "mix_grpo": (mix_grpo.Config(**WIDE, strategy="fixed"), SDE),
    "mix_grpo_from_one_state": (mix_grpo.Config(**WIDE, strategy="fixed", num_children=6), SDE),
}
FORKS = {"tempflow_grpo": (tempflow_grpo.Config(**WIDE, step_weight="uniform"), SDE)}
METHODS = CHAINS | WINDOWS | FORKS


def alone(k):
    """Noise that differs in step ``k`` alone, by sign."""

    def noise(i, rows):
        sign = 1.0 - 2.0 * (torch.arange(rows) % 2).double()[:, None]
        return sign if i == k else draw("shared", i, (1, 1)).expand(rows, 1)

    return noise


def exact_slopes(name):
    """Slopes of the trained steps: with the method's noise in them, and the ODE where it has none."""
    config, kernel = METHODS[name]
    trained = config.build().plan(0, 10).trained
    inside, outside = slopes(kernel, kernel)[0], slopes(kernel, ODE)[0]
    if name in FORKS:
        return {k: outside[k] for k in trained}
    if name in CHAINS:
        return {k: inside[k] for k in trained}
    last = trained[-1]
    return {k: inside[k] / inside[last] * outside[last] for k in trained}


@pytest.mark.parametrize("name", METHODS)
def test_two_nodes_of_noise_give_the_exact_gradient_of_every_step(name):
    built, exact = METHODS[name][0].build(), exact_slopes(name)
    assert len(exact) == (3 if "fast" in name else 4 if "mix" in name else 9)
    one_state = name in FORKS or name.endswith("one_state")
    for k, slope in exact.items():
        experience = play(built, groups=1, members=1 if one_state else 2, same_latent=True, noise=alone(k))
        rows, steps, found, _ = gradients(built, experience)
        # A row is a transition with one of its final states, and a sum over those is what is compared, over their number.
        compared = len(torch.unique(rows.sample[rows["sigma"] == experience.trajectory.sigmas[k]]))
        assert float(found[steps == k].sum()) / compared == pytest.approx(slope, rel=1e-9)
        assert found[steps == k].abs().max() > 0
        for other in set(exact) - {k}:
            # The others' scores meet advantages that cancel.
            if name in FORKS:
                assert found[steps == other].abs().max() < 1e-12


def in_groups(k, groups):
    """Drawn noise that rows of a group share, but at step ``k``."""

    def noise(i, rows):
        drawn = draw("groups", k, i, (rows, 1))
        each = rows // groups
        return drawn if i == k else drawn[::each].repeat_interleave(each, 0)

    return noise


def sampled_slope(config, k, *, groups, noise):
    """The estimate of a step's slope from groups of 24 draws at step ``k`` or more, and its standard error.

    Times n / (n - 1) for n draws in a group, because each is part of its own baseline.
    """
    built = config.build()
    per_state = built.plan(0, 10).num_leaves
    # Children of one state are the draws where states split before k; else initial states are.
    fans = isinstance(config, tempflow_grpo.Config) or getattr(config, "num_children", 1) == 24
    members = 1 if fans else 24
    experience = play(built, groups=groups, members=members, same_latent=True, noise=noise(k, groups))
    rows, steps, found, _ = gradients(built, experience)
    here = rows["sigma"] == experience.trajectory.sigmas[k]
    leaves = len(torch.unique(rows.sample[here])) / groups
    transitions = torch.unique(torch.stack([rows.sample[here].double() // (members * per_state), rows["x_next"][here][:, 0]]), dim=1)
    draws = transitions.shape[1] / groups
    assert draws >= 24
    each = found[steps == k].view(groups, -1).sum(1) / leaves * draws / (draws - 1)
    return float(each.mean()), float(each.std()) / math.sqrt(groups)


SAMPLED = {
    **{name: config for name, (config, _) in (CHAINS | WINDOWS).items() if not name.endswith("one_state")},
    "flow_grpo_fast_from_one_state": flow_grpo_fast.Config(**WIDE, num_children=24),
    "mix_grpo_from_one_state": mix_grpo.Config(**WIDE, strategy="fixed", num_children=24),
    "tempflow_grpo": tempflow_grpo.Config(**WIDE, step_weight="uniform", num_children=24),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_drawn_noise_gives_the_exact_gradient_within_an_interval_of_one_percent(name):
    for k, slope in exact_slopes(name).items():
        mean, error = sampled_slope(SAMPLED[name], k, groups=1000, noise=in_groups)
        assert mean == pytest.approx(slope, abs=4.2 * error), k
        assert error < 0.01 * abs(slope), k


def test_independent_noise_everywhere_is_the_same_in_expectation():
    """No noise is shared: wider intervals, so only the steps whose slope stands out are told apart from 0."""
    built, groups, members = flow_grpo.Config(**WIDE).build(), 1500, 24
    _, steps, found, _ = gradients(built, play(built, groups=groups, members=members))
    for k, slope in exact_slopes("flow_grpo").items():
        each = found[steps == k].view(groups, members).mean(1) * members / (members - 1)
        error = float(each.std()) / math.sqrt(groups)
        assert float(each.mean()) == pytest.approx(slope, abs=4.2 * error)
        assert k < 3 or error < 0.1 * abs(slope)


def test_the_steps_add_up_to_what_moving_them_all_does():
    """One parameter in every step's velocity: central differences of E[x0], same noise on both sides, against the sum over trained steps."""
    built = flow_grpo.Config(**WIDE, train_last=True).build()
    by_steps = sum(slopes(SDE, SDE)[0])

    def reward(theta):
        return play(built, groups=4, members=2, velocity=lambda x, sigma: WORLD.velocity(x, sigma) + theta).trajectory.x0.mean()

    assert float(reward(0.01) - reward(-0.01)) / 0.02 == pytest.approx(by_steps, rel=1e-9)
    found = []
    for k in range(10):
        rows, steps, values, _ = gradients(built, play(built, groups=1, members=2, same_latent=True, noise=alone(k)))
        found.append(float(values[steps == k].mean()))
    assert sum(found) == pytest.approx(by_steps, rel=1e-9)


def test_guards_gradient_is_the_exact_one_over_each_steps_scale():
    built = grpo_guard.Config(**WIDE).build()
    exact = slopes(SDE, SDE)[0]
    for k in range(9):
        rows, steps, found, _ = gradients(built, play(built, groups=1, members=2, same_latent=True, noise=alone(k)))
        here = steps == k
        scale = rows["std"][here] / (rows["sigma"] - rows["sigma_next"])[here]
        assert float(found[here].mean()) == pytest.approx(exact[k] * float(scale[0]), rel=1e-9)


def test_guards_gradient_of_drawn_noise_is_the_exact_one_over_each_steps_scale():
    exact, sigmas = slopes(SDE, SDE)[0], flow_sigmas(10, dtype=torch.float64)
    for k in range(9):
        mean, error = sampled_slope(grpo_guard.Config(**WIDE), k, groups=1000, noise=in_groups)
        one = torch.ones(1, dtype=torch.float64)
        scale = float(SDE(one, one, sigmas[k], sigmas[k + 1]).std) / float(sigmas[k] - sigmas[k + 1])
        assert mean == pytest.approx(exact[k] * scale, abs=4.2 * error)
        assert error < 0.01 * abs(exact[k] * scale)
