"""Groups, trained steps, shared states and trees that follow from a plan, against the rollout's own table and by hand."""

import math

import pytest
import torch
from accelerate import Accelerator

from flowalign.core.algorithm import Update, sample_number
from flowalign.core.kernels import FlowSDE
from flowalign.core.plans import chain, fork, tree
from flowalign.estimators import RewardBatch, estimate
from flowalign.run import build_trainer
from flowalign.run_config import load_config
from flowalign.train.forests import anchors, compared_groups, forest, trained_steps
from flowalign.train.journal import read_log
from tests.core.test_plan_shapes import PLANS, draw, run
from tests.train.launch import on_one_and_two_processes

SDE = FlowSDE(0.7)
TEMPFLOW = {"type": "tempflow_grpo", "num_children": 3, "num_minibatches": 1}
TREE = {"type": "flow_grpo", "depths": [0, 2], "num_children": 2, "num_minibatches": 1}
SMALL = {"groups": 2, "group_size": 2, "micro_batch_size": 8, "learning_rate": 1e-2}


def edges(grown):
    """Steps that lead to each sample, and with which node's edge, from the leaf up."""
    found = []
    for leaf in grown.leaf_of_sample.tolist():
        at, mine = leaf, []
        while at >= 0:
            mine = [(step, at) for step in range(int(grown.edge_start[at]), int(grown.edge_end[at]))] + mine
            at = int(grown.parent[at])
        found.append(mine)
    return found


@pytest.mark.parametrize(
    "plan", [plan for plan in PLANS.values() if plan.trained], ids=[name for name, plan in PLANS.items() if plan.trained]
)
def test_trees_states_and_masks_are_those_of_the_recorded_rows(plan):
    table = run(plan).transitions
    row, leaf = table.leaves()
    column = {step: place for place, step in enumerate(plan.trained)}
    mask, anchor = trained_steps(plan).repeat(2, 1), anchors(plan, 2)
    grown = forest(plan, torch.tensor([7, 7]))
    own = edges(grown)
    for end in range(2 * plan.num_leaves):
        mine = row[leaf == end].tolist()
        steps = [column[int(table.step[r])] for r in mine]
        assert mask[end].nonzero()[:, 0].tolist() == steps
        assert [int(anchor[end, place]) for place in steps] == [int(table.state[r]) for r in mine]
        assert [place for place, _ in own[end]] == steps
    # Two final states own a step by the same edge exactly where they share its transition.
    shared = {
        (int(r), step): node for r, end in zip(row, leaf, strict=True) for step, node in own[int(end)] if step == column[int(table.step[r])]
    }
    nodes_of = {}
    for (r, step), node in shared.items():
        nodes_of.setdefault((node, step), set()).add(r)
    assert all(len(rows) == 1 for rows in nodes_of.values())


def test_siblings_are_the_children_of_one_state():
    plan = fork(SDE, 4, num_children=3)
    grown = forest(plan, torch.tensor([5, 5]))
    parent = grown.parent[grown.leaf_of_sample].view(2, 3, 3)
    assert (parent == parent[..., :1]).all()
    assert len(torch.unique(parent)) == 6
    assert (grown.root()[grown.leaf_of_sample].view(2, -1) == grown.root()[grown.leaf_of_sample].view(2, -1)[:, :1]).all()


def test_log_probs_of_edges_are_means_over_their_steps():
    plan = tree(SDE, 4, depths=(1,), num_children=2)
    log_prob = draw(3, 4, 3)
    log_prob[1::2, 0] = log_prob[::2, 0]  # a common beginning
    grown = forest(plan, torch.tensor([5, 6]), log_prob)
    for sample, leaf in enumerate(grown.leaf_of_sample.tolist()):
        assert float(grown.edge_log_prob[leaf]) == pytest.approx(float(log_prob[sample, 1:].mean()))
        assert float(grown.edge_log_prob[grown.parent[leaf]]) == pytest.approx(float(log_prob[sample, 0]))


def test_groups_are_prompts_or_steps_or_states():
    prompts, seeds = torch.tensor([4, 4, 9]), torch.tensor([0, 1, 0])
    step = torch.tensor([0, 0, 1, 1]).repeat(3)
    seed = torch.arange(3).repeat_interleave(4)
    prompt = prompts.repeat_interleave(4)
    for compare, keys in (("prompt", [prompt]), ("step", [prompt, step]), ("state", [seed, step])):
        plan = fork(SDE, 3, num_children=2, compare=compare)
        found = compared_groups(plan, prompts, seeds)
        same = torch.stack([k[:, None] == k for k in keys]).all(0)
        assert torch.equal(found[:, None] == found, same)
    assert torch.equal(compared_groups(chain(SDE, 3), prompts, seeds), prompts)


def test_states_of_a_prompt_that_comes_twice_in_a_step_are_apart():
    plan = fork(SDE, 3, num_children=2, compare="state")
    group, member = torch.tensor([0, 1]), torch.tensor([0, 0])
    found = compared_groups(plan, torch.tensor([4, 4]), sample_number(group, member))
    assert torch.unique(found, return_counts=True)[1].tolist() == [2] * 4


def test_a_group_that_filtering_cut_to_one_member_gives_it_no_advantage():
    """The last member of a group, the others not computed: nothing to compare, so 0, kept, and no NaN."""
    rewards = torch.tensor([[1.0], [math.nan], [math.nan], [0.0], [2.0], [4.0]])
    batch = RewardBatch(rewards=rewards, group_id=torch.tensor([0, 0, 0, 1, 1, 1]), sample_uid=torch.arange(6))
    found = estimate("grpo", batch)
    assert found.advantage[:3].tolist() == [[0.0]] * 3
    assert found.keep.tolist() == [True, False, False, True, True, True]
    assert found.advantage[3:].abs().max() > 1


def build(write_config, **changes):
    changes = {"train": SMALL, "advantage": "grpo", **changes}
    return build_trainer(load_config(str(write_config(**changes))), Accelerator())


def test_tempflow_compares_the_children_of_a_state_and_counts_its_evaluations(write_config):
    built = build(write_config, algorithm=TEMPFLOW)
    found = built.collect(0)
    experience = found.experience
    table = experience.trajectory.transitions
    reward = found.rewards.values.sum(1)
    expected = torch.zeros(len(reward), dtype=torch.float64)
    for state in torch.unique(table.state):
        own = table.sample[table.state == state]
        assert len(own) == 3
        values = reward[own]
        expected[own] = (values - values.mean()) / (values.std(correction=0) + 1e-4)
    assert torch.allclose(experience.advantage.double().sum(1), expected, atol=1e-5)
    assert expected.abs().max() > 0.5
    rows = built.algorithm.rows(experience, Update(seed=0, step=0, index=0))
    loss = built.algorithm.loss("current", rows, found.velocity)
    assert (loss.metrics["ratio"] - 1).abs().max() < 1e-6
    # Each row's prompt is its image's.
    assert torch.equal(experience.group[table.sample], table.seed // 2)
    built.collector.take_evaluations()
    line = built.step(1)
    plan = built.algorithm.plan(1, 4)
    assert line["images"] == 4 * plan.num_leaves == 36
    assert line["evaluations"] == {
        "rollout": 4 * (3 + 3 * 6),
        "train": 4 * 3,
        "reference": 4 * 3,
        "total": 4 * (3 + 3 * 6) + 24,
        "rows_per_evaluation": 1,
    }


def test_tempflow_trains_on_when_a_reward_leaves_one_child_of_a_state(write_config):
    """Two of a state's three children are not computed: they are left out, the third has nothing to be compared with, the others go on."""
    skipping = [{"reward": {"type": "tests.train.brightness", "broken": "two"}, "may_skip": True}]
    built = build(write_config, algorithm=TEMPFLOW, rewards=skipping)
    experience = built.collect(0).experience
    assert experience.keep.tolist() == [False] * 2 + [True] * 34
    alone = experience.trajectory.transitions
    assert torch.unique(alone.state[torch.isin(alone.sample, torch.arange(3))]).numel() == 1
    assert experience.advantage[2].abs().max() == 0
    assert experience.advantage[3:].abs().max() > 0.5
    line = built.step(0)
    assert math.isfinite(line["metrics"]["loss"])
    assert line["grad_norm"] > 0


@pytest.mark.parametrize(
    "recipe", ["gigpo", "spo_tree", "tree_rl", "tree_rpo", "tree_grpo", "branch_grpo", "spo_chain", "remax", "flow_grpo"]
)
@pytest.mark.parametrize("algorithm", [TEMPFLOW, TREE], ids=["fork", "tree"])
def test_recipes_over_trees_train_where_a_plan_makes_trees(write_config, algorithm, recipe):
    built = build(write_config, algorithm=algorithm, advantage={"type": recipe})
    line = built.step(0)
    assert math.isfinite(line["metrics"]["loss"])
    assert line["grad_norm"] > 0


def test_siblings_of_a_fork_get_from_the_tree_what_they_get_as_a_group(write_config):
    """TreeRPO's siblings are TempFlow's groups: another way to say the same comparison."""
    advantages = [
        build(write_config, algorithm=TEMPFLOW, advantage={"type": recipe}).collect(0).experience.advantage
        for recipe in ("grpo", "tree_rpo")
    ]
    assert torch.allclose(advantages[0], advantages[1], atol=1e-6)
    assert advantages[0].abs().max() > 0.5


def test_process_takes_each_images_reward_as_the_judge_of_its_step(write_config):
    advantages = [
        build(write_config, algorithm=TEMPFLOW, advantage={"type": recipe}).collect(0).experience.advantage
        for recipe in ("grpo", "process")
    ]
    assert torch.allclose(advantages[0], advantages[1], atol=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "advantage", "train", "message"),
    [
        (TREE, "process", SMALL, "needs a judge's reward for each step.*such as tempflow_grpo"),
        ({"type": "flow_grpo"}, "branch_grpo", SMALL, "needs tree.*choose algorithm tempflow_grpo, flow_grpo with depths"),
        ({**TEMPFLOW, "compare": "step", "num_children": 1}, "grpo", {**SMALL, "group_size": 1}, "group_size: got 1; .*of a step"),
        ({"type": "flow_grpo", "depths": [3]}, "grpo", SMALL, "cannot be deeper than the schedule"),
    ],
)
def test_what_a_plan_cannot_give_is_refused_before_it_begins(write_config, algorithm, advantage, train, message):
    with pytest.raises(ValueError, match=message):
        build(write_config, algorithm=algorithm, advantage=advantage, train=train)


def test_one_noise_of_a_prompt_is_enough_where_children_are_compared(write_config):
    line = build(write_config, algorithm=TEMPFLOW, train={**SMALL, "group_size": 1}).step(0)
    assert line["grad_norm"] > 0


def test_two_processes_grow_the_same_trees_as_one(write_config):
    folders = on_one_and_two_processes(write_config, steps=1, algorithm=TEMPFLOW, advantage="tree_rpo", train=SMALL)
    one, two = (read_log(folder / "log.jsonl")[0] for folder in folders)
    assert one["images"] == two["images"] == 36
    assert one["evaluations"] == two["evaluations"]
    assert two["reward"] == pytest.approx(one["reward"], abs=1e-6)
    assert two["advantage"] == pytest.approx(one["advantage"], abs=1e-3)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
    assert two["metrics"]["ratio_gap_first"] < 1e-6
