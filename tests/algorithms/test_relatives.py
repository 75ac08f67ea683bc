"""Windows, Guard and DPPO: where they train, and their trust regions in numbers."""

import math

import pytest
import torch

from flowalign.algorithms import flow_dppo, flow_grpo, flow_grpo_fast, grpo_guard, mix_grpo
from flowalign.core.algorithm import Rows, Update
from flowalign.core.gaussians import gaussian_kl
from flowalign.core.ratio_links import CentredClip, KLMask, PPOClip, RatioRows
from tests.algorithms.chains import draw, gradients, play

FREE = {"kl_penalty": 0.0, "num_minibatches": 1}


@pytest.mark.parametrize("kernel", ["cps", "ddim"])
def test_a_random_window_never_ends_where_its_kernel_has_no_noise(kernel):
    config = flow_grpo_fast.Config(**FREE, clip=0.5, kernel=kernel, limit=10)
    with pytest.raises(ValueError, match=f"limit: got 10 of 10 steps, but {kernel} has no noise in the last one"):
        config.place(0, 10, 0)
    assert flow_grpo_fast.Config(**FREE, clip=0.5, kernel="flow_sde", limit=10).place(0, 10, 0) in range(8)


def test_children_where_nothing_splits_are_refused():
    with pytest.raises(ValueError, match="num_children: got 6, but nothing splits"):
        flow_grpo.Config(num_children=6)
    with pytest.raises(ValueError, match="num_children: got 1, needed at least 2 where states split"):
        flow_grpo.Config(num_children=1, depths=(0,))


def test_guard_follows_the_flow_grpo_gradient_with_the_noise_of_the_step_over_its_size():
    guard, plain = grpo_guard.Config(**FREE, clip=0.5).build(), flow_grpo.Config(**FREE, clip=0.5).build()
    experience = play(guard, groups=3, members=8)
    _, _, found, loss = gradients(guard, experience)
    rows, _, expected, _ = gradients(plain, experience)
    assert torch.allclose(found, expected * rows["std"] / (rows["sigma"] - rows["sigma_next"]), rtol=1e-10)
    assert (loss.metrics["ratio"] - 1).abs().max() < 1e-12


def moved(std, change, elements=4096, rows=4000):
    """Rows whose mean has moved by ``change`` in every element, from draws with the given std."""
    noise = draw("moved", (rows, elements)).float().double()
    mean = torch.zeros(rows, elements, dtype=torch.float64)
    column = torch.full((rows,), std, dtype=torch.float64)
    table = Rows(
        sample=torch.arange(rows), columns={"x_next": std * noise, "mean": mean, "std": column, "advantage": torch.ones(rows).double()}
    )
    log_ratio = ((table["x_next"] - mean).square() - (table["x_next"] - mean - change).square()).mean(1) / (2 * std**2)
    return RatioRows(log_ratio=log_ratio, mean=mean + change, table=table)


def test_the_log_ratio_is_biased_and_guards_is_not_and_has_one_scale():
    rows = moved(0.3, 1e-3, rows=600)
    assert float(rows.log_ratio.mean()) == pytest.approx(-5.556e-6, abs=3.5 * 5.208e-5 / math.sqrt(600))
    assert float(rows.log_ratio.std()) == pytest.approx(5.208e-5, rel=0.1)
    assert rows.kl().tolist() == pytest.approx([5.5556e-6] * 600, rel=1e-4)
    for std in (0.3, 0.03):
        rows = moved(std, 1e-3, rows=600)
        centred = CentredClip(clip=1.0)(rows)[1]["centred_log_ratio"]
        exact = (rows.table["x_next"] / std * 1e-3).mean(1).abs()
        assert torch.allclose(centred, exact, rtol=1e-6, atol=1e-12)
        # |dmu| / d, whatever the std of the step.
        assert float(centred.square().mean().sqrt()) == pytest.approx(1.5625e-5, rel=0.1)


def ratio_rows(log_ratio, advantage, divergence):
    """One-element rows with std 1 whose mean moved so that the KL is what is asked for; the ratio is given, with gradient."""
    change = torch.tensor(divergence, dtype=torch.float64).mul(2).sqrt()[:, None]
    columns = {
        "x_next": torch.zeros_like(change),
        "mean": torch.zeros_like(change),
        "std": torch.ones(len(change)).double(),
        "advantage": torch.tensor(advantage).double(),
    }
    return RatioRows(log_ratio=log_ratio, mean=change, table=Rows(sample=torch.arange(len(change)), columns=columns))


@pytest.mark.parametrize(
    ("advantage", "ratio", "divergence", "trained"),
    [
        (1.0, 1.2, 0.2, False),
        (1.0, 1.2, 0.05, True),
        (1.0, 0.8, 0.2, True),
        (-1.0, 0.8, 0.2, False),
        (-1.0, 1.2, 0.2, True),
        (0.0, 1.2, 0.2, True),
    ],
)
def test_dppo_leaves_a_row_alone_beyond_its_divergence_and_only_in_the_direction_of_the_advantage(advantage, ratio, divergence, trained):
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    value, metrics = KLMask(delta=0.1)(ratio_rows(log_ratio, [advantage], [divergence]))
    assert float(value) == pytest.approx(-advantage * ratio)
    assert bool(metrics["clip_fraction"]) != trained
    if value.requires_grad:
        value.sum().backward()
    found = 0.0 if log_ratio.grad is None else float(log_ratio.grad)
    assert found == pytest.approx(-advantage * ratio if trained else 0.0)


def test_ppo_clips_on_the_ratio_where_dppo_looks_at_the_divergence():
    log_ratio = torch.tensor([0.5, 0.5], dtype=torch.float64)
    rows = ratio_rows(log_ratio, [1.0, 1.0], [0.01, 0.2])
    assert PPOClip(clip=0.1)(rows)[1]["clip_fraction"].tolist() == [1.0, 1.0]
    assert KLMask(delta=0.1)(rows)[1]["clip_fraction"].tolist() == [0.0, 1.0]
    assert torch.allclose(rows.kl(), gaussian_kl(rows.mean, rows.table["mean"], 1.0, reduction="mean"))


def test_fast_windows_are_drawn_by_the_seed_among_the_early_steps_and_differ_between_steps():
    config = flow_grpo_fast.Config()
    starts = [config.place(step, 10, 0) for step in range(60)]
    assert set(starts) == {0, 1, 2}
    assert starts == [config.place(step, 10, 0) for step in range(60)]
    assert starts != [config.place(step, 10, 1) for step in range(60)]
    assert {flow_grpo_fast.Config(first=2, limit=9).place(step, 10, 0) for step in range(100)} == {2, 3, 4, 5, 6}


def test_mix_windows_move_are_drawn_or_stay_and_never_hold_the_last_step():
    config = mix_grpo.Config(window=4)
    assert [config.place(step, 10, 0) for step in (0, 24, 25, 124, 125, 149, 150)] == [0, 0, 1, 4, 5, 5, 0]
    assert {mix_grpo.Config(window=4, strategy="random").place(step, 10, 0) for step in range(200)} == {0, 1, 2, 3, 4, 5}
    assert {mix_grpo.Config(window=4, strategy="fixed").place(step, 10, 0) for step in range(0, 900, 30)} == {0}
    for step in range(0, 400, 25):
        assert config.build().plan(step, 10, 0).trained[-1] <= 8


def test_samples_of_one_noise_part_at_the_window_and_share_what_comes_before():
    plan = mix_grpo.Config(num_children=12).build().plan(50, 10, 0)
    assert plan.trained == (2, 3, 4, 5)
    assert plan.num_leaves == 12
    assert plan.evaluations == 3 + 12 * 7  # 120 without sharing
    assert plan.training_evaluations == 1 + 12 * 3
    experience = play(mix_grpo.Config(**FREE, clip=0.5, num_children=12, strategy="fixed").build(), groups=2, members=1)
    rows = mix_grpo.Config(**FREE).build().rows(experience, Update(seed=0, step=0, index=0))
    assert len(rows) == 2 * 12 * 4
    assert len(rows.states()[0]) == 2 * (1 + 12 * 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flow_grpo_fast.Config(window=6).build().plan(0, 10), "window: 6 steps do not fit between step 0 and step 5 of 10"),
        (lambda: flow_grpo_fast.Config(limit=12).build().plan(0, 10), "do not fit between step 0 and step 12"),
        (
            lambda: flow_grpo_fast.Config(limit=10, first=7).build().plan(0, 10),
            "limit: got 10 of 10 steps, but cps has no noise in the last one",
        ),
        (lambda: mix_grpo.Config(window=10).build().plan(0, 10), "window: got size 10, needed 1 to 9"),
        (lambda: grpo_guard.Config(log_prob="unit").build(), "use gaussian"),
        (lambda: grpo_guard.Config(clip=0.0).build(), "clip: got 0.0"),
        (lambda: flow_dppo.Config(delta=0.0).build(), "delta: got 0.0"),
        (lambda: flow_grpo.Config(clip=-1.0).build(), "clip: got -1.0"),
        (lambda: flow_grpo.Config().build().plan(0, 1), "trains none of its 1 steps"),
        (lambda: flow_grpo.Config(noise_level=0.0), "without noise there is no log-prob; use awm"),
    ],
)
def test_a_window_or_kernel_that_cannot_be_used_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_flow_grpo_trains_some_steps_drawn_anew_for_each_rollout():
    """All steps have noise, as in DanceGRPO; which are trained is a matter of the rollout and the seed."""
    built = flow_grpo.Config(num_trained=2, kl_penalty=0.0).build()
    plans = [built.plan(step, 10, 0) for step in range(40)]
    assert all(len(plan.trained) == 2 for plan in plans)
    assert {step for plan in plans for step in plan.trained} == set(range(9))
    assert {tuple(plan.trained) for plan in plans} != {tuple(built.plan(step, 10, 1).trained) for step in range(40)}
    assert plans[3] == built.plan(3, 10, 0)
    assert [step.kernel for step in plans[0].steps] == [step.kernel for step in flow_grpo.Config(kl_penalty=0.0).build().plan(0, 10).steps]
    with pytest.raises(ValueError, match="num_trained: got 10, needed at most 9 of 10 steps"):
        flow_grpo.Config(num_trained=10).build().plan(0, 10)
    with pytest.raises(ValueError, match="num_trained: got 0, needed at least 1"):
        flow_grpo.Config(num_trained=0)
