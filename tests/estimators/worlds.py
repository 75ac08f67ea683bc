"""Random ragged batches with every table that a recipe may need, and ways to cut, shuffle and change them."""

import dataclasses

import torch

from flowalign.estimators import RewardBatch, Tree

STEPS = 3


def ragged_groups(generator, num=5, low=2, high=7):
    return torch.repeat_interleave(torch.arange(num), torch.randint(low, high, (num,), generator=generator))


def random_rewards(num, seed, generator):
    uniform = torch.rand(num, generator=generator, dtype=torch.float64)
    normal = torch.randn(num, generator=generator, dtype=torch.float64)
    return [uniform, (uniform > 0.5).double(), normal][seed % 3]


def mates(rewards, groups, generator):
    """For each sample another one of its group (or itself) whose reward is known."""
    mate = torch.arange(len(groups))
    for i in range(len(groups)):
        known = ((groups == groups[i]) & ~torch.isnan(rewards).any(1)).nonzero()[:, 0]
        if len(known):
            mate[i] = known[int(torch.randint(len(known), (1,), generator=generator))]
    return mate


def random_tree(groups, generator, steps=STEPS, log_prob=True):
    """Grow a ragged tree per group: samples are dealt to branches, depth by depth; node numbers mean nothing."""
    parent, prompt, start, end = [], [], [], []
    leaf = torch.empty(len(groups), dtype=torch.int64)

    def add(above, group, first, last):
        parent.append(above)
        prompt.append(group)
        start.append(first)
        end.append(last)
        return len(parent) - 1

    def grow(node, samples, depth, group):
        if len(samples) == 1 and (depth == steps or torch.rand(1, generator=generator) < 0.5) and parent[node] >= 0:
            end[node] = steps
            leaf[samples[0]] = node
            return
        if depth == steps - 1:
            for sample in samples:
                leaf[sample] = add(node, group, depth, steps)
            return
        branch = torch.randint(3, (len(samples),), generator=generator).tolist()
        for number in sorted(set(branch)):
            grow(add(node, group, depth, depth + 1), [s for s, b in zip(samples, branch, strict=True) if b == number], depth + 1, group)

    for group in groups.unique().tolist():
        samples = (groups == group).nonzero()[:, 0].tolist()
        roots = [samples] if len(samples) < 4 else [samples[: len(samples) // 2], samples[len(samples) // 2 :]]
        for members in roots:
            grow(add(-1, group, 0, 0), members, 0, group)
    number = torch.randperm(len(parent), generator=generator)
    above = torch.tensor(parent)
    above = torch.where(above >= 0, number[above.clamp(min=0)], above)
    order = torch.argsort(number)
    return Tree(
        parent=above[order],
        prompt=torch.tensor(prompt)[order],
        leaf_of_sample=number[leaf],
        edge_start=torch.tensor(start)[order],
        edge_end=torch.tensor(end)[order],
        edge_log_prob=-torch.rand(len(parent), generator=generator, dtype=torch.float64) if log_prob else None,
    )


def world(seed, rewards=None, groups=None, num_rewards=1, steps=STEPS, mask=False, dtype=torch.float64, tables=None):
    """Make a batch in which everything that is a reward moves with the rewards: values and step rewards are mixtures within the group."""
    generator = torch.Generator().manual_seed(seed)
    groups = ragged_groups(generator) if groups is None else torch.as_tensor(groups)
    num = len(groups)
    if rewards is None:
        rewards = torch.stack([random_rewards(num, seed + column, generator) for column in range(num_rewards)], 1)
    rewards = torch.as_tensor(rewards, dtype=dtype)
    rewards = rewards if rewards.ndim == 2 else rewards[:, None]
    mix = torch.rand(num, steps, 1, generator=generator, dtype=torch.float64)
    step_rewards = torch.stack(
        [mix[:, t] * rewards + (1 - mix[:, t]) * rewards[mates(rewards, groups, generator)] for t in range(steps)], 1
    )
    step_rewards = torch.where(torch.isnan(rewards)[:, None], torch.nan, step_rewards)
    cell = torch.randint(3, (num, steps), generator=generator)
    fields = {
        "metric": torch.rand(num, 2, generator=generator, dtype=torch.float64),
        "log_prob": -torch.rand(num, steps, generator=generator, dtype=torch.float64),
        "step_rewards": step_rewards,
        "anchor_id": 2**60 + groups[:, None] * 1000 + torch.arange(steps) * 10 + cell,
        "baseline": rewards[mates(rewards, groups, generator)],
        "tree": random_tree(groups, generator, steps),
        "clauses": (torch.rand(num, 4, generator=generator) < 0.5).double(),
        "clauses_valid": (torch.arange(4) < 2 + groups[:, None] % 3),
    }
    trained = torch.rand(num, steps, generator=generator) < 0.7
    if mask:
        fields["step_mask"] = trained
    if tables is not None:
        fields = {name: fields[name] for name in tables}
    return RewardBatch(rewards=rewards, group_id=groups, sample_uid=torch.arange(num), **fields)


def take(batch, index, relabel=None):
    """The batch's rows in another order, or only some of them; a leaf whose sample is gone stays as a pruned branch."""
    index = torch.as_tensor(index)
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    tables = {name: value[index] for name, value in values.items() if isinstance(value, torch.Tensor)}
    tree = batch.tree
    if tree is not None:
        tree = dataclasses.replace(tree, leaf_of_sample=tree.leaf_of_sample[index])
    if relabel is not None:
        tables["group_id"] = relabel[tables["group_id"]]
        tree = tree and dataclasses.replace(tree, prompt=relabel[tree.prompt])
    return RewardBatch(**tables, tree=tree)


def change(batch, function):
    """Apply a function of (values, group of each row) to everything that is a reward."""
    fields = {}
    for name in ("rewards", "step_rewards", "baseline"):
        value = getattr(batch, name)
        if value is not None:
            group = batch.group_id.view(-1, *[1] * (value.ndim - 1))
            fields[name] = function(value, group)
    return dataclasses.replace(batch, **fields)
