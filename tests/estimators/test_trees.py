"""Recipes over trees: worked examples, a slow implementation with plain loops, identities, and broken trees."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from flowalign.estimators import RewardBatch, Tree, config, estimate
from flowalign.estimators.baseline import center, leave_one_out
from flowalign.estimators.chain import Signal, chain
from flowalign.estimators.combine import combine_rewards
from flowalign.estimators.credit import broadcast_steps
from flowalign.estimators.trees import edges_to_steps, node_values, subtract_parent
from tests.estimators.worlds import random_tree, take, world

ORACLES = Path(__file__).parents[3] / "shared" / "data" / "estimator_oracles.json"
NAMES = ["spo_tree", "tree_rl", "tree_rpo", "tree_grpo", "branch_grpo"]
PARENT = [-1, 0, 0, 1, 1, 2, 2]


def tree_of(parent, leaves, starts=None, ends=None, prompt=0, log_prob=None):
    """A tree whose edge into depth d owns step d - 1."""
    depth = []
    for above in parent:
        depth.append(0 if above < 0 else depth[above] + 1)
    return Tree(
        parent=torch.tensor(parent),
        prompt=torch.full((len(parent),), prompt),
        leaf_of_sample=torch.tensor(leaves),
        edge_start=torch.tensor([max(0, d - 1) for d in depth] if starts is None else starts),
        edge_end=torch.tensor(depth if ends is None else ends),
        edge_log_prob=log_prob,
    )


def batch_of(tree, rewards, groups=None, **fields):
    values = torch.as_tensor(rewards, dtype=torch.float64)
    group = torch.zeros(len(values), dtype=torch.int64) if groups is None else torch.as_tensor(groups)
    return RewardBatch(rewards=values[:, None], group_id=group, sample_uid=torch.arange(len(values)), tree=tree, **fields)


def common(**fields):
    """The tree of the worked examples."""
    return batch_of(tree_of(PARENT, [3, 4, 5, 6]), [1, 0, 1, 1], **fields)


def by_node(result):
    """Put the advantages of the common tree back on its nodes 1 to 6."""
    a = result.advantage
    assert a[0, 0] == a[1, 0]
    assert a[2, 0] == a[3, 0]
    return [a[0, 0].item(), a[2, 0].item(), *a[:, 1].tolist()]


WORKED = [
    ("spo_tree", {"scale": "none"}, "spo.rloo(parent mean)", [-0.25, 0.25, 0.5, -0.5, 0, 0]),
    ("spo_tree", {"scale": "siblings"}, "spo.grpo", [-1, 1, 1, -1, 0, 0]),
    ("tree_rpo", {"baseline": "others"}, "dtreerpo/LOO", [-0.5, 0.5, 1, -1, 0, 0]),
    ("tree_rl", {}, "treerl.sqrt", [-0.471405, 0.471405, 1, -1.666667, 0.333333, 0.333333]),
    ("tree_rl", {"divide": "none"}, "treerl.original", [-0.666667, 0.666667, 1, -1.666667, 0.333333, 0.333333]),
    ("branch_grpo", {}, "branch.depthnorm", [-0.707107, 0.707107, 0.5, -1.5, 0.5, 0.5]),
]


@pytest.mark.parametrize(("name", "options", "entry", "expected"), WORKED)
def test_recipes_give_the_worked_examples(name, options, entry, expected):
    assert by_node(estimate(name, common(), **options)) == pytest.approx(expected, abs=1e-5)
    if ORACLES.is_file():
        assert json.loads(ORACLES.read_text())[entry][1:] == pytest.approx(expected, abs=1e-5)


def test_tree_grpo_gives_the_worked_example():
    two_roots = tree_of([-1, -1, 0, 0, 1, 1], [2, 3, 4, 5])
    result = estimate("tree_grpo", batch_of(two_roots, [1, 0, 1, 1]))
    assert result.advantage[:, 0].tolist() == pytest.approx([1.207105, -2.207103, 0.499999, 0.499999], abs=1e-5)


def values_of(batch, average, **options):
    stage = node_values(average, **options)
    num = len(batch.rewards)
    signal = Signal(
        x=batch.rewards,
        sample=torch.arange(num),
        step=torch.zeros(num, dtype=torch.int64),
        weight=torch.ones(num, dtype=torch.float64),
        keep=torch.ones(num, dtype=torch.bool),
    )
    return stage.apply(signal, batch, {})[0].x[:, 0]


def test_means_over_children_and_over_leaves_differ_on_a_ragged_tree():
    batch = batch_of(tree_of([-1, 0, 0, 1, 1, 1], [2, 3, 4, 5], ends=[0, 1, 2, 2, 2, 2]), [0, 1, 1, 0])
    assert values_of(batch, "children").tolist() == pytest.approx([0.333333, 0.666667, 0, 1, 1, 0], abs=1e-5)
    assert values_of(batch, "leaves").tolist() == pytest.approx([0.5, 0.666667, 0, 1, 1, 0], abs=1e-5)


def test_softmax_values_weigh_children_by_their_likelihood():
    log_prob = torch.tensor([0.0, -1.0, -2.0, -0.5, -0.5, -1.0, -3.0], dtype=torch.float64)
    batch = batch_of(tree_of(PARENT, [3, 4, 5, 6], log_prob=log_prob), [1, 0, 0, 1])
    low = math.exp(-3) / (math.exp(-1) + math.exp(-3))
    share = math.exp(-1) / (math.exp(-1) + math.exp(-2))
    assert values_of(batch, "softmax").tolist()[:3] == pytest.approx([0.5 * share + low * (1 - share), 0.5, low])
    cold = values_of(batch, "softmax", temperature=1e-3)
    assert cold[2].item() == pytest.approx(0.0, abs=1e-12)
    even = batch_of(tree_of(PARENT, [3, 4, 5, 6], log_prob=torch.zeros(7)), [1, 0, 0, 1])
    assert torch.allclose(values_of(even, "softmax"), values_of(even, "children"))


# -- an independent slow implementation ---------------------------------------------------------------------------------------------


def slow_values(tree, rewards, average):
    parent = tree.parent.tolist()
    children = [[child for child, above in enumerate(parent) if above == node] for node in range(len(parent))]
    sample_of = {leaf: i for i, leaf in enumerate(tree.leaf_of_sample.tolist())}

    def leaves(node):
        return [rewards[sample_of[node]]] if node in sample_of else [r for child in children[node] for r in leaves(child)]

    def value(node):
        if node in sample_of:
            return rewards[sample_of[node]]
        if average == "leaves":
            return sum(leaves(node)) / len(leaves(node))
        below = [value(child) for child in children[node]]
        if average == "softmax":
            weights = [math.exp(tree.edge_log_prob[child]) for child in children[node]]
            return sum(w * v for w, v in zip(weights, below, strict=True)) / sum(weights)
        return sum(below) / len(below)

    return [value(node) for node in range(len(parent))], children, [len(leaves(node)) for node in range(len(parent))]


def std(values, ddof):
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - ddof))


def slow_edges(name, batch):
    """Advantage of every edge by loops; and by how much a copy of it is weighed."""
    tree, rewards = batch.tree, batch.rewards[:, 0].tolist()
    parent, groups = tree.parent.tolist(), batch.group_id.tolist()
    values, children, leaves = slow_values(tree, rewards, "leaves" if name in ("branch_grpo", "tree_rl") else "children")
    nodes = range(len(parent))
    siblings = [[values[s] for s in nodes if parent[s] == parent[n]] if parent[n] >= 0 else [0.0] for n in nodes]
    share = [1 / n for n in leaves]

    def mean(v):
        return sum(v) / len(v)

    if name == "spo_tree":
        gain = [0.0 if parent[n] < 0 or abs(values[n] - values[parent[n]]) < 1e-9 else values[n] - values[parent[n]] for n in nodes]
        counted = [gain[n] for n in nodes for _ in range(int(tree.edge_end[n] - tree.edge_start[n])) if gain[n] != 0]
        return [g / (std(counted, 1) + 1e-8) if g else 0.0 for g in gain], [s if g else 0.0 for s, g in zip(share, gain, strict=True)]
    if name == "tree_rpo":
        flat = [max(s) - min(s) < 1e-9 for s in siblings]
        return [0.0 if flat[n] else (values[n] - mean(siblings[n])) / (std(siblings[n], 0) + 1e-4) for n in nodes], share
    if name == "branch_grpo":
        depth = [0 if parent[n] < 0 else None for n in nodes]
        while None in depth:
            depth = [depth[parent[n]] + 1 if depth[n] is None and depth[parent[n]] is not None else depth[n] for n in nodes]
        prompt = tree.prompt.tolist()
        level = [[values[m] for m in nodes if depth[m] == depth[n] and prompt[m] == prompt[n]] for n in nodes]
        return [
            0.0 if max(s) - min(s) < 1e-9 else (values[n] - mean(s)) / (std(s, 1) + 1e-8) for n, s in zip(nodes, level, strict=True)
        ], share
    z = []
    for i, reward in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if groups[j] == groups[i] and j != i]
        z.append(reward - mean(others) if others else 0.0)
    values, _, leaves = slow_values(tree, z, "leaves")
    return [0.0 if parent[n] < 0 else (2 * values[n] - values[parent[n]]) / math.sqrt(leaves[n]) for n in nodes], [1.0] * len(parent)


def slow(name, batch):
    num, steps = len(batch.rewards), batch.num_steps
    advantage, weight = torch.zeros(num, steps), torch.zeros(num, steps)
    edges, shares = slow_edges(name, batch)
    for i in range(num):
        node = int(batch.tree.leaf_of_sample[i])
        while node >= 0:
            for step in range(int(batch.tree.edge_start[node]), int(batch.tree.edge_end[node])):
                if batch.step_mask is None or batch.step_mask[i, step]:
                    advantage[i, step], weight[i, step] = edges[node], shares[node]
            node = int(batch.tree.parent[node])
    return advantage, weight


@pytest.mark.parametrize("name", ["spo_tree", "tree_rl", "tree_rpo", "branch_grpo"])
@pytest.mark.parametrize("seed", range(6))
def test_recipes_agree_with_plain_loops_on_ragged_trees(name, seed):
    batch = world(seed, mask=seed % 2 == 1, tables=("tree", "step_mask") if seed % 2 else ("tree",))
    result = estimate(name, batch)
    advantage, weight = slow(name, batch)
    assert torch.allclose(result.advantage, advantage, atol=1e-5)
    assert torch.allclose(result.weight, weight, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_tree_grpo_agrees_with_plain_loops(seed):
    batch = world(seed, tables=("tree",))
    rewards, groups = batch.rewards[:, 0].tolist(), batch.group_id.tolist()
    root = [int(node) for node in batch.tree.leaf_of_sample]
    while any(int(batch.tree.parent[node]) >= 0 for node in root):
        root = [int(batch.tree.parent[node]) if int(batch.tree.parent[node]) >= 0 else node for node in root]
    expected = []
    for i, reward in enumerate(rewards):
        total = 0.0
        for keys in (groups, root):
            members = [r for j, r in enumerate(rewards) if keys[j] == keys[i]]
            if max(members) - min(members) > 1e-9:
                total += (reward - sum(members) / len(members)) / (std(members, 1) + 1e-6)
        expected.append(total)
    result = estimate("tree_grpo", batch)
    assert torch.allclose(result.advantage, torch.tensor(expected)[:, None].expand_as(result.advantage), atol=1e-5)
    assert torch.allclose(result.weight, slow("tree_rpo", batch)[1], atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_softmax_values_agree_with_plain_loops(seed):
    batch = world(seed)
    assert values_of(batch, "softmax").tolist() == pytest.approx(slow_values(batch.tree, batch.rewards[:, 0].tolist(), "softmax")[0])


# -- identities ---------------------------------------------------------------------------------------------------------------------


def shallow(seed):
    """Trees of depth one: every sample hangs on its prompt's root."""
    flat = world(seed, tables=())
    num, groups = len(flat.rewards), int(flat.group_id.max()) + 1
    index = torch.arange(num)
    tree = Tree(
        parent=torch.cat([torch.full((groups,), -1), flat.group_id]),
        prompt=torch.cat([torch.arange(groups), flat.group_id]),
        leaf_of_sample=groups + index,
        edge_start=torch.zeros(groups + num, dtype=torch.int64),
        edge_end=torch.cat([torch.zeros(groups, dtype=torch.int64), torch.ones(num, dtype=torch.int64)]),
    )
    return flat, dataclasses.replace(flat, tree=tree)


@pytest.mark.parametrize(
    ("tree", "options", "flat", "flat_options"),
    [
        ("spo_tree", {"scale": "none"}, "dr_grpo", {}),
        ("tree_rpo", {"baseline": "others"}, "rloo", {}),
        ("tree_rpo", {}, "grpo", {}),
        ("branch_grpo", {}, "grpo", {"ddof": 1, "eps": 1e-8}),
    ],
)
def test_trees_of_depth_one_are_the_flat_recipes(tree, options, flat, flat_options):
    for seed in range(6):
        without, batch = shallow(seed)
        assert torch.allclose(estimate(tree, batch, **options).advantage, estimate(flat, without, **flat_options).advantage, atol=1e-6)


def test_gains_along_a_path_add_up_to_the_reward_less_the_value_of_the_root():
    for seed in range(6):
        batch = world(seed, tables=("tree",))
        edges = chain(combine_rewards(), node_values("children"), subtract_parent(), edges_to_steps("each"))
        gains = edges.update(batch, edges.init())[0].advantage.double()
        values = values_of(batch, "children")
        for i, leaf in enumerate(batch.tree.leaf_of_sample.tolist()):
            total, node = 0.0, leaf
            while int(batch.tree.parent[node]) >= 0:
                total += float(gains[i, int(batch.tree.edge_start[node])])
                node = int(batch.tree.parent[node])
            assert total == pytest.approx(float(batch.rewards[i, 0] - values[node]), abs=1e-6)


def test_the_weights_of_an_edge_s_copies_add_up_to_one_edge():
    result = estimate("spo_tree", common(), scale="none")
    assert result.weight.tolist() == [[0.5, 1.0], [0.5, 1.0], [0.5, 0.0], [0.5, 0.0]]
    assert estimate("branch_grpo", common(), share="sqrt").weight[:, 0].tolist() == pytest.approx([2**-0.5] * 4)
    assert estimate("branch_grpo", common(), share="each").weight.tolist() == [[1.0, 1.0]] * 4


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_branch_counts_for_nothing(name):
    """A leaf that no sample claims is left out of values, statistics and shares."""
    parent = [*PARENT, 1, 2]
    pruned = batch_of(tree_of(parent, [3, 4, 5, 6]), [1, 0, 1, 0.5])
    plain = batch_of(tree_of(PARENT, [3, 4, 5, 6]), [1, 0, 1, 0.5])
    for result in (estimate(name, pruned), estimate(name, batch_of(tree_of([*PARENT, 0], [3, 4, 5, 6]), [1, 0, 1, 0.5]))):
        assert torch.equal(result.advantage, estimate(name, plain).advantage)
        assert torch.equal(result.weight, estimate(name, plain).weight)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_without_reward_is_dropped_and_its_edges_are_shared_by_the_others(name):
    missing = batch_of(tree_of([*PARENT, 1], [3, 4, 5, 6, 7]), [1, 0, 1, 0.5, float("nan")])
    plain = batch_of(tree_of(PARENT, [3, 4, 5, 6]), [1, 0, 1, 0.5])
    result, expected = estimate(name, missing), estimate(name, plain)
    assert result.keep.tolist() == [True] * 4 + [False]
    assert torch.equal(result.advantage[:4], expected.advantage)
    assert torch.equal(result.weight[:4], expected.weight)
    assert not result.advantage[4].any()


@pytest.mark.parametrize("name", NAMES)
def test_numbering_the_nodes_otherwise_changes_nothing(name):
    for seed in range(4):
        batch = world(seed, tables=("tree",))
        tree, number = batch.tree, torch.randperm(len(batch.tree.parent), generator=torch.Generator().manual_seed(seed))
        order = torch.argsort(number)
        parent = torch.where(tree.parent >= 0, number[tree.parent.clamp(min=0)], tree.parent)
        renumbered = Tree(
            parent=parent[order],
            prompt=tree.prompt[order],
            leaf_of_sample=number[tree.leaf_of_sample],
            edge_start=tree.edge_start[order],
            edge_end=tree.edge_end[order],
        )
        again = estimate(name, dataclasses.replace(batch, tree=renumbered))
        assert torch.allclose(again.advantage, estimate(name, batch).advantage, atol=1e-6)


def test_segments_of_nodes_are_checked_when_the_chain_runs():
    batch = common()
    for over in ("siblings", "depth"):
        estimator = chain(combine_rewards(), center(over), broadcast_steps())
        with pytest.raises(ValueError, match="put node_values before it"):
            estimator.update(batch, estimator.init())
    with pytest.raises(ValueError, match="did you mean 'siblings'"):
        wrong = chain(combine_rewards(), leave_one_out("sibling"), broadcast_steps())
        wrong.update(batch, wrong.init())
    with pytest.raises(ValueError, match="stage 2 \\(subtract_parent\\) takes rows 'node'"):
        chain(combine_rewards(), subtract_parent(), edges_to_steps())


# -- bad input ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_a_tree_is_refused(name):
    assert config(name).claims.needs == ("tree",)
    with pytest.raises(ValueError, match=r"needs RewardBatch.tree: give the Tree of a branching rollout"):
        estimate(name, world(0, tables=()))


def test_softmax_without_log_probs_is_refused():
    with pytest.raises(ValueError, match="needs Tree.edge_log_prob: give the mean log-prob"):
        estimate("branch_grpo", common(), average="softmax")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parent": [-1, 2, 1]}, "node 1 is its own ancestor"),
        ({"parent": [1, 0, 0]}, "node 0 is its own ancestor"),
        ({"parent": [-1, 0, 9]}, r"tree.parent\[2\]: node 9 does not exist"),
        ({"parent": [-1, 0]}, "tree.prompt: got 3 entries for 2 nodes"),
        ({"prompt": [0, 0, 1]}, r"tree.prompt\[2\]: is 1, but its parent's is 0"),
        ({"edge_start": [0, 0, 2], "edge_end": [0, 1, 1]}, r"edge_start\[2\], edge_end\[2\]: got \[2, 1\)"),
        ({"edge_end": [1, 1, 1]}, "a root owns none"),
        ({"parent": [-1, 0, 1], "edge_start": [0, 0, 0]}, "begins where its parent's has ended"),
        ({"leaf_of_sample": [1, 1]}, r"leaf_of_sample\[0\]: node 1 is the leaf of another sample too"),
        ({"leaf_of_sample": [0, 1]}, r"leaf_of_sample\[0\]: node 0 has children"),
        ({"leaf_of_sample": [1, 5]}, "needed nodes from 0 to 2, got 1 to 5"),
        ({"leaf_of_sample": [1]}, "got 1 leaves for 2 samples"),
        ({"prompt": [4, 4, 4]}, "belongs to another prompt than the sample's group_id"),
        ({"edge_end": [0, 1, 3], "steps": 2}, r"tree.edge_end\[2\]: is 3, but the batch has 2 trained steps"),
        ({"parent": [-1.0, 0.0, 0.0]}, "tree.parent: got torch.float32, needed integers"),
    ],
)
def test_a_broken_tree_is_refused_with_the_place(fields, message):
    good = {"parent": [-1, 0, 0], "prompt": [0, 0, 0], "leaf_of_sample": [1, 2], "edge_start": [0, 0, 0], "edge_end": [0, 1, 1]}
    steps = fields.pop("steps", None) if "steps" in fields else None
    with pytest.raises(ValueError, match=message):
        tree = Tree(**{name: torch.tensor(value) for name, value in {**good, **fields}.items()})
        batch_of(tree, [0.0, 1.0], step_mask=None if steps is None else torch.ones(2, steps, dtype=torch.bool))


def test_a_wrong_temperature_is_refused_when_the_chain_is_built():
    with pytest.raises(ValueError, match="temperature: got 0.0, needed a positive number"):
        estimate("branch_grpo", common(), temperature=0.0)


def test_random_trees_are_trees_of_their_groups():
    """The worlds of these tests: every sample has a leaf of its own, and its path owns every step once."""
    for seed in range(5):
        batch = world(seed)
        ones = chain(combine_rewards(), node_values("leaves"), center("depth"), edges_to_steps("each"))
        assert ones.update(batch, ones.init())[0].weight.min() == 1.0
        assert len(random_tree(batch.group_id, torch.Generator().manual_seed(seed)).parent) > len(batch.rewards)
        assert torch.equal(take(batch, torch.arange(len(batch.rewards))).tree.parent, batch.tree.parent)
