"""Recipes that credit steps, and weights: worked examples, a slow implementation with plain loops, identities, and missing tables."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from flowalign.estimators import RewardBatch, config, estimate, recipe
from flowalign.estimators.baseline import center
from flowalign.estimators.chain import chain
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps, chain_differences, link_steps, reward_to_go, subtract_critic, take_step_rewards
from flowalign.estimators.diversity import anneal, diversity_curve, keep_diversity_in_band
from flowalign.estimators.turning import balance_turning_points, find_turning_points, turning_points
from flowalign.estimators.weigh import difficulty_weight, keep_contrast, keep_pass_rates, weigh_by_difficulty, weigh_steps_by_spread
from tests.estimators.worlds import world

ORACLES = Path(__file__).parents[3] / "shared" / "data" / "estimator_oracles.json"
oracles = json.loads(ORACLES.read_text()) if ORACLES.is_file() else {}


def make(rewards, groups=None, steps=None, **fields):
    values = torch.as_tensor(rewards, dtype=torch.float64)
    group = torch.zeros(len(values), dtype=torch.int64) if groups is None else torch.as_tensor(groups)
    if steps is not None:
        fields["step_rewards"] = torch.as_tensor(steps, dtype=torch.float64)[..., None]
    return RewardBatch(rewards=values[:, None], group_id=group, sample_uid=torch.arange(len(values)), **fields)


def run(batch, *stages):
    estimator = chain(*stages)
    return estimator.update(batch, estimator.init())[0]


def agrees(entry, found):
    """Compare with the file of worked examples where it is beside the repository; an entry that it lacks is a KeyError."""
    return not oracles or torch.allclose(torch.tensor(oracles[entry]), torch.as_tensor(found).float(), atol=1e-5)


# -- worked examples ----------------------------------------------------------------------------------------------------------------


def test_process_supervision_sums_what_follows():
    found = estimate("process", make([0, 0], steps=[[1, 0, 1], [0, 0, 1]]), eps=0.0).advantage
    assert found.tolist() == [[1, 0, 1], [-1, 0, 1]]
    assert agrees("process_future", found)
    shared = estimate("process", make([0, 0], steps=[[1, 0, 1], [0, 0, 1]]), eps=0.0, divide="remaining").advantage
    assert torch.allclose(shared, torch.tensor([[1 / 3, 0, 1], [-1 / 3, 0, 1]]))


def test_gigpo_gives_the_worked_example():
    anchor = torch.tensor([[0, 1, 2], [0, 1, 3]])
    found = estimate("gigpo", make([1, 0], anchor_id=anchor)).advantage
    assert found.flatten().tolist() == pytest.approx([0.95125, 0.975, 0.5, -0.95125, -0.975, -0.5])
    assert agrees("gigpo.A", found.flatten())
    rewarded = estimate("gigpo", make([1, 0], anchor_id=anchor, steps=[[0, 0, 1], [0, 0, 0]]))
    assert torch.equal(rewarded.advantage, found)


def test_spo_chain_gives_the_worked_example():
    found = estimate("spo_chain", make([1.0], steps=[[0.5, 0.75, 0.25]]), scale="none").advantage
    assert found.tolist() == [[0.25, -0.5, 0.75]]
    assert agrees("spo_chain", found[0])


TURNING = [
    ("tp", [0.40, 0.35, 0.50, 0.45, 0.60], "all", [0, 1, 0, 1], [-0.05, 0.25, -0.05, 0.15]),
    ("tp", [0.40, 0.35, 0.50, 0.45, 0.60], "constrained", [0, 1, 0, 0], [-0.05, 0.25, -0.05, 0.15]),
    ("tp2", [0.40, 0.35, 0.70, 0.50, 0.60], "all", [0, 1, 0, 1], [-0.05, 0.25, -0.2, 0.1]),
    ("tp2", [0.40, 0.35, 0.70, 0.50, 0.60], "constrained", [0, 0, 0, 0], [-0.05, 0.35, -0.2, 0.1]),
]


@pytest.mark.parametrize(("entry", "course", "points", "mask", "rewards"), TURNING)
def test_turning_points_give_the_worked_examples(entry, course, points, mask, rewards):
    values = torch.tensor([course], dtype=torch.float64)
    found = find_turning_points(values, points)
    assert found[0].int().tolist() == mask
    # A second sample whose reward never changes gets 0 at every step: twice the centred advantage is the step reward.
    batch = make([course[-1], 0.0], steps=[course[:-1], [0.0] * 4])
    steps = 2 * run(batch, turning_points(points=points), center("group_step")).advantage[0]
    assert steps.tolist() == pytest.approx(rewards, abs=1e-6)
    written = f"{entry}.paper_{'wo' if points == 'all' else 'w'}_constraint"
    assert agrees(f"{written}.mask", found[0].int())
    assert agrees(f"{written}.reward", steps)


def test_the_bonus_form_adds_the_change_at_turning_points_to_the_whole():
    batch = make([0.6, 0.0], steps=[[0.40, 0.35, 0.50, 0.45], [0.0] * 4])
    found = 2 * run(batch, turning_points(points="all", form="bonus", bonus=2.0), center("group_step")).advantage[0]
    assert found.tolist() == pytest.approx([0.2, 0.5, 0.2, 0.5], abs=1e-6)


def test_balancing_keeps_as_many_gains_as_losses_and_the_largest():
    found = torch.tensor([[True, True], [True, False], [False, True], [True, True]])
    kept = balance_turning_points(found, torch.tensor([0.1, 0.5, -0.3, -0.2]))
    assert kept.tolist() == [[True, True], [True, False], [False, True], [True, True]]
    kept = balance_turning_points(found, torch.tensor([0.1, 0.5, 0.3, -0.2]))
    assert kept.tolist() == [[False, False], [True, False], [False, True], [True, True]]
    assert not balance_turning_points(found, torch.tensor([0.1, 0.5, 0.3, 0.2])).any()


def test_steer_s_curves_give_the_worked_examples():
    sizes = torch.tensor([0.019464, 0.103426, 0.32755, 1.420946])
    assert diversity_curve(sizes, "linear", 0.2).tolist() == pytest.approx([1.2, 1.176036, 1.112068, 0.8], abs=1e-5)
    assert diversity_curve(sizes, "exponential", 0.2).tolist() == pytest.approx([0.996948, 0.983889, 0.949862, 0.8], abs=1e-5)
    assert diversity_curve(torch.tensor([1.0, -1.0, float("nan")]), "inverse", 3.0).tolist() == [0.25, 1.0, 1.0]
    assert agrees("steer.linear", diversity_curve(torch.tensor(oracles.get("steer.|omega|", [0.0])), "linear", 0.2))


def test_epo_anneals_as_its_code_does():
    found = [anneal(step, 150) for step in (0, 75, 100, 150)]
    assert found == pytest.approx([1, 0.827067, 0.294304, 0.03983], abs=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("s_1", [0.25, 1, 1, 0.707107, 0]),
        ("s_2", [0, 0.707107, 1, 0.707107, 0]),
        ("s_3", [0, 0.707107, 1, 1, 1]),
        ("h_1", [0, 1, 1, 0, 0]),
        ("h_2", [0, 1, 1, 1, 0]),
        ("h_3", [0, 0, 1, 1, 1]),
    ],
)
def test_difficulty_weights_give_the_worked_examples(schedule, expected):
    rate = torch.tensor([0, 0.25, 0.5, 0.75, 1.0])
    assert difficulty_weight(rate, schedule).tolist() == pytest.approx(expected, abs=1e-6)
    assert agrees(f"odsw.{schedule}", difficulty_weight(rate, schedule))
    rewards = [0, 0, 0, 0] + [1, 0, 0, 0] + [1, 1, 0, 0] + [1, 1, 1, 0] + [1, 1, 1, 1]
    batch = make(rewards, groups=[g for g in range(5) for _ in range(4)])
    assert run(batch, combine_rewards(), center(), weigh_by_difficulty(schedule), broadcast_steps()).weight[
        ::4, 0
    ].tolist() == pytest.approx(expected, abs=1e-6)


def test_steps_at_which_samples_differ_weigh_more():
    batch = make([0, 1], steps=[[0, 1, 2], [0, 0, 4]])
    found = run(batch, combine_rewards(), center(), broadcast_steps(), weigh_steps_by_spread(1.7)).weight[0]
    assert found.tolist() == pytest.approx([1, 1.175, 1.7])
    assert agrees("tw.scalar", found)


def test_filters_drop_groups_and_change_no_number():
    rewards = [1, 0, 0, 0] + [1, 1, 1, 0] + [0, 0, 0, 0] + [1, 1, 1, 1]
    batch = make(rewards, groups=[g for g in range(4) for _ in range(4)])
    plain = run(batch, combine_rewards(), center(), broadcast_steps())
    contrast = run(batch, combine_rewards(), keep_contrast(), center(), broadcast_steps())
    assert contrast.keep[::4].tolist() == [True, True, False, False]
    assert agrees("dapo_keep.B", contrast.keep.float())
    hard = run(batch, combine_rewards(), keep_pass_rates([(0.25, 0.5)]), center(), broadcast_steps())
    assert hard.keep[::4].tolist() == [True, False, False, False]
    ends = run(batch, combine_rewards(), keep_pass_rates([(0.0, 0.0), (1.0, 1.0)]), center(), broadcast_steps())
    assert ends.keep[::4].tolist() == [False, False, True, True]
    for result in (contrast, hard, ends):
        assert torch.equal(result.advantage[result.keep], plain.advantage[result.keep])


# -- an independent slow implementation ---------------------------------------------------------------------------------------------


def mean(values):
    return sum(values) / len(values)


def std(values):
    return math.sqrt(mean([(v - mean(values)) ** 2 for v in values]))


def flat(values):
    return max(values) - min(values) < 1e-9


def slow_process(batch):
    steps, groups = batch.step_rewards[..., 0].tolist(), batch.group_id.tolist()
    trained = batch.step_mask.tolist() if batch.step_mask is not None else [[True] * len(row) for row in steps]
    result = []
    for i, row in enumerate(steps):
        pool = [r for j, other in enumerate(steps) for t, r in enumerate(other) if groups[j] == groups[i] and trained[j][t]]
        score = [(r - mean(pool)) / (std(pool) + 1e-4) if trained[i][t] and not flat(pool) else 0.0 for t, r in enumerate(row)]
        result.append([sum(score[t:]) if trained[i][t] else 0.0 for t in range(len(row))])
    return result


def slow_gigpo(batch):
    final, groups, anchors = batch.rewards[:, 0].tolist(), batch.group_id.tolist(), batch.anchor_id.tolist()
    num, steps = len(final), batch.num_steps
    trained = batch.step_mask.tolist() if batch.step_mask is not None else [[True] * steps] * num
    rewards = None if batch.step_rewards is None else batch.step_rewards[..., 0].tolist()
    returns = [[0.0] * steps for _ in range(num)]
    for i in range(num):
        for t in range(steps):
            later = [u for u in range(t, steps) if trained[i][u]]
            if rewards is None:
                returns[i][t] = final[i] * 0.95 ** (len(later) - 1)
            else:
                returns[i][t] = sum(0.95**k * rewards[i][u] for k, u in enumerate(later))
    result = [[0.0] * steps for _ in range(num)]
    for i in range(num):
        members = [final[j] for j in range(num) if groups[j] == groups[i]]
        episode = 0.0 if flat(members) else final[i] - mean(members)
        for t in range(steps):
            if trained[i][t]:
                same = [
                    returns[j][u]
                    for j in range(num)
                    for u in range(steps)
                    if trained[j][u] and groups[j] == groups[i] and anchors[j][u] == anchors[i][t]
                ]
                result[i][t] = episode + (0.0 if flat(same) else returns[i][t] - mean(same))
    return result


def course(batch, i):
    """Values of the states of one sample; before an untrained step the value is that of the state after it."""
    values = [*batch.step_rewards[i, :, 0].tolist(), float(batch.rewards[i, 0])]
    return values


def slow_spo_chain(batch):
    result, pool = [], []
    for i in range(len(batch.rewards)):
        values = course(batch, i)
        row = [values[t + 1] - values[t] for t in range(batch.num_steps)]
        row = [0.0 if abs(d) < 1e-9 else d for d in row]
        trained = batch.step_mask[i].tolist() if batch.step_mask is not None else [True] * len(row)
        pool += [d for d, on in zip(row, trained, strict=True) if on]
        result.append([d if on else 0.0 for d, on in zip(row, trained, strict=True)])
    spread = std(pool) * math.sqrt(len(pool) / (len(pool) - 1)) + 1e-8
    return [[d / spread for d in row] for row in result]


def sign(value):
    return (value > 1e-9) - (value < -1e-9)


def slow_turning_point(batch):
    steps, groups, rewards = batch.num_steps, batch.group_id.tolist(), []
    for i in range(len(batch.rewards)):
        values, row, before = course(batch, i), [], None
        for t in range(steps):
            if batch.step_mask is not None and not batch.step_mask[i, t]:
                row.append(None)
                continue
            along = sign(values[t + 1] - values[t]) * sign(values[-1] - values[0])
            rest = sign(values[t + 1] - values[t]) * sign(values[-1] - values[t + 1])
            turns = (before is None or before < 0) and along > 0 and rest > 0
            row.append(values[-1] - values[t] if turns else values[t + 1] - values[t])
            before = along
        rewards.append(row)
    result = [[0.0] * steps for _ in rewards]
    for i, row in enumerate(rewards):
        for t, reward in enumerate(row):
            if reward is not None:
                members = [other[t] for j, other in enumerate(rewards) if groups[j] == groups[i] and other[t] is not None]
                result[i][t] = 0.0 if flat(members) else (reward - mean(members)) / (std(members) + 1e-4)
    return result


SLOW = {"process": slow_process, "gigpo": slow_gigpo, "spo_chain": slow_spo_chain, "turning_point": slow_turning_point}


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("seed", range(6))
def test_recipes_agree_with_plain_loops_on_ragged_batches(name, seed):
    needs = ("step_rewards",) if name != "gigpo" else ("anchor_id",) if seed < 3 else ("anchor_id", "step_rewards")
    batch = world(seed, steps=4, mask=seed % 2 == 1, tables=(*needs, "step_mask") if seed % 2 else needs)
    assert torch.allclose(estimate(name, batch).advantage, torch.tensor(SLOW[name](batch)), atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_steer_agrees_with_plain_loops(seed):
    batch = world(seed, tables=("metric",))
    novelty, groups = batch.metric[:, 1].tolist(), batch.group_id.tolist()
    advantage = estimate("grpo", batch).advantage[:, 0].tolist()
    result = estimate("steer", batch, metric=1, strength=2.0)
    assert torch.equal(result.advantage[:, 0], torch.tensor(advantage))
    for i, a in enumerate(advantage):
        diversity = mean([n for j, n in enumerate(novelty) if groups[j] == groups[i]])
        loss = -a * (novelty[i] - diversity) / diversity
        assert result.weight[i, 0].item() == pytest.approx(1 / (1 + 2 * max(0.0, loss)), abs=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_epo_agrees_with_plain_loops_over_two_steps(seed):
    estimator = recipe("epo")
    state, history = estimator.init(), []
    for batch in (world(seed, tables=("metric",)), world(seed + 50, tables=("metric",))):
        result, state = estimator.update(batch, state)
        novelty, groups, rewards = batch.metric[:, 0].tolist(), batch.group_id.tolist(), batch.rewards[:, 0].tolist()
        diversity = [mean([n for j, n in enumerate(novelty) if groups[j] == g]) for g in range(max(groups) + 1)]
        history += diversity
        usual, shaped = mean(history), []
        for reward, new, group in zip(rewards, novelty, groups, strict=True):
            side = (diversity[group] < 0.8 * usual) - (diversity[group] > 1.2 * usual)
            shaped.append(reward + 0.1 * side * (new - diversity[group]) / usual)
        for i, reward in enumerate(shaped):
            members = [r for j, r in enumerate(shaped) if groups[j] == groups[i]]
            expected = 0.0 if flat(members) else (reward - mean(members)) / (std(members) + 1e-4)
            assert result.advantage[i, 0].item() == pytest.approx(expected, abs=1e-4)


# -- what must hold -----------------------------------------------------------------------------------------------------------------


def test_a_group_that_collapses_is_pushed_towards_its_novel_samples():
    """All rewards are equal, so only diversity speaks: the gradient that an entropy bonus would not have."""
    batch = make([1.0] * 8, groups=[0] * 4 + [1] * 4, metric=torch.tensor([[0.1], [0.1], [0.1], [0.3]] + [[0.9], [0.9], [0.9], [1.1]]))
    found = estimate("epo", batch).advantage[:, 0]
    assert found[3] > 0 > found[0]
    assert found[7] < 0 < found[4]
    assert estimate("epo", batch, low=0.0, high=10.0).advantage.abs().max() == 0


def test_the_push_is_the_gradient_of_the_group_s_diversity():
    """With probabilities q over a group's samples, diversity is q'Dq; its gradient along the softmax is 2 q (novelty - diversity)."""
    points = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distance = torch.cdist(points, points)
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    q = torch.softmax(logits, 0)
    (gradient,) = torch.autograd.grad(q @ distance @ q, logits)
    # A second group, twice as diverse, puts the first below the band.
    metric = torch.cat([distance.mean(1), torch.full((5,), 4 * float(distance.mean()))])[:, None]
    batch = make([0.0] * 10, groups=[0] * 5 + [1] * 5, metric=metric)
    pushed = run(batch, combine_rewards(), keep_diversity_in_band(), center(), broadcast_steps()).advantage[:5, 0].double()
    assert torch.allclose(pushed / pushed.norm(), gradient / gradient.norm(), atol=1e-6)


def test_epo_s_state_survives_a_round_trip_through_plain_numbers():
    estimator = recipe("epo", anneal_steps=10)
    _, state = estimator.update(world(1, tables=("metric",)), estimator.init())
    copied = json.loads(json.dumps(state))
    after, _ = estimator.update(world(2, tables=("metric",)), state)
    again, _ = estimator.update(world(2, tables=("metric",)), copied)
    assert torch.equal(after.advantage, again.advantage)
    fresh, _ = estimator.update(world(2, tables=("metric",)), estimator.init())
    assert not torch.equal(after.advantage, fresh.advantage)


@pytest.mark.parametrize("seed", range(4))
def test_chain_differences_and_changes_without_turning_points_add_up_to_the_whole(seed):
    batch = world(seed, tables=("step_rewards",))
    whole = batch.rewards[:, 0] - batch.step_rewards[:, 0, 0]
    assert torch.allclose(run(batch, chain_differences()).advantage.double().sum(1), whole, atol=1e-6)


def test_gigpo_without_common_states_is_dr_grpo():
    for seed in range(4):
        batch = world(seed, tables=("anchor_id",))
        alone = dataclasses.replace(batch, anchor_id=torch.arange(batch.anchor_id.numel()).view_as(batch.anchor_id))
        episode = estimate("dr_grpo", dataclasses.replace(batch, anchor_id=None)).advantage
        assert torch.equal(estimate("gigpo", alone).advantage, episode.expand_as(alone.anchor_id))


def test_gigpo_does_not_mix_anchors_of_different_prompts():
    anchor = torch.tensor([[7, 8], [7, 9], [7, 8], [7, 9]])
    batch = make([1, 0, 5, 3], groups=[0, 0, 1, 1], anchor_id=anchor)
    apart = make([1, 0, 5, 3], groups=[0, 0, 1, 1], anchor_id=anchor + torch.tensor([[0], [0], [100], [100]]))
    assert torch.equal(estimate("gigpo", batch).advantage, estimate("gigpo", apart).advantage)


def test_values_only_at_cut_points_credit_whole_segments():
    nan = float("nan")
    found = run(make([1.0], steps=[[0.5, nan, 0.25, nan]]), chain_differences()).advantage
    assert found.tolist() == [[-0.25, -0.25, 0.75, 0.75]]
    unknown = run(make([1.0, 0.0], steps=[[nan, 0.5], [0.5, 0.5]]), chain_differences())
    assert unknown.keep.tolist() == [False, True]


def test_untrained_steps_change_nothing_of_the_course():
    """A window of trained steps: before it and after it the sampler is deterministic, and no value need be computed."""
    nan = float("nan")
    mask = torch.tensor([[False, True, True, False]] * 2)
    window = make([0.6, 0.1], steps=[[nan, 0.4, 0.5, nan], [nan, 0.3, 0.2, nan]], step_mask=mask)
    inside = make([0.6, 0.1], steps=[[0.4, 0.5], [0.3, 0.2]])
    for stages in ([chain_differences()], [turning_points(), center("group_step")], [subtract_critic()]):
        found = run(window, *stages).advantage
        assert torch.equal(found[:, 1:3], run(inside, *stages).advantage)
        assert not found[:, [0, 3]].any()


def test_a_critic_is_subtracted_step_by_step():
    found = run(make([1.0, 0.0], steps=[[0.5, 0.75], [0.5, 0.0]]), subtract_critic()).advantage
    assert found.tolist() == [[0.5, 0.25], [-0.5, 0.0]]


def test_returns_are_discounted_over_trained_steps_only():
    mask = torch.tensor([[True, False, True], [True, True, True]])
    batch = make([0, 0], steps=[[1, 9, 1], [1, 1, 1]], step_mask=mask)
    found = run(batch, take_step_rewards(), combine_rewards(), reward_to_go(discount=0.5), center("batch")).advantage
    returns = torch.tensor([[1.5, 0.0, 1.0], [1.75, 1.5, 1.0]])
    assert torch.allclose(found, torch.where(mask, returns - returns[mask].mean(), 0.0))


def test_a_teacher_s_log_ratios_are_linked_step_by_step():
    ratio = torch.tensor([[0.5, -1.0], [0.0, 2.0]], dtype=torch.float64)
    batch = make([0, 0], steps=ratio)

    def linked(divergence):
        return run(batch, take_step_rewards(), combine_rewards(), link_steps(divergence, beta=0.5), center("step")).advantage.double()

    for divergence, reward in {
        "reverse_kl": 0.5 * ratio,
        "forward_kl": 0.5 * ratio.exp(),
        "jensen_shannon": 0.5 * torch.nn.functional.softplus(ratio),
    }.items():
        assert torch.allclose(linked(divergence), reward - reward.mean(0), atol=1e-6)


def test_several_rewards_are_combined_step_by_step_as_they_are_per_sample():
    for name in ("process", "gigpo", "spo_chain", "turning_point"):
        batch = world(3, num_rewards=2, tables=config(name).claims.needs)
        weights = torch.tensor([0.7, 0.3], dtype=torch.float64)
        step_rewards = None if batch.step_rewards is None else (batch.step_rewards @ weights)[..., None]
        single = dataclasses.replace(batch, rewards=(batch.rewards @ weights)[:, None], step_rewards=step_rewards)
        found = estimate(name, batch, reward_weights=(0.7, 0.3)).advantage
        assert torch.allclose(found, estimate(name, single).advantage, atol=1e-6)
        ignored = dataclasses.replace(batch, rewards=batch.rewards * torch.tensor([1.0, float("nan")]))
        assert estimate(name, ignored, reward_weights=(1.0, 0.0)).keep.all()


# -- bad input ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("process", "step_rewards"),
        ("spo_chain", "step_rewards"),
        ("turning_point", "step_rewards"),
        ("gigpo", "anchor_id"),
        ("steer", "metric"),
        ("epo", "metric"),
    ],
)
def test_a_missing_table_is_named_with_what_to_give(name, table):
    assert config(name).claims.needs == (table,)
    with pytest.raises(ValueError, match=rf"needs RewardBatch.{table}: give \[batch, .*, or choose a recipe without it"):
        estimate(name, world(0, tables=()))


def test_log_probs_are_asked_for_where_they_tell_how_much_a_step_matters():
    with pytest.raises(ValueError, match=r"weigh_steps_by_spread needs RewardBatch.log_prob: .*use transitions with noise"):
        run(make([0, 1]), combine_rewards(), center(), broadcast_steps(), weigh_steps_by_spread(of="log_prob"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": [[0.0, float("inf")], [0, 0]]}, r"step_rewards\[0, 1, 0\]: got inf for sample 0"),
        ({"metric": torch.tensor([[0.0], [-float("inf")]])}, r"metric\[1, 0\]: got -inf for sample 1"),
        ({"step_mask": torch.ones(2, 3, dtype=torch.bool), "steps": [[0, 0], [0, 0]]}, "step_rewards: got 2 steps where the batch has 3"),
        ({"step_rewards": torch.zeros(2, 3)}, r"step_rewards: got shape \(2, 3\), needed \[batch, steps, rewards\]"),
        ({"anchor_id": torch.zeros(2, 3)}, "anchor_id: got torch.float32, needed integers"),
    ],
)
def test_a_broken_table_is_refused_with_the_place(fields, message):
    with pytest.raises(ValueError, match=message):
        make([0.0, 1.0], **fields)


def test_columns_and_ranges_are_checked_when_the_batch_is_seen():
    with pytest.raises(ValueError, match="column 3 of metric does not exist, the batch has 2"):
        estimate("steer", world(0, tables=("metric",)), metric=3)
    with pytest.raises(ValueError, match=r"metric\[0, 0\] is -1; novelty is a mean distance and cannot be negative"):
        estimate("epo", make([0.0, 1.0], metric=torch.tensor([[-1.0], [1.0]])))
    with pytest.raises(ValueError, match=r"rewards\[1, 0\] is 2, needed a pass rate in \[0, 1\]"):
        run(make([0.0, 2.0]), combine_rewards(), center(), weigh_by_difficulty(), broadcast_steps())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: reward_to_go(discount=1.5), "discount: got 1.5"),
        (lambda: keep_pass_rates([(0.5, 0.2)]), "needed 0 <= low <= high <= 1"),
        (lambda: weigh_steps_by_spread(0.5), "top: got 0.5, needed at least 1"),
        (lambda: keep_diversity_in_band(low=1.5), "needed 0 <= low <= 1 <= high"),
        (lambda: recipe("steer", curve="linear", strength=1.0), "strength: got 1.0"),
        (lambda: chain(take_step_rewards(), combine_rewards(), center(), broadcast_steps()), "takes rows 'sample', but got rows 'step'"),
    ],
)
def test_wrong_options_are_refused_when_the_chain_is_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()
