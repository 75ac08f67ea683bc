"""Every recipe that compares samples of a group: its claims in both directions, layouts, missing rewards and degenerate groups."""

import dataclasses
import functools

import pytest
import torch

from flowalign.estimators import RewardBatch, config, estimate, names, recipe
from flowalign.estimators.claims import INVARIANCES
from tests.estimators.worlds import ragged_groups, random_rewards, take

ELSEWHERE = {"step_rewards", "anchor_id", "tree"}  # the recipes that give credit to steps and branches have tests of their own
FLAT = [name for name in names() if not ELSEWHERE & set(config(name).claims.needs) or name == "tw_grpo"]
FLAT = [name for name in FLAT if name not in ("steer", "epo")]
OPTIONS = {"opo": {"metric": 0}}
INTO = {
    "any": lambda x: x,
    "binary": lambda x: (x > 0.5).double(),
    "unit": lambda x: x.abs().clamp(max=1),
    "at_most_one": lambda x: 1 - x.abs(),
    "non_negative": torch.abs,
}
OTHERWISE = {
    "any": lambda x: x * 2 + 0.3,
    "binary": lambda x: 1 - x,
    "unit": lambda x: 0.5 * x + 0.3,
    "at_most_one": lambda x: 0.5 * x - 0.3,
    "non_negative": lambda x: x * 2 + 0.3,
}


@functools.cache
def tables(seed, groups):
    """Ragged groups, if none are given, and every table."""
    generator = torch.Generator().manual_seed(1000 + seed)
    group = ragged_groups(generator) if groups is None else torch.tensor(groups)
    num = len(group)
    steps = torch.rand(num, 3, 2, generator=generator, dtype=torch.float64)
    rewards = torch.stack([random_rewards(num, seed + column, generator) for column in range(2)], 1)
    return group, {
        "rewards": rewards,
        # In coarse steps: where metrics tie, ranks must not depend on the order in which samples come.
        "metric": (torch.rand(num, 2, generator=generator, dtype=torch.float64) * 3).floor() / 3 + 0.1,
        "baseline": torch.rand(num, 2, generator=generator, dtype=torch.float64),
        "log_prob": -steps[..., 0],
        "step_rewards": steps[..., 1:],
        "clauses": (torch.rand(num, 3, generator=generator) < 0.5).double(),
        "clauses_valid": (torch.rand(int(group.max()) + 1, 3, generator=generator) < 0.8)[group],
    }


def example(name, seed, groups=None, rewards=None):
    """A batch with the rewards and tables that a recipe is for."""
    claims = config(name).claims
    group, found = tables(seed, None if groups is None else tuple(groups))
    if rewards is None:
        rewards = INTO[claims.domain](found["rewards"][:, : claims.num_rewards])
    else:
        rewards = torch.as_tensor(rewards, dtype=torch.float64)[:, None].expand(-1, claims.num_rewards)
    wanted = {"metric", "clauses", "clauses_valid", *claims.needs}
    fields = {key: found[key][:, : claims.num_rewards] if key == "baseline" else found[key] for key in wanted}
    return RewardBatch(rewards=rewards, group_id=group, sample_uid=torch.arange(len(group)), **fields)


def run(name, batch):
    return estimate(name, batch, **OPTIONS.get(name, {}))


def first(result):
    """What training multiplies the gradient of the first step by."""
    return (result.advantage * result.weight)[:, 0].double()


def better(name, batch):
    """Pairs of which the first is at least as good in every respect that the recipe looks at, and better in one."""
    table = torch.where(batch.clauses_valid, batch.clauses, 0.0) if "clauses" in config(name).claims.needs else batch.rewards
    same = batch.group_id[:, None] == batch.group_id[None]
    return same & (table[:, None] >= table[None]).all(2) & (table[:, None] > table[None]).any(2)


# Changes that stay inside a recipe's domain: a refusal would not be a counter-example. Of 0 and 1 there is nothing to shift or scale.
ROOM = {"unit": 0.4}
SHIFTS = {"any": (5.0, 3.0), "non_negative": (5.0, 3.0), "unit": (0.3, 0.1), "at_most_one": (-5.0, -3.0)}
SCALES = {"any": 3.0, "non_negative": 3.0, "unit": 2.0, "at_most_one": 0.3}


def holds(claim, name, batch):
    """Whether an invariance holds on one batch."""
    claims = config(name).claims
    if claim in ("shift", "shift_per_group", "scale"):
        batch = dataclasses.replace(batch, rewards=batch.rewards * ROOM.get(claims.domain, 1.0))
    rewards, group = batch.rewards, batch.group_id[:, None]
    base = first(run(name, batch))
    if claim == "zero_mean":
        return bool((torch.zeros(int(group.max()) + 1).double().index_add(0, batch.group_id, base).abs() < 2e-5).all())
    if claim == "monotone":
        return bool((base[:, None] >= base[None] - 1e-6)[better(name, batch)].all())
    constant = 1.0 if claims.domain == "binary" else 0.7
    changed = {
        "shift": lambda: rewards + SHIFTS[claims.domain][0],
        "shift_per_group": lambda: rewards + SHIFTS[claims.domain][1] * group,
        "scale": lambda: rewards * SCALES[claims.domain],
        "local": lambda: torch.where(group == 0, rewards, torch.where(group == 1, constant, OTHERWISE[claims.domain](rewards))),
        "zero_when_flat": lambda: torch.where(group == 0, constant, rewards),
    }[claim]()
    clauses = batch.clauses
    if claim == "zero_when_flat":
        clauses = torch.where(group == 0, 1.0, clauses)
    if claim == "local":
        clauses = torch.where(group == 0, clauses, 1 - clauses)
    after = first(run(name, dataclasses.replace(batch, rewards=changed, clauses=clauses)))
    if claim == "zero_when_flat":
        return bool((after[batch.group_id == 0] == 0).all())
    if claim == "local":
        return torch.allclose(after[batch.group_id == 0], base[batch.group_id == 0], atol=1e-6)
    # eps is added to the std: under scaling the tolerance is eps over the smallest std in these batches.
    return torch.allclose(after, base, atol=5e-3 if claim == "scale" else 2e-5)


def smallest_std(batch):
    found = [batch.rewards[batch.group_id == g].std(0, unbiased=False).min() for g in batch.group_id.unique()]
    return float(torch.stack(found).min())


@pytest.mark.parametrize("name", FLAT)
def test_every_claim_holds_and_every_unclaimed_invariance_has_a_counterexample(name):
    claims = vars(config(name).claims)
    batches = [example(name, seed) for seed in range(6)]
    for claim in INVARIANCES:
        if config(name).claims.domain == "binary" and claim in ("shift", "shift_per_group", "scale"):
            assert not claims[claim], f"{name}: {claim} cannot be meant of rewards that are 0 or 1"
            continue
        used = [batch for batch in batches if claim != "scale" or not claims[claim] or smallest_std(batch) > 0.02]
        # One counter-example is enough.
        assert all(holds(claim, name, batch) for batch in used) == claims[claim], (
            f"{name}: {claim} is {'' if claims[claim] else 'not '}claimed"
        )


@pytest.mark.parametrize("name", FLAT)
def test_order_ids_and_splits_over_ranks_change_nothing(name):
    batch = example(name, 2)
    uid = torch.arange(len(batch.rewards))
    ids = torch.tensor([2**62, 7, -3, 2**40 + 1, 11])
    whole = run(name, take(batch, uid, relabel=ids))
    layouts = [[torch.randperm(len(uid), generator=torch.Generator().manual_seed(0))]]
    layouts += [[uid[rank::ranks] for rank in range(ranks)] for ranks in (2, 4, 8)] + [list(uid.chunk(ranks)) for ranks in (1, 2, 4, 8)]
    for parts in layouts:
        rows = torch.cat(parts)
        result = run(name, take(batch, rows, relabel=ids))
        for field in ("advantage", "weight", "keep"):
            assert torch.equal(getattr(result, field), getattr(whole, field)[rows])
    plain = run(name, batch)
    for field in ("advantage", "weight", "keep"):
        # Other ids put the groups in another order, in which float64 sums over the batch differ by 1e-15: in float32 one unit in the last place.
        assert torch.allclose(getattr(plain, field).double(), getattr(whole, field).double(), rtol=1.2e-7, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in FLAT if config(name).claims.zero_when_flat])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 12, 24])
@pytest.mark.parametrize("noise", [0, 1])
def test_a_flat_group_gets_exactly_zero(name, dtype, size, noise):
    domain = config(name).claims.domain
    values = {"any": [0.0, 0.1, 0.7, 21.7, -3.0, 1e-12, 1e6], "binary": [0.0, 1.0]}.get(domain, [0.0, 0.1, 0.7, 1.0, 1e-12])
    groups = torch.arange(len(values)).repeat_interleave(size).tolist()
    batch = example(name, 0, groups=[*groups, 9, 9], rewards=[values[group] for group in groups] + [0.0, 1.0])
    rewards = batch.rewards.to(dtype)
    steps = torch.randint(-noise, noise + 1, rewards.shape, generator=torch.Generator().manual_seed(0))
    rewards = rewards * (1 + torch.finfo(dtype).eps * steps)  # equal but for the last bit, as batched scorers give them
    if domain not in ("any", "binary"):
        rewards = rewards.clamp(0, 1)
    flat = dataclasses.replace(batch, rewards=rewards, clauses=torch.where(batch.group_id[:, None] < 9, 1.0, batch.clauses))
    assert first(run(name, flat))[:-2].tolist() == [0.0] * len(groups)


@pytest.mark.parametrize("name", [name for name in FLAT if name not in ("reinforce_pp", "remax")])
def test_a_group_of_one_gets_zero(name):
    batch = example(name, 1, groups=[0, 1, 1], rewards=[1.0, 0.0, 1.0])
    result = run(name, batch)
    assert first(result)[0] == 0
    assert result.keep.all() or config(name).claims.filters


@pytest.mark.parametrize("name", FLAT)
def test_a_missing_reward_is_left_out_and_changes_nobody_else(name):
    batch = example(name, 4)
    missing = torch.zeros(len(batch.rewards), 1, dtype=torch.bool)
    missing[1] = True
    result = run(name, dataclasses.replace(batch, rewards=torch.where(missing, torch.nan, batch.rewards)))
    others = ~missing[:, 0]
    without = run(name, take(batch, others.nonzero()[:, 0]))
    assert result.advantage[1, 0].item() == 0
    assert not result.keep[1]
    assert torch.allclose(result.advantage[others], without.advantage, atol=1e-7)
    assert torch.equal(result.keep[others], without.keep)


@pytest.mark.parametrize("name", FLAT)
def test_output_is_finite_float32_whatever_is_missing(name):
    batch = example(name, 3)
    gone = {"all": torch.ones_like(batch.group_id), "a group": batch.group_id == 0, "every other": torch.arange(len(batch.group_id)) % 2}
    for rows in gone.values():
        result = run(name, dataclasses.replace(batch, rewards=torch.where(rows.bool()[:, None], torch.nan, batch.rewards)))
        assert result.advantage.dtype == result.weight.dtype == torch.float32
        assert torch.isfinite(result.advantage).all()
        assert not result.keep[rows.bool()].any()


@pytest.mark.parametrize("name", FLAT)
def test_state_written_and_read_back_gives_the_same_next_step(name, tmp_path):
    estimator = recipe(name, **OPTIONS.get(name, {}))
    _, state = estimator.update(example(name, 0), estimator.init())
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    expected, after = estimator.update(example(name, 5), state)
    found, again = estimator.update(example(name, 5), loaded)
    assert torch.equal(expected.advantage, found.advantage)
    assert expected.stats.keys() == found.stats.keys()
    assert str(after) == str(again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FLAT)
def test_low_precision_rewards_give_what_the_same_numbers_give_in_float64(name, dtype):
    batch = example(name, 1)
    low = batch.rewards.to(dtype)
    found, expected = (run(name, dataclasses.replace(batch, rewards=values)) for values in (low, low.double()))
    assert torch.equal(found.advantage, expected.advantage)


@pytest.mark.parametrize("name", [name for name in FLAT if config(name).claims.needs])
def test_a_missing_table_is_named(name):
    for table in config(name).claims.needs:
        batch = dataclasses.replace(example(name, 0), **{table: None})
        with pytest.raises(ValueError, match=f"needs RewardBatch.{table}"):
            run(name, batch)


@pytest.mark.parametrize(
    ("name", "value"),
    [("bnpo", -0.5), ("bnpo", 1.5), ("ngrpo", 1.5), ("unlikeliness", -0.1), ("trust_grpo", 1.2), ("odsw", 3.0), ("drpo", 0.5)]
    + [("weighted_grpo", 0.999)],
)
def test_a_reward_outside_the_declared_range_is_refused_with_the_place(name, value):
    batch = example(name, 1)
    rewards = batch.rewards.clone()
    rewards[3, 0] = value
    with pytest.raises(ValueError, match=rf"rewards\[3, 0\].* {value:g}"):
        run(name, dataclasses.replace(batch, rewards=rewards))
