"""Worked examples of the recipes that compare samples of a group, and the identities between them."""

import dataclasses
import math

import pytest
import torch

from flowalign.estimators import RewardBatch, chain, estimate, from_config, recipe
from flowalign.estimators.compare import pareto_ranks
from flowalign.estimators.controllers import hypervolume, observe_gradients, reweigh
from flowalign.estimators.links import link, preference_margin
from flowalign.estimators.pairs import select_pairs
from flowalign.estimators.replay import draw, priorities
from flowalign.estimators.scale import beta_shape
from flowalign.estimators.stages import STAGES

B = [1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1]
B2 = [1, 0, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0]
C = [0.2, 0.4, 0.9, 0.5, -1, 0, 3, 2]
TWO = [[1, 5], [0, 6], [1, 5.5], [0, 6.5], [0, 6.2], [0, 5.8], [0, 6], [1, 6.4]]
METRIC = [0.1, 0.9, 0.5, 0.3]
ZERO4 = [0.0] * 4


def make(rewards, size=4, uid=None, **fields):
    values = torch.as_tensor(rewards, dtype=torch.float64)
    values = values if values.ndim == 2 else values[:, None]
    fields = {name: value if isinstance(value, torch.Tensor) else torch.tensor(value) for name, value in fields.items()}
    return RewardBatch(rewards=values, group_id=torch.arange(len(values)) // size, sample_uid=torch.arange(len(values)), **fields)


def advantage(name, batch, **options):
    batch = batch if isinstance(batch, RewardBatch) else make(batch)
    return estimate(name, batch, **options).advantage[:, 0].double()


def column(values, groups):
    return torch.tensor(values, dtype=torch.float64).repeat(groups)[:, None]


BASE_C = [[0.5]] * 4 + [[1.0]] * 4
WEIGHTS_C = column([1.0, 2.0, 3.0, 4.0], 2)
UNUSUAL = column([-1.0, -3.0, -2.0, -4.0], 4)
THINK = torch.tensor([[o, t] for o, t in zip(B, [0.2, 0.9, 0.8, 0.7, 0.9, 0.8, 0.7, 0.1] + [0.5] * 8, strict=True)])
TRUST = [1.499, -0.463153, -0.499667, -0.536181, 0.549046, 0.499508, 0.44997, -1.498525, *ZERO4, *ZERO4]
EXAMPLES = [
    ("reinforce_pp", make(C), {}, [-0.443614, -0.2823, 0.120986, -0.201643, -1.4115, -0.604929, 1.814786, 1.008214]),
    ("reinforce_pp_baseline", make(C), {}, [-0.247797, -0.082599, 0.330396, 0, -1.651982, -0.825991, 1.651982, 0.825991]),
    ("reinforce_pp_baseline", make(B), {}, [2.371708, *[-0.790569] * 3, *[0.790569] * 3, -2.371708, *ZERO4, *ZERO4]),
    ("remax", make(C, baseline=BASE_C), {}, [-0.3, -0.1, 0.4, 0, -2, -1, 2, 1]),
    ("opo", make(C, metric=WEIGHTS_C), {"metric": 0}, [-0.37, -0.17, 0.33, -0.07, -2.6, -1.6, 1.4, 0.4]),
    ("gpg", make(B), {}, [1.5, -0.5, -0.5, -0.5, 0.5, 0.5, 0.5, -1.5, *ZERO4, *ZERO4]),
    ("pass_at_k", make(C), {}, [0, 0, 1.358728, 0, 0, 0, 0.547722, 0]),
    ("gdpo", make(TWO), {}, [-0.233089, -0.377113, 0.377113, 0.233089, -0.088836, -1.308956, -0.698896, 2.096687]),
    ("gdpo", make([[0, 0], [0, 1], [0, 0], [1, 1]], size=2), {}, [-0.54768, 0.54768, -1.09536, 1.09536]),
    ("mix_grpo", make(TWO), {}, [-0.29587, -0.478727, 0.478727, 0.29587, -0.112702, -1.661895, -0.887298, 2.661895]),
    ("grpo", make(TWO), {"ddof": 1}, [-0.865726, -0.865726, 0.865726, 0.865726, -0.208653, -0.765063, -0.486858, 1.460574]),
    ("bnpo", make(B), {}, [0.742179, *[-0.247393] * 3, *[0.247393] * 3, -0.742179, *ZERO4, *ZERO4]),
    (
        "bnpo",
        make(B2),
        {},
        [0.667379, *[-0.22246] * 3, *[0.22246] * 3, -0.667379, *[0.350079] * 2, *[-0.350079] * 2] + [0.350079, -0.350079] * 2,
    ),
    ("ngrpo", make(B), {}, [1.095443, *[-0.730295] * 3, *[0.447213] * 3, -1.78885, *[-0.447213] * 4, *ZERO4]),
    ("ngrpo", make(C), {"r_max": 3.0}, [-0.697633, -0.523224, -0.087204, -0.43602, -1.321156, -0.770674, 0.880771, 0.330289]),
    ("canon", make(B2, metric=column(METRIC, 4)), {}, [1, -0.5, -0.5, 0, 0, 0.5, 0.5, -1, 0.5, 0.5, -0.5, -0.5, 0.5, -0.5, 0.5, -0.5]),
    (
        "canon",
        make(B2, metric=column(METRIC, 4)),
        {"mu": 0.0},
        [0.5, 0, 0, -0.5, 0.5, 0, 0, -0.5, 0.5, 0.5, -0.5, -0.5, 0.5, -0.5, 0.5, -0.5],
    ),
    (
        "canon",
        make(B2, metric=column(METRIC, 4)),
        {"mu": 0.5},
        [0.75, *[-0.25] * 3, *[0.25] * 3, -0.75, 0.5, 0.5, -0.5, -0.5, 0.5, -0.5, 0.5, -0.5],
    ),
    (
        "canon",
        make(B2, metric=column(METRIC, 4)),
        {"mu": 0.5, "alpha": 0.9, "discounted": "high"},
        [0.75, *[-0.25] * 3, 0.3, 0.2, 0.2, -0.7, 0.525, 0.45, -0.5, -0.475, 0.525, -0.5, 0.45, -0.475],
    ),
    ("bpo", make(C), {}, [-1.019046, -0.339682, 1.358728, 0, -1.095445, -0.547722, 1.095445, 0.547722]),
    (
        "drpo",
        make([1, 1, 0, 0], metric=column([0.9, 0.5, 0.2, 0.1], 1), log_prob=column([-0.5, -0.4, -0.3, -0.6], 1)),
        {},
        [0.982014, 0.017986, -0.507499, -0.492501],
    ),
    (
        "unlikeliness",
        make(B, log_prob=UNUSUAL),
        {"by": "log_prob"},
        [1.499996, *[-0.499999] * 3, 0.354737, 0.638527, 0.496632, -1.489895, *ZERO4, -1.161881, 0.387294, -0.387294, 1.161881],
    ),
    ("trust_grpo", make(THINK), {}, TRUST),
    ("weighted_grpo", make([1] + [0] * 7 + [1] * 7 + [0], size=8), {"negative": 2.0}, [2.625, *[-0.375] * 7, *[0.375] * 7, -2.625]),
    ("f_dpg", make(C[:4]), {"beta": 0.5}, [-0.6, -0.2, 0.8, 0]),
    ("f_dpg", make(C[:4]), {"beta": 0.5, "divergence": "forward_kl"}, [-0.522054, -0.286988, 0.938167, -0.129125]),
    ("f_dpg", make(C[:4]), {"beta": 0.5, "divergence": "jensen_shannon"}, [-0.267621, -0.120021, 0.419511, -0.031869]),
    ("f_dpg", make(C[:4]), {"beta": 0.5, "divergence": "total_variation"}, [-0.25, -0.25, 0.75, -0.25]),
    ("f_dpg", make(C[:4]), {"beta": 0.5, "divergence": "chi_square"}, [-1.084501, -0.804547, 2.443559, -0.554511]),
    ("heron", make(TWO[:4]), {}, [0.387253, -1.16176, 1.16176, -0.387253]),
]


@pytest.mark.parametrize(("name", "batch", "options", "expected"), EXAMPLES)
def test_recipes_give_the_worked_examples(name, batch, options, expected):
    assert advantage(name, batch, **options).tolist() == pytest.approx(expected, abs=2e-6)


def test_bpo_sets_the_target_ratios_of_the_worked_example():
    found = estimate("bpo", make(C)).target[:, 0].tolist()
    assert found == pytest.approx([0.91984, 0.983057, 1.128719, 1.016943, 0.900238, 0.946557, 1.099762, 1.053443], abs=1e-5)
    assert estimate("bpo", make(B)).target[:, 0].tolist() == pytest.approx([1.152319, *[1.0] * 6, 0.847681, *[1.0] * 8], abs=1e-5)


def test_targets_stay_inside_their_bounds_and_flat_groups_have_one():
    rewards = torch.randn(400, generator=torch.Generator().manual_seed(0))
    found = estimate("bpo", make(rewards), eps_low=0.1, eps_high=0.3).target
    assert 0.9 <= float(found.min()) < 1 < float(found.max()) <= 1.3
    assert (estimate("bpo", make([0.7] * 4), eps_low=0.1, eps_high=0.3).target == 1).all()


def test_targets_reach_every_trained_step():
    found = estimate("bpo", make(C, step_mask=torch.ones(8, 3, dtype=torch.bool))).target
    assert found.shape == (8, 3)
    assert torch.equal(found[:, 0], found[:, 2])


def test_dapo_keeps_the_groups_with_contrast():
    result = estimate("dapo", make(B))
    assert result.keep.tolist() == [True] * 8 + [False] * 8


def test_bnpo_logs_the_densities_of_the_worked_examples():
    for rewards, expected in ((B, 1.033333), (B2, 1.833333)):
        stats = estimate("bnpo", make(rewards)).stats
        assert (stats["alpha_0"], stats["beta_0"]) == pytest.approx((expected, expected), abs=1e-5)


def test_bnpo_without_spread_of_pass_rates_is_dr_grpo():
    rewards = [1, 0, 0, 0, 0, 1, 0, 0]
    assert torch.allclose(advantage("bnpo", rewards), advantage("dr_grpo", rewards))


def test_beta_of_three_halves_is_pi_eighths_of_grpo():
    # Moments of Beta(3/2, 3/2) pass rates: a = b = 3/2 in the density when the moment estimates are 3/2 as well.
    mean = torch.tensor([[0.5]], dtype=torch.float64)
    variance = mean * (1 - mean) / (1 + 3)  # a + b + 1 = 4 for a = b = 3/2
    alpha, beta = beta_shape(mean, variance)
    assert (float(alpha), float(beta)) == pytest.approx((1.5, 1.5))
    scaled = recipe("bnpo", momentum=0.999999999)
    state = {"2": {"mean": mean, "square": variance + mean.square()}}
    found, _ = scaled.update(make(B2), state)
    assert torch.allclose(found.advantage[:, 0].double(), math.pi / 8 * advantage("grpo", B2, eps=0.0), atol=1e-6)


def test_moving_moments_of_bnpo_forget_at_the_declared_rate():
    estimator = recipe("bnpo", momentum=0.75)
    _, state = estimator.update(make(B2), estimator.init())
    _, after = estimator.update(make([1, 1, 1, 0, 1, 1, 1, 0]), state)
    assert float(state["2"]["mean"]) == pytest.approx(0.5)
    assert float(after["2"]["mean"]) == pytest.approx(0.75 * 0.5 + 0.25 * 0.75)


def test_several_rewards_are_averaged_by_bnpo_each_with_its_own_density():
    second = torch.tensor([0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1.0])
    both = advantage("bnpo", make(torch.stack([torch.tensor(B2).double(), second.double()], 1)))
    apart = [advantage("bnpo", make(values)) for values in (B2, second)]
    assert torch.allclose(both, (apart[0] + apart[1]) / 2, atol=1e-6)


def test_ngrpo_without_virtual_samples_is_grpo_and_its_group_sums_have_a_closed_form():
    assert torch.equal(advantage("ngrpo", C, num=0, r_max=3.0), advantage("grpo", C, ddof=1, eps=1e-6))
    augmented = torch.tensor([*C[:4], 3.0], dtype=torch.float64)
    expected = -(3.0 - augmented.mean()) / augmented.std()
    assert float(advantage("ngrpo", C, r_max=3.0)[:4].sum()) == pytest.approx(float(expected), abs=1e-5)
    for size in (2, 3, 8):
        assert advantage("ngrpo", make([0.0] * size, size=size), eps=0.0).tolist() == pytest.approx([-1 / (size + 1) ** 0.5] * size)


def test_canon_at_one_half_is_dr_grpo_for_even_groups():
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(48, generator=generator, dtype=torch.float64)
    batch = make(rewards, size=6, metric=torch.rand(48, 1, generator=generator))
    assert torch.allclose(advantage("canon", batch, mu=0.5), advantage("dr_grpo", batch), atol=1e-6)


def test_canon_breaks_ties_of_the_metric_by_sample_id():
    batch = make([1.0, 0.0, 0.0, 0.0], metric=torch.zeros(4, 1))
    assert advantage("canon", batch, mu=0.0).tolist() == [0.5, -0.5, 0.0, 0.0]
    swapped = dataclasses.replace(batch, sample_uid=torch.tensor([3, 2, 1, 0]))
    assert advantage("canon", swapped, mu=0.0).tolist() == [0.5, -0.5, 0.0, 0.0]
    moved = dataclasses.replace(batch, sample_uid=torch.tensor([0, 2, 1, 3]))
    assert advantage("canon", moved, mu=0.0).tolist() == [0.5, 0.0, -0.5, 0.0]


def test_reverse_kl_is_dr_grpo_over_beta_and_forward_kl_a_softmax():
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(advantage("f_dpg", rewards, beta=0.3), advantage("dr_grpo", rewards) / 0.3, atol=1e-6)
    expected = (4 * torch.softmax(rewards.view(-1, 4) / 0.3, 1) - 1).flatten()
    assert torch.allclose(advantage("f_dpg", rewards, beta=0.3, divergence="forward_kl"), expected, atol=1e-6)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jensen_shannon", "total_variation", "chi_square"])
def test_f_dpg_survives_rewards_of_any_size(divergence):
    found = advantage("f_dpg", [0.0, 1e4, -1e4, 5e3], beta=0.01, divergence=divergence)
    assert torch.isfinite(found).all()
    assert found.argmax() == 1


def test_f_dpg_takes_the_distance_from_the_reference_into_account():
    log_ratio = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64)
    batch = make(C[:4], metric=log_ratio[:, None])
    found = advantage("f_dpg", batch, beta=0.5, log_ratio_metric=0)
    assert torch.allclose(found, advantage("dr_grpo", torch.tensor(C[:4]) / 0.5 - log_ratio), atol=1e-6)


def test_gdpo_of_one_reward_is_grpo_renormalised_and_mix_grpo_is_grpo():
    assert torch.allclose(advantage("mix_grpo", C), advantage("grpo", C, ddof=1, eps=1e-8), atol=1e-6)
    before = advantage("grpo", C, ddof=1)
    assert torch.allclose(advantage("gdpo", C), before / (before.std() + 1e-4), atol=1e-5)


def test_gdpo_weights_change_the_result_and_a_missing_reward_adds_nothing():
    plain, weighted = advantage("gdpo", make(TWO)), advantage("gdpo", make(TWO), reward_weights=(7.0, 1.0))
    assert float((plain - weighted).abs().max()) > 0.01
    partial = torch.tensor(TWO)
    partial[0, 1] = torch.nan
    result = estimate("mix_grpo", make(partial))
    assert result.keep.all()
    assert result.advantage[0, 0].item() == pytest.approx(advantage("mix_grpo", make(partial[:, :1]))[0].item(), abs=1e-6)


@pytest.mark.parametrize(
    "stages",
    [
        [{"stage": "weigh_rewards", "weights": [1.0, 7.0]}, {"stage": "center"}, {"stage": "scale_by_std", "ddof": 1, "eps": 1e-4}],
        [
            {"stage": "combine_rewards"},
            {"stage": "signed_outcome", "negative": 2.0},
            {"stage": "center"},
            {"stage": "scale_by_std", "ddof": 1, "eps": 1e-4},
        ],
        [
            {"stage": "combine_rewards"},
            {"stage": "weigh_by_hypervolume"},
            {"stage": "center"},
            {"stage": "scale_by_std", "ddof": 1, "eps": 1e-4},
        ],
    ],
)
def test_a_weight_that_a_standard_deviation_would_cancel_is_refused(stages):
    with pytest.raises(ValueError, match="standard deviations, ranks and signs undo weights given before them"):
        from_config([*stages, {"stage": "broadcast_steps"}])


@pytest.mark.parametrize("name", ["bnpo", "gdpo", "mix_grpo", "gradient_weights", "hypervolume", "grpo", "dapo"])
def test_every_declared_weight_has_an_effect(name):
    two = torch.rand(16, 2, generator=torch.Generator().manual_seed(0))
    before, after = (advantage(name, make(two), reward_weights=weights) for weights in ((1.0, 1.0), (7.0, 1.0)))
    assert float((after - before).abs().max()) > 0.01 * float(before.abs().max())


def test_decoupled_shares_sum_to_zero_and_a_plain_pass_is_never_punished():
    generator = torch.Generator().manual_seed(1)
    rewards = (torch.rand(64, generator=generator) > 0.5).double()
    batch = make(rewards, size=8, metric=torch.rand(64, 1, generator=generator), log_prob=-torch.rand(64, 3, generator=generator))
    found = advantage("drpo", batch)
    assert found.view(-1, 8).sum(1).abs().max() < 1e-6
    assert (found[rewards == 1] >= 0).all()
    assert not estimate("drpo", make([1.0] * 4, metric=torch.zeros(4, 1), log_prob=torch.zeros(4, 1))).keep.any()


@pytest.mark.parametrize(("variant", "expected"), [("vl", [1, 0.1, 1, 0.1]), ("llm", [1, 0.1, 0.1, 1])])
def test_adora_damps_the_groups_of_the_worked_example(variant, expected):
    metric = column([0.9, 0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.9, 0.1, 0.2, 0.3, 0.4, 0.1, 0.2, 0.3, 0.4], 1)
    rewards = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0, 0.1, 0.2, 0, 0.3, 1, 0.9, 0.8, 0.7])  # flat groups would hide the factor
    found = advantage("adora", make(rewards, metric=metric), variant=variant)
    plain = advantage("grpo", make(rewards), ddof=1, eps=1e-6)
    assert (found.view(-1, 4).abs().max(1).values / plain.view(-1, 4).abs().max(1).values).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("s_1", [0.25, 1, 1, 0.707107, 0]), ("s_2", [0, 0.707107, 1, 0.707107, 0]), ("s_3", [0, 0.707107, 1, 1, 1]), ("h_2", [0, 1, 1, 1, 0])],
)
def test_odsw_weighs_groups_by_difficulty_beside_the_advantage(schedule, expected):
    rewards = [0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1]
    result = estimate("odsw", make(rewards), schedule=schedule)
    assert result.weight[::4, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(result.advantage, estimate("grpo", make(rewards)).advantage)


def test_tw_grpo_weighs_steps_by_spread():
    steps = torch.tensor([[0, 1, 2], [0, 0, 4.0]])[..., None]
    result = estimate("tw_grpo", make([1.0, 0.0], size=2, step_rewards=steps))
    assert result.weight.tolist() == [pytest.approx([1, 1.175, 1.7], abs=1e-6)] * 2
    assert torch.equal(result.advantage, estimate("grpo", make([1.0, 0.0], size=2, step_rewards=steps)).advantage)


def test_weighted_grpo_trains_on_rare_successes_and_rare_failures_only():
    rewards = [*[1, 0, 0, 0], *[1, 1, 1, 0], *[1, 1, 0, 0], *[0] * 4, *[1] * 4]
    assert estimate("weighted_grpo", make(rewards)).keep.view(-1, 4).all(1).tolist() == [True, True, False, False, False]


def test_trust_fades_with_the_steps_and_only_where_failures_are_prettier():
    estimator = recipe("trust_grpo")
    first, state = estimator.update(make(THINK), estimator.init())
    assert state["0"]["step"] == 1
    later, _ = estimator.update(make(THINK), {"0": {"step": 500}})
    spread = [result.advantage[1:4, 0].std() for result in (first, later)]
    assert spread[1] < spread[0]


CLAUSES = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0.0]])


def clause_batch(clauses=CLAUSES, valid=None):
    strict = clauses.all(1).double()
    return make(strict, clauses=clauses, clauses_valid=torch.ones_like(clauses, dtype=torch.bool) if valid is None else valid)


def test_verpo_gives_the_worked_example_and_ignores_clauses_a_prompt_lacks():
    expected = [-0.146005, -0.727006, 1.600017, -0.727006]
    assert advantage("verpo", clause_batch()).tolist() == pytest.approx(expected, abs=1e-5)
    wide = torch.cat([CLAUSES, torch.ones(4, 1)], 1)
    valid = torch.tensor([[True, True, True, False]]).expand(4, 4)
    assert advantage("verpo", clause_batch(wide, valid)).tolist() == pytest.approx(expected, abs=1e-5)


def test_verpo_without_difficulty_counts_passes():
    found = advantage("verpo", clause_batch(), alpha=0.0, sigma=0.0, beta=1.0)
    strict = CLAUSES.all(1).double()
    expected = CLAUSES.double().sum(1) + strict
    assert found.tolist() == pytest.approx((expected - expected.mean()).tolist(), abs=1e-6)


def test_verpo_does_not_pay_for_what_everybody_can_do():
    easy, hard = torch.tensor([[1, 0.0], [1, 0], [1, 0], [0, 1]]), [-1, -1, -1, 3]
    found = advantage("verpo", clause_batch(easy))
    assert found[3] > found[0]
    assert torch.sign(found).tolist() == torch.sign(torch.tensor(hard)).tolist()


def test_heron_orders_by_level_and_margin():
    found = advantage("heron", make(TWO[4:]), order=(1, 0), margins=0.5, eps=0.0)
    score = torch.tensor([1 / 3, -1, -1 / 3, 1], dtype=torch.float64)
    assert torch.allclose(found, score / score.std(), atol=1e-6)
    with pytest.raises(ValueError, match="needed different columns from 0 to 1"):
        advantage("heron", make(TWO), order=(0, 2))


def test_pareto_ranks_by_front():
    points = [[1, 3], [2, 2], [3, 1], [1, 1], [2, 1], [0, 0]]
    batch = make(points, size=6)
    ranks = torch.tensor([0, 0, 0, 2, 1, 3.0]).double()
    assert torch.allclose(advantage("pareto", batch), advantage("grpo", make(-ranks, size=6)), atol=1e-6)
    assert estimate("pareto", batch, select="front").keep.tolist() == [True] * 3 + [False] * 3
    with pytest.raises(ValueError, match="a weight can be 1"):
        advantage("pareto", batch, reward_weights=(2.0, 1.0))


def test_pareto_boxes_make_more_samples_comparable():
    points = [[1.0, 0.95, 0.5], [0.95, 1.0, 0.4], [0.2, 0.3, 0.3]]
    found = advantage("pareto", make(points, size=3), box=0.1)
    assert found.argmin() == 2


def test_hypervolumes_agree_with_the_worked_example_and_with_a_grid():
    front = torch.tensor([[1.0, 3], [2, 2], [3, 1]])
    assert hypervolume(front, torch.zeros(2)) == 6
    assert hypervolume(torch.cat([front, torch.tensor([[2.5, 2.5]])]), torch.zeros(2)) - 6 == pytest.approx(1.25)
    points = torch.rand(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    axis = (torch.arange(60) + 0.5) / 60
    grid = torch.cartesian_prod(axis, axis, axis)
    slow = (grid[:, None] <= points[None]).all(2).any(1).double().mean()
    assert hypervolume(points, torch.zeros(3)) == pytest.approx(float(slow), abs=0.01)
    assert hypervolume(torch.cat([points, torch.ones(9, 1)], 1), torch.zeros(4)) == pytest.approx(float(slow), abs=0.015)


def test_steps_that_push_the_front_count_more():
    estimator = recipe("hypervolume")
    state = {"2": {"front": torch.tensor([[1, 3], [2, 2], [3, 1.0]]).double()}}
    rewards = torch.tensor([[2.0, 2.0], [3.0, 3.0]])
    pushed, after = estimator.update(make(rewards, size=2), state)
    assert pushed.stats["meta_reward"] == pytest.approx(1.772425, abs=1e-6)
    assert pushed.advantage[:, 0].tolist() == pytest.approx([-1.772425, 1.772425], abs=1e-5)
    assert len(after["2"]["front"]) == 3  # (2.5, 2.5) replaces (2, 2)
    dominated, _ = estimator.update(make(rewards - 1.9, size=2), state)
    assert dominated.stats["meta_reward"] == pytest.approx(0.5)


def test_agreeing_gradients_gain_weight():
    gram = torch.tensor([[5.0, 2, 0], [2, 2, 0.5], [0, 0.5, 1.25]], dtype=torch.float64)
    weights = torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64)
    assert reweigh(weights, gram, rate=0.1).tolist() == pytest.approx([0.493153, 0.288051, 0.218796], abs=1e-6)
    estimator = recipe("gradient_weights", reward_weights=(0.4, 0.3, 0.3))
    batch = make(torch.rand(8, 3, generator=torch.Generator().manual_seed(0)))
    _, after = estimator.update(batch, observe_gradients(estimator.init(), gram))
    result, _ = estimator.update(batch, after)
    assert [result.stats[f"weight_{k}"] for k in range(3)] == pytest.approx([0.493153, 0.288051, 0.218796], abs=1e-6)
    with pytest.raises(ValueError, match="gradient_weights"):
        observe_gradients(recipe("grpo").init(), gram)


def test_without_measured_gradients_a_reward_against_the_others_loses_weight():
    first = torch.rand(64, generator=torch.Generator().manual_seed(0))
    batch = make(torch.stack([first, first + 0.1 * torch.rand(64), -first], 1))
    estimator = recipe("gradient_weights")
    _, state = estimator.update(batch, estimator.init())
    assert state["2"]["weights"].argmin() == 2


def test_a_reward_is_trusted_less_with_every_step_and_less_where_it_prefers_the_wrong():
    def spread(step, think):
        """Difference between the right and the wrong sample of a group of two, less that of their outcomes."""
        estimator = chain(STAGES["trust_gate"](scale=0.3, decay_steps=500.0), STAGES["center"](), STAGES["broadcast_steps"]())
        batch = make([[1.0, think[0]], [0.0, think[1]]], size=2)
        found, after = estimator.update(batch, {"0": {"step": step}})
        assert after["0"]["step"] == step + 1
        return float(found.advantage[0, 0] - found.advantage[1, 0]) - 1

    assert spread(0, (0.9, 0.1)) == pytest.approx(0.3 * 0.8, abs=1e-6)
    assert spread(500, (0.9, 0.1)) == pytest.approx(0.3 * 0.8 / math.e, abs=1e-6)
    assert spread(0, (0.1, 0.9)) == pytest.approx(-0.3 * 0.8 * math.exp(-0.8), abs=1e-6)


def test_the_weight_of_a_density_is_bounded():
    ratios = []
    common = [("combine_rewards", {}), ("center", {})]
    for largest in (1e6, 0.8):
        scale = ("scale_by_beta_density", {"largest": largest})
        found, plain = (stage_output(*common, *extra, ("broadcast_steps", {}), rewards=B2) for extra in ([scale], []))
        ratios.append((found / plain).tolist())
    assert max(ratios[0]) > 0.8 > min(ratios[0])
    assert ratios[1] == pytest.approx([min(ratio, 0.8) for ratio in ratios[0]], abs=1e-6)


@pytest.mark.parametrize("prior", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_verpo_agrees_with_plain_loops(seed, prior):
    generator = torch.Generator().manual_seed(seed)
    clauses = (torch.rand(12, 3, generator=generator) < 0.5).double()
    valid = (torch.rand(3, 3, generator=generator) < 0.8).repeat_interleave(4, 0)
    found = advantage("verpo", clause_batch(clauses, valid), prior=prior, alpha=2.0, sigma=0.2, beta=0.7, delta=0.0).tolist()
    score = []
    for i in range(12):
        members = range(i // 4 * 4, i // 4 * 4 + 4)
        has = [c for c in range(3) if valid[i, c]]
        rate = {c: (sum(float(clauses[j, c]) for j in members) + prior) / (4 + 2 * prior) for c in has}
        weight = {c: math.exp(-2 * rate[c]) / sum(math.exp(-((rate[c] - rate[d]) ** 2) / (2 * 0.2**2)) for d in has) for c in has}
        score.append((float(all(clauses[i, c] for c in has)), sum(weight[c] * float(clauses[i, c]) for c in has)))
    for i in range(12):
        members = [score[j] for j in range(i // 4 * 4, i // 4 * 4 + 4)]
        strict, dense = ([member[k] for member in members] for k in (0, 1))
        expected = score[i][0] - sum(strict) / 4 + 0.7 * (score[i][1] - sum(dense) / 4)
        assert found[i] == pytest.approx(expected, abs=1e-6)


def test_the_front_keeps_its_newest_points():
    estimator = recipe("hypervolume", size=2)
    state = {"2": {"front": torch.tensor([[1, 4], [2, 3]]).double()}}
    _, after = estimator.update(make([[3.0, 2.0], [3.0, 2.0]], size=2), state)
    assert after["2"]["front"].tolist() == [[2, 3], [3, 2]]


def test_growth_with_four_rewards_is_measured_in_one_box():
    front = torch.tensor([[1.0, 0.2, 0.5, 0.5]]).double()
    state = {"2": {"front": front}}
    # A dominated point grows nothing, whatever the estimate of a volume is worth.
    pushed, _ = recipe("hypervolume").update(make([[0.5, 0.1, 0.4, 0.4]] * 2, size=2), state)
    assert pushed.stats["meta_reward"] == 0.5
    larger, _ = recipe("hypervolume").update(make([[1.0, 0.4, 0.5, 0.5]] * 2, size=2), state)
    assert larger.stats["meta_reward"] == pytest.approx(0.5 + 1.5 * math.tanh(0.05), abs=0.01)


def test_boxes_begin_at_their_lower_edge():
    assert pareto_ranks(torch.tensor([[0.19, 0.5], [0.11, 0.65]]).double(), torch.zeros(2, dtype=torch.int64), box=0.1).tolist() == [1, 0]


def test_a_smooth_shortfall_is_a_log_sum():
    rewards = torch.tensor([[1.0, 0.0], [0.2, 0.5]])
    found = stage_output(
        ("combine_by_shortfall", {"weights": (1.0, 2.0), "smoothing": 0.5}), ("center", {}), ("broadcast_steps", {}), rewards=rewards
    )
    smooth = [-0.5 * math.log(math.exp(0 / 0.5) + math.exp(2 * 0.5 / 0.5)), -0.5 * math.log(math.exp(0.8 / 0.5) + math.exp(0 / 0.5))]
    assert float(found[0] - found[1]) == pytest.approx(smooth[0] - smooth[1], abs=1e-6)


def test_a_sample_that_comes_again_replaces_its_earlier_entry():
    estimator = recipe("ssb")
    _, state = estimator.update(make(B), estimator.init())
    _, state = estimator.update(make([0.0, 0, 0, 1]), state)
    assert sorted(state["4"]["uid"].tolist()) == list(range(8))
    again = dict(
        zip(state["4"]["uid"].tolist(), zip(state["4"]["age"].tolist(), state["4"]["advantage"].tolist(), strict=True), strict=True)
    )
    assert [again[uid][0] for uid in range(8)] == [1] * 4 + [2] * 4
    assert again[0][1] == pytest.approx(-0.57725, abs=1e-3)
    assert again[3][1] == pytest.approx(1.73175, abs=1e-3)


@pytest.mark.parametrize("name", ["bnpo", "trust_grpo", "hypervolume", "gradient_weights", "ssb", "epo"])
def test_what_is_remembered_has_an_effect(name):
    estimator = recipe(name, **({"momentum": 0.9} if name == "bnpo" else {"rate": 2.0} if name == "gradient_weights" else {}))
    generator = torch.Generator().manual_seed(0)

    def batch(share):
        rewards = torch.rand(16, 2 if name not in ("bnpo", "ssb", "epo") else 1, generator=generator) * share
        uid = torch.arange(16) + int(100 * share)
        return dataclasses.replace(make(rewards, metric=torch.rand(16, 1, generator=generator) * share), sample_uid=uid)

    _, state = estimator.update(batch(0.1), estimator.init())
    second = batch(1.0)
    kept, after = estimator.update(second, state)
    fresh, afresh = estimator.update(second, estimator.init())
    if name == "ssb":  # it changes no advantage; what can be drawn later differs
        assert (len(after["4"]["uid"]), len(afresh["4"]["uid"])) == (32, 16)
        assert torch.equal(kept.advantage, fresh.advantage)
    else:
        assert float((kept.advantage - fresh.advantage).abs().max()) > 1e-4


def test_priorities_are_those_of_the_worked_example():
    found = priorities(advantage("grpo", B))
    assert found.tolist() == pytest.approx([0.25, *[1 / 12] * 6, 0.25, *ZERO4, *ZERO4], abs=1e-6)


def test_the_buffer_remembers_what_taught_something_and_forgets_by_age():
    estimator = recipe("ssb", max_age=2)
    result, state = estimator.update(make(B), estimator.init())
    assert torch.equal(result.advantage, estimate("grpo", make(B)).advantage)
    assert state["4"]["uid"].tolist() == list(range(8))
    later = dataclasses.replace(make([0.0, 0, 0, 1]), sample_uid=torch.arange(100, 104))
    _, state = estimator.update(later, state)
    assert state["4"]["age"].tolist() == [2] * 8 + [1] * 4
    _, state = estimator.update(dataclasses.replace(make([0.0] * 4), sample_uid=torch.arange(200, 204)), state)
    assert state["4"]["uid"].tolist() == [100, 101, 102, 103]


def test_replay_draws_by_priority_and_the_same_everywhere():
    estimator = recipe("ssb")
    _, state = estimator.update(make(B), estimator.init())
    assert torch.equal(draw(state, 3, seed=5).uid, draw(state, 3, seed=5).uid)
    assert len(draw(state, 100, seed=0).uid) == 8
    counts = torch.zeros(8)
    for seed in range(2000):
        counts[draw(state, 1, seed=seed).uid] += 1
    assert counts[0] / 2000 == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)
    with pytest.raises(ValueError, match="use the recipe 'ssb'"):
        draw(recipe("grpo").init(), 1, seed=0)


def test_pairs_are_the_best_and_the_worst_and_flat_groups_have_none():
    ids = torch.arange(12) // 4
    rewards = torch.tensor([*C, 0.1 * 3, 0.3, 0.3, 0.3], dtype=torch.float64)
    pairs = select_pairs(rewards, ids, torch.arange(12))
    assert (pairs.winner.tolist(), pairs.loser.tolist()) == ([2, 6], [0, 4])
    assert pairs.gap.tolist() == pytest.approx([0.7, 4.0])
    assert select_pairs(rewards, ids, torch.arange(12), margin=1.0).winner.tolist() == [6]
    every = select_pairs(rewards, ids, torch.arange(12), rule="all", margin=0.5)
    assert len(every.gap) == 2 + 6
    chained = chain(STAGES["combine_rewards"](), STAGES["best_against_worst"](), STAGES["broadcast_steps"]())
    assert chained.update(make(C), chained.init())[0].advantage[:, 0].tolist() == [-1, 0, 1, 0, -1, 0, 1, 0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reverse_kl", [0.306853, 1.0, 1.693147]),
        ("forward_kl", [-2, -1, -0.5]),
        ("jensen_shannon", [-0.405465, 0, 0.287682]),
        ("alpha", [-0.828427, 0, 0.585786]),
        ("total_variation", [-0.5, 0, 0.5]),
        ("chi_square", [-3, 0, 0.75]),
    ],
)
def test_links_are_those_of_the_worked_examples(name, expected):
    assert link(name, torch.tensor([0.5, 1, 2], dtype=torch.float64).log()).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "margin"), [("reverse_kl", 0.138629), ("forward_kl", 0.15), ("jensen_shannon", 0.069315), ("alpha", 0.141421)]
)
def test_preference_margins_are_those_of_the_worked_examples(name, margin):
    found = preference_margin(name, torch.tensor(2.0).log(), torch.tensor(0.5).log(), beta=0.1)
    assert float(found) == pytest.approx(margin, abs=1e-6)


def test_the_alpha_link_goes_from_reverse_to_forward_kl():
    log_u = torch.linspace(-2, 2, 9, dtype=torch.float64)
    assert torch.allclose(link("alpha", log_u, alpha=1e-7), link("reverse_kl", log_u) - 1, atol=1e-5)
    assert torch.allclose(link("alpha", log_u, alpha=1 - 1e-7), link("forward_kl", log_u) + 1, atol=1e-5)
    with pytest.raises(ValueError, match="did you mean 'reverse_kl'"):
        link("reverse-kl", log_u)


def stage_output(*stages, rewards=C):
    estimator = chain(*(STAGES[name](**options) for name, options in stages))
    return estimator.update(make(rewards), estimator.init())[0].advantage[:, 0].double()


def test_maps_to_probabilities_are_those_of_diffusion_nft():
    given = [-6, -2.5, 0, 1, 5]
    batch = make(given, size=5, baseline=torch.zeros(5, 1))
    for extra, expected in (
        ([("to_probability", {})], [0, 0.25, 0.5, 0.6, 1]),
        ([("sign", {}), ("to_probability", {"size": 1.0})], [0, 0, 0.5, 1, 1]),
    ):
        stages = [("subtract_given", {}), ("combine_advantages", {}), *extra, ("broadcast_steps", {})]
        estimator = chain(*(STAGES[name](**options) for name, options in stages))
        assert estimator.update(batch, {})[0].advantage[:, 0].tolist() == pytest.approx(expected)


def test_win_rates_count_ties_half():
    found = stage_output(("combine_rewards", {}), ("win_rate", {}), ("center", {}), ("broadcast_steps", {}), rewards=[3, 1, 1, 0])
    assert found.tolist() == pytest.approx([0.5, 0, 0, -0.5])


def test_medians_sides_and_constants():
    common = [("combine_rewards", {}), ("center_by_median", {})]
    found = stage_output(*common, ("scale_by_constant", {"value": 2.0}), ("keep_side", {"side": "positive"}), ("broadcast_steps", {}))
    assert found.tolist() == pytest.approx([0, 0, 0.225, 0.025, 0, 0, 1, 0.5])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("floor", [-1.176697, -0.392232, 1.568929, 0, -1.264911, -0.632456, 1.264911, 0.632456])],
)
def test_the_floor_rule_is_that_of_flow_factory(rule, expected):
    scale = ("scale_by_std", {"ddof": 0, "eps": 1e-6, "rule": rule})
    assert stage_output(("combine_rewards", {}), ("center", {}), scale, ("broadcast_steps", {})).tolist() == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"of": "residual", "ddof": 0, "eps": 1e-4}, [-0.264883, -0.088294, 0.353177, 0, -1.765887, -0.882944, 1.765887, 0.882944]),
        ({"of": "raw", "ddof": 1, "eps": 1e-4}, [-0.241952, -0.080651, 0.322603, 0, -1.613013, -0.806506, 1.613013, 0.806506]),
    ],
)
def test_batch_scales_differ_by_what_the_std_is_taken_over(options, expected):
    scale = ("scale_by_std", {"over": "batch", **options})
    assert stage_output(("combine_rewards", {}), ("center", {}), scale, ("broadcast_steps", {})).tolist() == pytest.approx(
        expected, abs=1e-5
    )


def test_a_running_mean_remembers_prompts_and_can_be_written():
    estimator = chain(STAGES["combine_rewards"](), STAGES["center_by_running_mean"](decay=1.0, min_count=3.0), STAGES["broadcast_steps"]())
    first, state = estimator.update(make([1.0, 0.0, 5.0, 7.0], size=2), estimator.init())
    assert first.advantage[:, 0].tolist() == pytest.approx([1 - 3.25, -3.25, 5 - 3.25, 7 - 3.25])
    later = dataclasses.replace(make([1.0, 0.0], size=2), group_id=torch.tensor([1, 1]))
    second, state = estimator.update(later, state)
    assert second.advantage[:, 0].tolist() == pytest.approx([1 - 3.25, 0 - 3.25])
    assert state["1"]["count"].flatten().tolist() == [2, 4]


def test_the_shortfall_from_the_best_reaches_what_sums_cannot():
    concave = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.45, 0.45], [0.0, 0.0]])
    shortfall = [("combine_by_shortfall", {}), ("center", {}), ("broadcast_steps", {})]
    total = [("combine_rewards", {}), ("center", {}), ("broadcast_steps", {})]
    assert stage_output(*shortfall, rewards=concave).argmax() == 2
    assert stage_output(*total, rewards=concave).argmax() != 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bnpo", {"low": 1.0, "high": 0.0}, "needed high above low"),
        ("bnpo", {"momentum": 1.0}, "needed a number in"),
        ("canon", {"mu": 2.0}, "needed a share"),
        ("f_dpg", {"beta": 0.0}, "needed a positive number"),
        ("bpo", {"eps_low": 1.0}, "needed 0 < low < 1"),
        ("ssb", {"capacity": 0}, "needed at least 1"),
        ("trust_grpo", {"scaling": 1.0}, "did you mean 'scale'"),
        ("gdpo", {"reward_weight": (1.0,)}, "did you mean 'reward_weights'"),
    ],
)
def test_options_without_sense_are_refused_when_the_recipe_is_built(name, options, message):
    with pytest.raises(ValueError, match=message):
        recipe(name, **options)


def test_wrong_numbers_of_rewards_and_weights_are_named():
    with pytest.raises(ValueError, match="needed two: the verifiable one and the learned one"):
        advantage("trust_grpo", make(torch.rand(4, 3)))
    with pytest.raises(ValueError, match="got 3 weights for 2 rewards"):
        advantage("gdpo", make(TWO), reward_weights=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="the clauses replace them"):
        advantage("verpo", make(TWO[:4], clauses=CLAUSES, clauses_valid=CLAUSES >= 0))
    with pytest.raises(ValueError, match="got 1 columns for 2 rewards"):
        advantage("remax", make(TWO, baseline=torch.zeros(8, 1)))


def gradient(name, **options):
    """Mean over many groups of advantage times score, for samples from N(0, 1) in the plane with reward x + 2 y."""
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(40_000, 2, generator=generator, dtype=torch.float64)
    reward = (score * torch.tensor([1.0, 2.0], dtype=torch.float64)).sum(1)
    batch = make(reward, size=8, metric=torch.rand(40_000, 1, generator=generator))
    return (advantage(name, batch, **options)[:, None] * score).mean(0)


@pytest.mark.parametrize(
    "name", ["reinforce_pp", "reinforce_pp_baseline", "opo", "gpg", "gdpo", "canon", "bpo", "f_dpg", "ngrpo", "pass_at_k"]
)
def test_the_mean_update_points_along_the_gradient_of_the_expected_reward(name):
    found = gradient(name, **({"r_max": 20.0} if name == "ngrpo" else {}))
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert float(torch.nn.functional.cosine_similarity(found, truth, dim=0)) > 0.99


# -- what single options do ---------------------------------------------------------------------------------------------------------


def test_a_higher_temperature_draws_bounded_targets_together():
    rewards = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    found = estimate("bpo", make(rewards), temperature=3.0).target[:, 0]
    distance = (rewards - 1.5) / rewards.std() / 3
    assert torch.allclose(found.double(), 0.8 + 0.4 * torch.sigmoid(distance), atol=1e-5)


def test_shares_of_decoupled_outcomes_follow_preference_and_likelihood():
    metric, log_prob = column([0.9, 0.5, 0.2, 0.1], 1), column([-0.5, -0.4, -0.3, -0.6], 1)
    batch = make([1, 1, 0, 0], metric=metric, log_prob=log_prob)
    found = advantage("drpo", batch, temperature=0.5, sharpness=0.8)
    passed = torch.softmax(metric[:2, 0].double() / 0.8, 0)
    failed = torch.softmax(log_prob[2:, 0].double() / 0.5, 0)
    assert found.tolist() == pytest.approx([*passed.tolist(), *(-failed).tolist()], abs=1e-5)


def test_the_threshold_of_a_pass_decides_which_groups_are_damped():
    batch = make([1.0, 0.9, 0.2, 0.0], metric=column([0.1, 0.8, 0.3, 0.3], 1))
    found = [advantage("adora", batch, threshold=threshold).abs().max().item() for threshold in (0.5, 0.95)]
    # At 0.95 only the first passes, whose metric does not exceed the others' mean.
    assert found[1] == pytest.approx(0.1 * found[0], rel=1e-5)


def test_volumes_are_measured_from_the_reference():
    batch = make([[1.5, 1.5], [1.5, 1.5]], size=2)
    for reference, volume in ((0.0, 2.25), (1.0, 0.25), (2.0, 0.0)):
        estimator = recipe("hypervolume", reference=reference)
        result, _ = estimator.update(batch, estimator.init())
        assert result.stats["meta_reward"] == pytest.approx(0.5 + 1.5 * math.tanh(volume), abs=1e-6)


def test_the_exponent_of_priorities_is_that_of_the_buffer():
    assert priorities(torch.tensor([2.0, -1.0]), alpha=2.0).tolist() == pytest.approx([0.8, 0.2])
    for alpha, expected in ((0.0, 1 / 8), (2.0, 1.5**2 / (2 * 1.5**2 + 6 * 0.5**2))):
        estimator = recipe("ssb", alpha=alpha)
        _, state = estimator.update(make(B), estimator.init())
        drawn = [int(draw(state, 1, seed=seed).uid[0]) for seed in range(2000)]
        share = drawn.count(0) / 2000
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 2000) ** 0.5)


def test_a_running_mean_forgets_at_its_rate():
    estimator = chain(STAGES["combine_rewards"](), STAGES["center_by_running_mean"](decay=0.5, min_count=1.0), STAGES["broadcast_steps"]())
    _, state = estimator.update(make([1.0, 3.0], size=2), estimator.init())
    found, _ = estimator.update(make([6.0, 6.0], size=2), state)
    mean = (0.5 * 2 * 2.0 + 2 * 6.0) / (0.5 * 2 + 2)
    assert found.advantage[:, 0].tolist() == pytest.approx([6 - mean] * 2, abs=1e-6)


def test_the_link_of_steps_takes_its_own_alpha():
    steps = torch.tensor([[0.3], [-0.2]])[..., None]
    batch = dataclasses.replace(make([0.0, 0.0], size=2), step_rewards=steps)
    stages = ["take_step_rewards", "combine_rewards", {"stage": "link_steps", "divergence": "alpha", "alpha": 0.25, "beta": 2.0}, "center"]
    found = from_config(stages).update(batch, {})[0].advantage[:, 0].tolist()
    value = [-2.0 * (1 - math.exp(0.25 * x)) / 0.25 for x in (0.3, -0.2)]
    assert found == pytest.approx([(value[0] - value[1]) / 2, (value[1] - value[0]) / 2], abs=1e-5)


def test_fronts_of_groups_and_of_the_batch_differ():
    batch = make([[1, 1], [2, 2], [3, 3], [4, 4]], size=2)
    for over, expected in (("batch", [False, False, False, True]), ("group", [False, True, False, True])):
        stages = ["combine_rewards", "center", {"stage": "keep_front", "over": over}, "broadcast_steps"]
        assert from_config(stages).update(batch, {})[0].keep.tolist() == expected


def test_pairs_closer_than_the_margin_teach_nothing():
    found = stage_output(("combine_rewards", {}), ("best_against_worst", {"margin": 1.0}), ("broadcast_steps", {}))
    assert found.tolist() == [0, 0, 0, 0, -1, 0, 1, 0]
