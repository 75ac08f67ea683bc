"""The losses that training calls, against formulas written out here: signs, units, clips, and which row gets which advantage."""

import math
from dataclasses import replace

import pytest
import torch

from flowalign.algorithms import awm, flow_grpo
from flowalign.core.algorithm import Experience, Update
from flowalign.core.kernels import CPS, DDIM, DanceSDE, FlowSDE
from flowalign.core.rollout import Trajectory, rollout

SIGMAS = torch.tensor([1.0, 0.8, 0.55, 0.3, 0.0])
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
KEPT = torch.ones(6, dtype=torch.bool)
ADVANTAGE = torch.tensor([1.5, -0.5, -1.0, 0.25, 9.0, -9.0])
SLOPE = {"current": 0.7, "reference": 0.4, "ema": 0.9}


def velocities(current=SLOPE["current"]):
    """A velocity that is a role's number times x, and the current role's number as a leaf."""
    leaf = torch.tensor(current, requires_grad=True)
    return leaf, lambda x, sigma, sample, role: (leaf if role == "current" else SLOPE[role]) * x


def experience(trajectory, weight=None):
    advantage = ADVANTAGE[:, None]
    ones = torch.ones_like(advantage) if weight is None else weight[:, None]
    return Experience(
        trajectory=trajectory, advantage=advantage, weight=ones, keep=KEPT, prompt=100 + GROUP, group=GROUP, sample=torch.arange(6) % 3
    )


def images():
    x0 = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    return Trajectory(
        x_init=x0, x0=x0, sigmas=SIGMAS, transitions=rollout(lambda x, s: x, x0, SIGMAS, flow_plan("flow_sde"), lambda i: x0).transitions
    )


def flow_plan(kernel):
    return flow_grpo.Config(kernel=kernel).build().plan(0, 4)


def mean(x):
    return x.flatten(1).mean(1)


# -- AWM ------------------------------------------------------------------------------------------------------------------------


def awm_config(**changes):
    plain = {"weighting": "uniform", "levels": "uniform", "num_levels": 3, "reference_penalty": 0.0, "slow_penalty": 0.0}
    return awm.Config(**(plain | {"advantage_max": 5.0} | changes)).build()


def test_awm_rows_carry_their_images_advantage_clipped_scaled_and_weighted():
    weight = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.5, 0.0])
    rows = awm_config(advantage_clip=5.0, advantage_max=1.0).rows(experience(images(), weight), Update(seed=0, step=0, index=0))
    assert rows.sample.tolist() == [i for i in range(6) for _ in range(3)]
    assert torch.equal(rows["x0"], images().x0[rows.sample])
    expected = torch.tensor([1.5, -0.5, -1.0, 0.25, 5.0, -5.0]) / 5 * weight
    assert torch.allclose(rows["advantage"], expected[rows.sample])


def test_awm_levels_lie_one_in_each_stratum_and_noise_differs_between_levels():
    built = awm_config(lowest_level=0.2, num_levels=4)
    for step in range(5):
        rows = built.rows(experience(images()), Update(seed=0, step=step, index=0))
        levels = rows["sigma"].view(6, 4)
        assert (levels == levels[0]).all()
        assert ((levels[0] - 0.2) / 0.8 * 4).long().tolist() == [0, 1, 2, 3]
        noise = rows["noise"].view(6, 4, -1)
        assert (noise[:, 1:] != noise[:, :1]).any(-1).all()
    again = built.rows(experience(images()), Update(seed=0, step=4, index=0))
    assert torch.equal(again["noise"], rows["noise"])


def test_awm_discrete_levels_are_the_rollouts_and_never_pure_noise():
    built = awm_config(levels="discrete", num_levels=2, level_fraction=1.0)
    seen = set()
    for step in range(40):
        levels = built.rows(experience(images()), Update(seed=0, step=step, index=0))["sigma"].view(6, 2)[0]
        seen.add(tuple(round(float(level), 2) for level in levels))
    assert seen == {(0.8, 0.55), (0.8, 0.3)}


def test_awm_discrete_levels_may_begin_at_pure_noise():
    built = awm_config(levels="discrete_from_noise", num_levels=2, level_fraction=1.0)
    rows = [built.rows(experience(images()), Update(seed=0, step=step, index=0)) for step in range(40)]
    levels = [tuple(round(float(level), 2) for level in row["sigma"].view(6, 2)[0]) for row in rows]
    assert {first for first, _ in levels} == {1.0, 0.8}
    assert {second for _, second in levels} == {0.55, 0.3}
    # The released code's bins of 14 steps, of which the noisier 90 % are used.
    grid = torch.linspace(1, 0, 15)
    chosen = awm.discrete_levels(grid, 6, 0.9, [0.0] * 6, first=0)
    assert torch.equal(chosen, grid[[0, 2, 4, 6, 8, 10]])


def test_awm_minimises_the_advantage_times_the_matching_error_plus_the_penalties():
    built = awm_config(reference_penalty=0.3, slow_penalty=0.2)
    rows = built.rows(experience(images()), Update(seed=0, step=0, index=0))
    leaf, velocity = velocities()
    loss = built.loss("current", rows, velocity)
    level = rows["sigma"][:, None, None]
    x = (1 - level) * rows["x0"] + level * rows["noise"]
    error = mean((0.7 * x - (rows["noise"] - rows["x0"])).square())
    expected = rows["advantage"] * error + 0.3 * mean((0.3 * x).square()) + 0.2 * mean((-0.2 * x).square())
    assert torch.allclose(loss.value, expected, rtol=1e-5)
    slope = mean(2 * x * (0.7 * x - (rows["noise"] - rows["x0"])))
    expected = (rows["advantage"] * slope + 0.3 * mean(2 * 0.3 * x * x) + 0.2 * mean(2 * -0.2 * x * x)).sum()
    loss.value.sum().backward()
    assert float(leaf.grad) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("ratio", ["exp_first", "sum_first"])
def test_awm_clips_the_ratio_to_the_slow_copy_at_each_level_or_over_all(ratio):
    built = awm_config(clip=0.05, ratio=ratio)
    rows = built.rows(experience(images()), Update(seed=0, step=0, index=0))
    _, velocity = velocities()
    level = rows["sigma"][:, None, None]
    x = (1 - level) * rows["x0"] + level * rows["noise"]
    target = rows["noise"] - rows["x0"]
    log_ratio = mean((0.9 * x - target).square()) - mean((0.7 * x - target).square())
    if ratio == "sum_first":
        log_ratio = log_ratio.view(6, 3).mean(1).repeat_interleave(3)
    expected = [
        max(-a * math.exp(r), -a * min(max(math.exp(r), 0.95), 1.05))
        for a, r in zip(rows["advantage"].tolist(), log_ratio.tolist(), strict=True)
    ]
    assert built.loss("current", rows, velocity).value.tolist() == pytest.approx(expected, rel=1e-4)
    assert len({round(value, 5) for value in log_ratio.tolist()}) == (6 if ratio == "sum_first" else 18)


def test_own_levels_differ_from_image_to_image_and_fill_every_stratum():
    built = awm_config(levels="uniform", num_levels=4, lowest_level=0.2, own_levels=True)
    made = experience(images())
    rows = built.rows(made, Update(seed=0, step=0, index=0))
    levels = rows["sigma"].view(6, 4)
    strata = ((levels - 0.2) / 0.8 * 4).floor()
    assert torch.equal(strata, torch.arange(4.0).expand(6, 4).to(strata))
    assert len(torch.unique(levels)) == 24
    again = built.rows(made, Update(seed=0, step=0, index=0))
    assert torch.equal(rows["sigma"], again["sigma"])
    assert not torch.equal(rows["sigma"], built.rows(made, Update(seed=0, step=1, index=0))["sigma"])
    shared = awm_config(levels="uniform", num_levels=4, lowest_level=0.2).rows(made, Update(seed=0, step=0, index=0))
    assert len(torch.unique(shared["sigma"])) == 4
    assert torch.equal(shared["noise"], rows["noise"])


# -- Flow-GRPO ------------------------------------------------------------------------------------------------------------------


def sampled(kernel):
    """A rollout of the old policy, whose velocity is 0.7 x."""
    x = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(1))
    return rollout(
        lambda x, sigma: 0.7 * x, x, SIGMAS, flow_plan(kernel), lambda i: torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(i))
    )


def flow_config(**changes):
    return flow_grpo.Config(**({"kl_penalty": 0.0, "num_minibatches": 1, "clip": 0.5} | changes)).build()


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "ddim", "cps"])
def test_flow_grpo_follows_the_advantage_weighted_gradient_of_the_log_density(kernel):
    built = flow_config(kernel=kernel)
    rows = built.rows(experience(sampled(kernel)), Update(seed=0, step=0, index=0))
    assert sorted(rows.sample.tolist()) == sorted(list(range(6)) * 3)
    assert torch.equal(rows["advantage"], ADVANTAGE[rows.sample])  # clipping them belongs to the recipe
    leaf, velocity = velocities()
    loss = built.loss("current", rows, velocity)
    assert torch.allclose(loss.value, -rows["advantage"], atol=1e-5)
    loss.value.sum().backward()

    def log_density(slope):
        law = built.kernel(rows["x"].double(), slope * rows["x"].double(), rows["sigma"].double(), rows["sigma_next"].double())
        std = rows["std"].double()[:, None, None]
        return mean(-((rows["x_next"] - law.mean).square()) / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi))

    step = 1e-4
    slope = (log_density(0.7 + step) - log_density(0.7 - step)) / (2 * step)
    expected = float((-rows["advantage"] * slope).sum())
    assert float(leaf.grad) == pytest.approx(expected, rel=1e-3)
    assert abs(expected) > 0.01


def test_flow_grpo_leaves_rows_alone_whose_ratio_has_gone_far_enough():
    built = flow_config(clip=1e-6)
    rows = built.rows(experience(sampled("flow_sde")), Update(seed=0, step=0, index=0))
    leaf, velocity = velocities(0.75)
    loss = built.loss("current", rows, velocity)
    ratio, advantage = loss.metrics["ratio"], rows["advantage"]
    done = ((ratio > 1) & (advantage > 0)) | ((ratio < 1) & (advantage < 0))
    assert 0 < int(done.sum()) < len(done)
    assert torch.equal(loss.metrics["clip_fraction"].bool(), done)
    loss.value[done].sum().backward(retain_graph=True)
    assert float(leaf.grad) == 0
    loss.value[~done].sum().backward()
    assert float(leaf.grad) != 0


@pytest.mark.parametrize("unit", ["gaussian", "scaled"])
def test_flow_grpo_pays_for_the_distance_to_the_reference_in_the_unit_that_was_asked_for(unit):
    free, held = flow_config(), flow_config(kl_penalty=0.3, kl_unit=unit)
    rows = free.rows(experience(sampled("flow_sde")), Update(seed=0, step=0, index=0))
    _, velocity = velocities()
    cost = held.loss("current", rows, velocity).value - free.loss("current", rows, velocity).value
    args = rows["sigma"], rows["sigma_next"]
    means = [held.kernel(rows["x"], slope * rows["x"], *args).mean for slope in (0.7, 0.4)]
    divergence = mean((means[0] - means[1]).square()) / (2 * rows["std"].square())
    factor = (rows["sigma"] - rows["sigma_next"]) if unit == "scaled" else 1.0
    assert torch.allclose(cost, 0.3 * factor * divergence, rtol=1e-3, atol=1e-5)
    assert (cost > 0).all()


def test_flow_grpo_without_the_density_constant_scores_the_squared_distance():
    built = flow_config(kernel="cps", log_prob="unit", clip=10.0)
    rows = built.rows(experience(sampled("cps")), Update(seed=0, step=0, index=0))
    _, velocity = velocities(0.75)
    now, old = (built.kernel(rows["x"], s * rows["x"], rows["sigma"], rows["sigma_next"]).mean for s in (0.75, 0.7))
    log_ratio = mean((rows["x_next"] - old).square()) - mean((rows["x_next"] - now).square())
    assert torch.allclose(built.loss("current", rows, velocity).value, -rows["advantage"] * log_ratio.exp(), rtol=1e-4)


def test_an_advantage_for_each_step_reaches_its_step():
    built = flow_config()
    done = sampled("flow_sde")
    table = torch.arange(18.0).view(6, 3) / 10 - 0.9
    given = Experience(
        trajectory=done, advantage=table, weight=torch.ones(6, 3), keep=KEPT, prompt=GROUP, group=GROUP, sample=torch.arange(6) % 3
    )
    rows = built.rows(given, Update(seed=0, step=0, index=0))
    assert rows["advantage"].tolist() == pytest.approx(
        [float(table[s, int((level == SIGMAS).nonzero())]) for s, level in zip(rows.sample.tolist(), rows["sigma"], strict=True)]
    )


def test_the_estimators_weight_of_an_image_and_step_scales_its_advantage():
    built, done = flow_config(), sampled("flow_sde")
    weight = 0.5 + torch.arange(18.0).view(6, 3)
    given = Experience(
        trajectory=done, advantage=torch.ones(6, 3), weight=weight, keep=KEPT, prompt=GROUP, group=GROUP, sample=torch.arange(6) % 3
    )
    rows = built.rows(given, Update(seed=0, step=0, index=0))
    plain = built.rows(replace(given, weight=torch.ones(6, 3)), Update(seed=0, step=0, index=0))
    expected = [float(weight[s, int((level == SIGMAS).nonzero())]) for s, level in zip(rows.sample.tolist(), rows["sigma"], strict=True)]
    assert (rows["advantage"] / plain["advantage"]).tolist() == pytest.approx(expected)


def test_noise_levels_are_judged_by_the_chosen_kernel_alone():
    assert flow_grpo.Config(kernel="flow_sde", noise_level=2**0.5).build().kernel == FlowSDE(2**0.5)  # the memoryless one
    assert flow_grpo.Config(kernel="dance_sde", noise_level=1.5).build().kernel == DanceSDE(1.5)
    with pytest.raises(ValueError, match=r"CPS.noise_level: got 1.5"):
        flow_grpo.Config(kernel="cps", noise_level=1.5).build()


@pytest.mark.parametrize("kernel", ["ddim", "cps"])
def test_a_last_step_without_noise_is_not_trained(kernel):
    with pytest.raises(ValueError, match=f"the last step of {kernel} has no noise"):
        flow_grpo.Config(kernel=kernel, train_last=True)


def test_each_kernel_has_its_usual_noise():
    found = {kernel: flow_grpo.Config(kernel=kernel).build().kernel for kernel in ("flow_sde", "dance_sde", "ddim", "cps")}
    assert found == {"flow_sde": FlowSDE(0.7), "dance_sde": DanceSDE(0.3), "ddim": DDIM(1.0), "cps": CPS(0.8)}
