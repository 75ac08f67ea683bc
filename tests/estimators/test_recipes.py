"""Worked examples, invariances in both directions, and what must never happen to a group."""

import json
from pathlib import Path

import pytest
import torch

from flowalign.estimators import RewardBatch, Tree, estimate, explain, from_config

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


def test_several_rewards_are_added_by_weight_and_one_missing_makes_a_sample_unscorable():
    rewards = torch.tensor([[1.0, 10.0], [0.0, 20.0], [1.0, float("nan")]])
    found = estimate("dr_grpo", make(rewards, groups=[0, 0, 0]), reward_weights=(1.0, 0.1))
    assert found.advantage[:, 0].tolist() == pytest.approx([0.0, 0.0, 0.0])
    assert found.keep.tolist() == [True, True, False]
    only_first = estimate("dr_grpo", make(rewards, groups=[0, 0, 0]), reward_weights=(1.0, 0.0))
    assert only_first.advantage[:, 0].tolist() == pytest.approx([1 / 3, -2 / 3, 1 / 3])


def test_rloo_is_dr_grpo_times_k_over_k_minus_one():
    rewards, groups = ragged(2)
    size = torch.bincount(groups)[groups].double()
    assert torch.allclose(
        advantages("rloo", rewards, groups=groups), advantages("dr_grpo", rewards, groups=groups) * size / (size - 1), atol=1e-6
    )


def test_ddof_scales_grpo_by_a_known_factor():
    assert torch.allclose(advantages("grpo", C, ddof=1, eps=0.0), advantages("grpo", C, eps=0.0) * (3 / 4) ** 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "ddof", "expected"),
    [
        *((size, 0, value) for size, value in ((4, 0.79788), (6, 0.86863), (8, 0.90270), (12, 0.93594), (16, 0.95225), (24, 0.96837))),
        *((size, 1, value) for size, value in ((4, 0.69099), (6, 0.79294), (8, 0.84440), (12, 0.89610), (16, 0.92202), (24, 0.94798))),
    ],
)
def test_group_std_shrinks_the_expected_gradient_by_the_known_factor(size, ddof, expected):
    groups = 20_000
    reward = torch.randn(groups * size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = advantages("grpo", reward, group_size=size, ddof=ddof, eps=0.0)
    products = (found * reward).view(groups, size).mean(1)
    assert float(products.mean()) == pytest.approx(expected, abs=4 * float(products.std()) / groups**0.5)


def test_a_mean_of_the_own_group_shrinks_the_gradient_of_a_quadratic_by_one_in_its_size():
    """Policy N(mu, 1), reward -(x - c)^2: the exact gradient is -2 (mu - c), the estimate (G - 1) / G of it."""
    groups, size, mu, c = 20_000, 24, 0.3, 1.0
    noise = torch.randn(groups * size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = advantages("dr_grpo", -((mu + noise - c) ** 2), group_size=size).double()
    each = (found * noise).view(groups, size).mean(1)
    assert (size - 1) / size == pytest.approx(0.958333, abs=1e-6)
    assert float(each.mean()) == pytest.approx(-2 * (mu - c) * (size - 1) / size, abs=4 * float(each.std()) / groups**0.5)
    assert float(each.std()) / groups**0.5 < 0.01


def test_flow_grpo_clips_at_five():
    rewards = [0.0] * 99 + [1.0]
    assert advantages("flow_grpo", rewards, group_size=100)[-1].item() == 5.0


@pytest.mark.parametrize("name", ["grpo", "reinforce_pp", "gdpo", "pareto"])
def test_every_recipe_counts_flat_groups_alike(name):
    nan = float("nan")
    rewards = [[1, 0], [1, 1], [0.3, 2], [0.1 + 0.2, 2], [5, 5], [nan, nan], [nan, nan], [1, 2], [nan, 2]]
    result = estimate(name, make(rewards, groups=[0, 0, 1, 1, 2, 3, 3, 4, 4]))
    assert result.stats["flat_groups"] == pytest.approx(4 / 5)  # all but the first: equal, alone, not scored, one scored


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
