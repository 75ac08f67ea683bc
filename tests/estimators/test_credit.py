"""What every recipe with credit per step, over trees or by diversity claims; and what must never happen to a group."""

import dataclasses

import pytest
import torch

from flowalign.estimators import RewardBatch, config, estimate
from flowalign.estimators.claims import INVARIANCES
from tests.estimators.worlds import change, take, world

TREES = ["spo_tree", "tree_rl", "tree_rpo", "tree_grpo", "branch_grpo"]
NAMES = [*TREES, "process", "gigpo", "spo_chain", "turning_point", "steer", "epo"]
IDS = torch.tensor([2**62, 7, -3, 2**40 + 1, 11])


def tables(name, mask=False):
    return (*config(name).claims.needs, *(["step_mask"] if mask else []))


def same(left, right, atol=0.0):
    return all(torch.allclose(getattr(left, part), getattr(right, part), rtol=0, atol=atol) for part in ("advantage", "weight"))


@pytest.mark.parametrize("name", NAMES)
def test_order_and_ids_change_no_bit(name):
    for seed in range(4):
        batch = world(seed, mask=seed % 2 == 1, tables=tables(name, seed % 2 == 1))
        result = estimate(name, batch)
        order = torch.randperm(len(batch.rewards), generator=torch.Generator().manual_seed(seed))
        shuffled = estimate(name, take(batch, order, relabel=IDS))
        assert torch.equal(shuffled.advantage, result.advantage[order])
        assert torch.equal(shuffled.weight, result.weight[order])


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_splitting_over_ranks_changes_nothing(name, ranks):
    batch = world(2, tables=tables(name))
    whole, uid = estimate(name, batch).advantage, batch.sample_uid
    for parts in ([uid[rank::ranks] for rank in range(ranks)], list(uid.chunk(ranks))):
        gathered = torch.cat(parts)
        found = estimate(name, take(batch, gathered, relabel=torch.arange(5) + 2**61)).advantage
        assert (found - whole[gathered]).abs().max() < 1e-12


@pytest.mark.parametrize("name", [name for name in NAMES if config(name).claims.zero_when_flat])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, 21.7, -3.0, 1e-12, 1e6])
def test_a_flat_group_gets_exactly_zero(name, dtype, value):
    for size in (2, 3, 12, 24):
        rewards = torch.tensor([value] * size + [0.0, 1.0, 0.3], dtype=dtype)
        groups = [0] * size + [1, 1, 1]
        result = estimate(name, world(size, rewards=rewards, groups=groups, dtype=dtype, tables=tables(name)))
        assert not result.advantage[:size].any()
        assert result.advantage[size:].any()


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"spo_chain", "process"}))
def test_a_group_of_one_gets_zero_and_is_kept(name):
    result = estimate(name, world(0, rewards=[3.0, 0.0, 1.0], groups=[5, 6, 6], tables=tables(name)))
    assert not result.advantage[0].any()
    assert result.keep.all()


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_reward_is_left_out_and_changes_nobody_else(name):
    for seed in range(3):
        rewards = [1.0, 0.0, float("nan"), 0.5, 0.25, 0.7, 0.1]
        batch = world(seed, rewards=rewards, groups=[0, 0, 0, 0, 1, 1, 1], tables=tables(name))
        others = torch.tensor([0, 1, 3, 4, 5, 6])
        result, without = estimate(name, batch), estimate(name, take(batch, others))
        assert not result.advantage[2].any()
        assert result.keep.tolist() == [True, True, False, True, True, True, True]
        assert torch.equal(result.advantage[others], without.advantage)
        assert torch.equal(result.weight[others], without.weight)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_is_finite_float32_and_a_group_without_any_reward_is_dropped(name, dtype):
    nan = float("nan")
    for scale in (1e-12, 1.0, 1e12):
        rewards = torch.tensor([nan, nan, nan, 0.0, 1.0, 0.5], dtype=dtype) * scale
        result = estimate(name, world(1, rewards=rewards, groups=[0, 0, 0, 1, 1, 1], dtype=dtype, tables=tables(name)))
        assert result.keep.tolist() == [False] * 3 + [True] * 3
        for table in (result.advantage, result.weight):
            assert torch.isfinite(table).all()
            assert table.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_float32_rewards_give_what_the_same_numbers_in_float64_give(name):
    batch = world(4, tables=tables(name))
    rounded = change(batch, lambda value, group: value.float().double())
    assert same(estimate(name, rounded), estimate(name, change(batch, lambda value, group: value.float())))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_needs_an_algorithm_that_is_not_deterministic(name):
    torch.use_deterministic_algorithms(True)
    try:
        result = estimate(name, world(5, mask=True, tables=tables(name, mask=True)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert result.advantage.any()


def test_a_batch_without_samples_is_refused():
    empty = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="got no samples; gather the samples of all ranks"):
        RewardBatch(rewards=torch.zeros(0, 1), group_id=empty, sample_uid=empty)


# -- claims -------------------------------------------------------------------------------------------------------------------------


def paid(name, batch, **options):
    """What training multiplies the gradient of each step by; each shared edge of a tree is counted once."""
    result = estimate(name, batch, **options)
    return (result.advantage * result.weight).double()


def holds(claim, name, batch):
    """Whether an invariance holds on one batch, at every step."""
    base, groups = paid(name, batch), batch.group_id
    if claim == "shift":
        return torch.allclose(paid(name, change(batch, lambda v, g: v + 5.0)), base, atol=1e-5)
    if claim == "shift_per_group":
        return torch.allclose(paid(name, change(batch, lambda v, g: v + 3.0 * g)), base, atol=1e-5)
    if claim == "scale":
        exact = {"eps": 1e-9} if hasattr(config(name), "eps") else {}
        return torch.allclose(paid(name, change(batch, lambda v, g: v * 3), **exact), paid(name, batch, **exact), atol=1e-3)
    if claim == "zero_mean":
        sums = torch.zeros(int(groups.max()) + 1, base.shape[1], dtype=torch.float64).index_add(0, groups, base)
        return bool((sums.abs() < 1e-5).all())
    if claim == "monotone":
        rewards = batch.rewards[:, 0]
        pairs = (groups[:, None] == groups[None]) & (rewards[:, None] > rewards[None])
        return bool((base[:, None] >= base[None] - 1e-6)[pairs].all())
    if claim == "local":
        other = change(batch, lambda v, g: torch.where(g == 0, v, v * 2 + 0.3))
        if batch.metric is not None:
            other = dataclasses.replace(other, metric=torch.where(groups[:, None] == 0, batch.metric, batch.metric * 2 + 0.3))
        return torch.allclose(paid(name, other)[groups == 0], base[groups == 0], atol=1e-6)
    flat = change(batch, lambda v, g: torch.where(g == 0, 0.7, v))
    return not paid(name, flat)[groups == 0].any()


@pytest.mark.parametrize("name", NAMES)
def test_every_claim_holds_and_every_unclaimed_invariance_has_a_counterexample(name):
    claims = config(name).claims
    batches = [world(seed, tables=tables(name)) for seed in range(12)]
    for claim in INVARIANCES:
        claimed = vars(claims)[claim]
        # One counter-example is enough.
        assert all(holds(claim, name, batch) for batch in batches) == claimed, f"{name}: {claim} is {'' if claimed else 'not '}claimed"
