"""Worked examples, invariances in both directions, and what must never happen to a group."""

import json
from pathlib import Path

import pytest
import torch

from flowalign.estimators import RewardBatch, Tree, config, estimate, explain, from_config, names, recipe

B = [1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1]
C = [0.2, 0.4, 0.9, 0.5, -1, 0, 3, 2]
ORACLES = Path(__file__).parents[3] / "shared" / "data" / "estimator_oracles.json"


def make(rewards, group_size=4, groups=None, dtype=torch.float64, **fields):
    values = torch.as_tensor(rewards, dtype=dtype)
    values = values if values.ndim == 2 else values[:, None]
    group = torch.arange(len(values)) // group_size if groups is None else torch.as_tensor(groups)
    return RewardBatch(rewards=values, group_id=group, sample_uid=torch.arange(len(values)), **fields)


def advantages(name, rewards, **options):
    fields = {key: options.pop(key) for key in ("group_size", "groups", "dtype") if key in options}
    return estimate(name, make(rewards, **fields), **options).advantage[:, 0].double()


def ragged(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 7, (5,), generator=generator)
    groups = torch.repeat_interleave(torch.arange(5), sizes)
    kind = seed % 3
    rewards = torch.rand(len(groups), generator=generator, dtype=torch.float64)
    rewards = [rewards, (rewards > 0.5).double(), torch.randn(len(groups), generator=generator, dtype=torch.float64)][kind]
    return rewards, groups


@pytest.mark.parametrize(
    ("name", "options", "inputs", "expected"),
    [
        ("grpo", {"ddof": 1}, B, [1.4997, -0.4999, -0.4999, -0.4999, 0.4999, 0.4999, 0.4999, -1.4997] + [0.0] * 8),
        ("grpo", {"ddof": 1}, C, [-1.018703, -0.339568, 1.358271, 0, -1.095385, -0.547693, 1.095385, 0.547693]),
        ("grpo", {}, C, [-1.176235, -0.392078, 1.568314, 0, -1.264831, -0.632416, 1.264831, 0.632416]),
        ("flow_grpo", {}, C, [-0.258656, -0.086219, 0.344875, 0, -1.724374, -0.862187, 1.724374, 0.862187]),
        ("flow_grpo", {}, B, [1.4997, -0.4999, -0.4999, -0.4999, 0.4999, 0.4999, 0.4999, -1.4997] + [0.0] * 8),
        ("dr_grpo", {}, C, [-0.3, -0.1, 0.4, 0, -2, -1, 2, 1]),
        ("rloo", {}, C, [-0.4, -0.133333, 0.533333, 0, -2.666667, -1.333333, 2.666667, 1.333333]),
        ("rloo", {}, B, [1, -0.333333, -0.333333, -0.333333, 0.333333, 0.333333, 0.333333, -1] + [0.0] * 8),
    ],
)
def test_recipes_give_the_worked_examples(name, options, inputs, expected):
    # The table writes 1.5 / (1 + eps) rounded to four digits for binary groups.
    tolerance = 2e-3 if inputs is B and name != "rloo" else 1e-5
    assert advantages(name, inputs, **options).tolist() == pytest.approx(expected, abs=tolerance)


@pytest.mark.skipif(not ORACLES.is_file(), reason="the worked examples are not beside the repository")
@pytest.mark.parametrize(
    ("entry", "name", "options"),
    [("grpo.C.ddof0,+1e-4", "grpo", {}), ("grpo.C.trl(ddof1,+1e-4)", "grpo", {"ddof": 1}), ("flow_grpo.global.C", "flow_grpo", {})]
    + [("dr_grpo.C", "dr_grpo", {}), ("rloo.C", "rloo", {}), ("rloo.B", "rloo", {})],
)
def test_recipes_agree_with_the_file_of_worked_examples(entry, name, options):
    expected = json.loads(ORACLES.read_text())[entry]
    assert advantages(name, B if ".B" in entry else C, **options).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", names())
def test_order_ids_and_batch_layout_change_nothing(name):
    for seed in range(6):
        rewards, groups = ragged(seed)
        expected = estimate(name, make(rewards, groups=groups)).advantage
        order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
        ids = torch.tensor([2**62, 7, -3, 2**40 + 1, 11])[groups]
        shuffled = RewardBatch(rewards=rewards[order][:, None], group_id=ids[order], sample_uid=order)
        assert torch.equal(estimate(name, shuffled).advantage, expected[order])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", names())
def test_splitting_over_ranks_changes_nothing(name, ranks):
    rewards, groups = ragged(2)
    whole = estimate(name, make(rewards, groups=groups)).advantage
    uid = torch.arange(len(rewards))
    for parts in ([uid[rank::ranks] for rank in range(ranks)], list(uid.chunk(ranks))):
        gathered = torch.cat(parts)
        batch = RewardBatch(rewards=rewards[gathered][:, None], group_id=groups[gathered] + 2**61, sample_uid=gathered)
        assert (estimate(name, batch).advantage - whole[gathered]).abs().max() < 1e-12


FLAT = [0.0, 0.1, 0.7, 21.7, -3.0, 1e-12, 1e6]


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 12, 24])
def test_a_flat_group_gets_exactly_zero(name, dtype, size):
    for value in FLAT:
        found = advantages(name, [value] * size + [0.0, 1.0], groups=[0] * size + [1, 1], dtype=dtype)
        assert found[:size].tolist() == [0.0] * size


@pytest.mark.parametrize("name", names())
def test_a_group_of_one_gets_zero_and_is_kept(name):
    result = estimate(name, make([3.0, 0.0, 1.0], groups=[5, 6, 6]))
    assert result.advantage[0].item() == 0.0
    assert result.keep.all()


@pytest.mark.parametrize("name", names())
def test_a_missing_reward_is_left_out_and_changes_nobody_else(name):
    result = estimate(name, make([1.0, 0.0, float("nan"), 0.5, 0.25], groups=[0, 0, 0, 0, 1]))
    without = estimate(name, make([1.0, 0.0, 0.5, 0.25], groups=[0, 0, 0, 1]))
    assert result.advantage[2].item() == 0.0
    assert result.keep.tolist() == [True, True, False, True, True]
    assert torch.equal(result.advantage[[0, 1, 3, 4]], without.advantage)


@pytest.mark.parametrize("name", names())
def test_a_group_without_any_reward_is_dropped_and_output_is_finite(name):
    result = estimate(name, make([float("nan")] * 3 + [0.0, 1.0], groups=[0, 0, 0, 1, 1]))
    assert not result.keep[:3].any()
    assert torch.isfinite(result.advantage).all()
    assert result.advantage.dtype == torch.float32


def test_several_rewards_are_added_by_weight_and_one_missing_makes_a_sample_unscorable():
    rewards = torch.tensor([[1.0, 10.0], [0.0, 20.0], [1.0, float("nan")]])
    found = estimate("dr_grpo", make(rewards, groups=[0, 0, 0]), reward_weights=(1.0, 0.1))
    assert found.advantage[:, 0].tolist() == pytest.approx([0.0, 0.0, 0.0])
    assert found.keep.tolist() == [True, True, False]
    only_first = estimate("dr_grpo", make(rewards, groups=[0, 0, 0]), reward_weights=(1.0, 0.0))
    assert only_first.advantage[:, 0].tolist() == pytest.approx([1 / 3, -2 / 3, 1 / 3])


def holds(claim, name, rewards, groups):
    """Whether an invariance holds on one batch."""
    base = advantages(name, rewards, groups=groups)
    if claim == "shift":
        return torch.allclose(advantages(name, rewards + 5.0, groups=groups), base, atol=1e-5)
    if claim == "shift_per_group":
        return torch.allclose(advantages(name, rewards + 3.0 * groups, groups=groups), base, atol=1e-5)
    if claim == "scale":
        # eps is added to the std: the tolerance is eps over the smallest std in these batches.
        return torch.allclose(advantages(name, rewards * 3, groups=groups), base, atol=5e-3)
    if claim == "zero_mean":
        sums = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add(0, groups, base)
        return bool((sums.abs() < 1e-5).all())
    if claim == "monotone":
        pairs = (groups[:, None] == groups[None]) & (rewards[:, None] > rewards[None])
        return bool((base[:, None] >= base[None] - 1e-6)[pairs].all())
    if claim == "local":
        other = torch.where(groups == 0, rewards, rewards * 2 + 0.3)
        return torch.allclose(advantages(name, other, groups=groups)[groups == 0], base[groups == 0], atol=1e-6)
    flat = torch.where(groups == 0, torch.full_like(rewards, 0.7), rewards)
    return bool((advantages(name, flat, groups=groups)[groups == 0] == 0).all())


@pytest.mark.parametrize("name", names())
def test_every_claim_holds_and_every_unclaimed_invariance_has_a_counterexample(name):
    claims = vars(config(name).claims)
    batches = [ragged(seed) for seed in range(12)]
    for claim, claimed in claims.items():
        results = [holds(claim, name, *batch) for batch in batches if claim != "scale" or smallest_std(*batch) > 0.05]
        assert all(results) if claimed else not all(results), f"{name}: {claim} is {'' if claimed else 'not '}claimed"


def smallest_std(rewards, groups):
    return min(float(rewards[groups == g].std(unbiased=False)) for g in groups.unique())


def test_rloo_is_dr_grpo_times_k_over_k_minus_one():
    rewards, groups = ragged(2)
    size = torch.bincount(groups)[groups].double()
    assert torch.allclose(
        advantages("rloo", rewards, groups=groups), advantages("dr_grpo", rewards, groups=groups) * size / (size - 1), atol=1e-6
    )


def test_ddof_scales_grpo_by_a_known_factor():
    assert torch.allclose(advantages("grpo", C, ddof=1, eps=0.0), advantages("grpo", C, eps=0.0) * (3 / 4) ** 0.5, atol=1e-6)


@pytest.mark.parametrize(("size", "expected"), [(4, 0.79788), (8, 0.90270), (24, 0.96837)])
def test_group_std_shrinks_the_expected_gradient_by_the_known_factor(size, expected):
    groups = 40_000
    reward = torch.randn(groups * size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = advantages("grpo", reward, group_size=size, eps=0.0)
    products = (found * reward).view(groups, size).mean(1)
    assert float(products.mean()) == pytest.approx(expected, abs=4 * float(products.std()) / groups**0.5)


def test_flow_grpo_clips_at_five():
    rewards = [0.0] * 99 + [1.0]
    assert advantages("flow_grpo", rewards, group_size=100)[-1].item() == 5.0


def test_state_survives_a_round_trip():
    estimator = recipe("grpo")
    state = estimator.init()
    result, after = estimator.update(make(C), state)
    again, _ = estimator.update(make(C), after)
    assert torch.equal(result.advantage, again.advantage)


def test_advantages_are_repeated_over_steps_and_masked():
    mask = torch.tensor([[True, True], [True, False], [True, True], [False, True]])
    result = estimate("dr_grpo", make([1.0, 0.0, 0.0, 0.0], step_mask=mask))
    assert result.advantage.tolist() == [[0.75, 0.75], [-0.25, 0.0], [-0.25, -0.25], [0.0, -0.25]]


def test_stages_can_be_written_down_in_a_configuration():
    written = [
        {"stage": "combine_rewards"},
        {"stage": "center"},
        {"stage": "scale_by_std", "ddof": 0, "eps": 1e-4},
        {"stage": "broadcast_steps"},
    ]
    estimator = from_config(written)
    result, _ = estimator.update(make(C), estimator.init())
    assert torch.equal(result.advantage, estimate("grpo", make(C)).advantage)
    assert explain("grpo").splitlines()[1] == "2. center(over=group)"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpro", "did you mean 'grpo'"),
        ({"type": "grpo", "esp": 1}, "did you mean 'eps'"),
        ([{"stage": "centre"}], "did you mean 'center'"),
        ([{"stage": "center"}, {"stage": "combine_rewards"}, {"stage": "broadcast_steps"}], "stage 2 \\(combine_rewards\\) takes phase"),
        ([{"stage": "combine_rewards"}, {"stage": "center"}], "does not end in advantages"),
    ],
)
def test_mistakes_in_a_configuration_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        from_config(spec)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rewards": torch.tensor([[1.0], [float("inf")]])}, r"rewards\[1, 0\]: got inf for sample 1"),
        ({"sample_uid": torch.tensor([3, 3])}, "3 occurs more than once"),
        ({"group_id": torch.tensor([0.0, 1.0])}, "needed integers"),
        ({"group_id": torch.tensor([0])}, "got 1 rows for 2 samples"),
        ({"rewards": torch.tensor([1.0, 2.0])}, "needed \\[batch, rewards\\]"),
    ],
)
def test_a_broken_batch_is_refused_with_the_place(fields, message):
    good = {"rewards": torch.zeros(2, 1), "group_id": torch.tensor([0, 0]), "sample_uid": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        RewardBatch(**{**good, **fields})


def test_a_tree_with_a_cycle_or_an_orphan_is_refused():
    index = torch.zeros(3, dtype=torch.int64)
    rest = {"prompt": index, "leaf_of_sample": index, "edge_start": index, "edge_end": index}
    assert Tree(parent=torch.tensor([-1, 0, 1]), **rest).depth().tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="its own ancestor"):
        Tree(parent=torch.tensor([-1, 2, 1]), **rest)
    with pytest.raises(ValueError, match="does not exist"):
        Tree(parent=torch.tensor([-1, 7, 1]), **rest)
