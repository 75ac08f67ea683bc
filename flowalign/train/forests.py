"""What a plan's shape means to an estimator: groups, trained steps, shared states and trees of the final states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowalign.core.plans import Plan
from flowalign.core.randomness import key
from flowalign.estimators.forest import Tree


def compared_groups(plan: Plan, prompts: Tensor, seeds: Tensor) -> Tensor:
    """Number whom each final state is compared with, as ``plan.compare`` says; the same on every process and in every step.

    Args:
        plan: The plan.
        prompts: ``[seeds]``, id of each initial state's prompt.
        seeds: ``[seeds]``, a number for each that no other initial state of its prompt has in this step.

    Returns:
        Group ids ``[seeds * leaves]``; the prompts' own ids where whole prompts are compared.
    """
    if plan.compare == "prompt":
        return prompts.repeat_interleave(plan.num_leaves)
    steps, place = torch.unique(torch.tensor(plan.forked_at()), return_inverse=True)
    by_state = plan.compare == "state"
    ids = {
        (prompt, seed): torch.tensor([key(prompt, seed, step) if by_state else key(prompt, step) for step in steps.tolist()])
        for prompt, seed in {(p, s if by_state else 0) for p, s in zip(prompts.tolist(), seeds.tolist(), strict=True)}
    }
    return torch.cat([ids[p, s if by_state else 0][place] for p, s in zip(prompts.tolist(), seeds.tolist(), strict=True)])


def trained_steps(plan: Plan) -> Tensor:
    """Tell which trained steps lead to each final state of an initial state, ``[leaves, T]`` bool."""
    left = torch.tensor(plan.forked_at())
    columns = []
    for i in plan.trained:
        step = plan.steps[i]
        on_path = (left < 0) | (left > i)
        columns.append((on_path & step.is_trained) | (left == i))
    return torch.stack(columns, 1) if columns else torch.ones(plan.num_leaves, 0, dtype=torch.bool)


def anchors(plan: Plan, num: int) -> Tensor:
    """Number the state that each trained step of each final state starts from, ``[num * leaves, T]``; -1 where it does not train the step.

    Args:
        plan: The plan.
        num: Number of initial states, over all processes, in order.
    """
    leaves, mask = torch.arange(plan.num_leaves), trained_steps(plan)
    columns = []
    for i in plan.trained:
        states = torch.tensor(plan.states(i))
        first = states[(torch.searchsorted(states, leaves, right=True) - 1).clamp(min=0)]
        columns.append(i * num * plan.num_leaves + first)
    one = torch.stack(columns, 1)
    every = one + plan.num_leaves * torch.arange(num)[:, None, None]
    return torch.where(mask, every, -1).flatten(0, 1)


@dataclass
class _Growth:
    """The nodes of one initial state's tree: parent, and the trained steps ``[start, end)`` of the edge to it; leaves in order."""

    plan: Plan
    nodes: list[tuple[int, int, int]] = field(default_factory=list)
    leaves: list[int] = field(default_factory=list)

    def node(self, above: int, start: int, end: int) -> int:
        self.nodes.append((above, start, end))
        return len(self.nodes) - 1

    def close(self, above: int, start: int, end: int) -> int:
        """End an edge where the path splits; an edge without steps needs no node."""
        return above if start == end else self.node(above, start, end)

    def grow(self, index: int, above: int, start: int, end: int) -> None:
        """Follow the path from step ``index``, below the node ``above``, with an edge that owns ``[start, end)`` so far."""
        if index == self.plan.path_end:
            if self.plan.keeps_path:
                self.leaves.append(self.node(above, start, end))
            return
        step = self.plan.steps[index]
        after = end + int(index in self.plan.trained)
        if step.fork is not None:
            above, start = self.close(above, start, end), end
            # A node of its own, so that siblings are the children of one state and of one step.
            state = self.node(above, end, end)
            self.leaves += [self.node(state, end, after) for _ in range(step.fork.num_children)]
            if not step.is_trained:
                start = after  # the step belongs to the children alone
        if step.num_children > 1 and step.fork is None:
            above, start = self.close(above, start, end), end
        for _ in range(step.num_children):
            # A split that is not trained has no edge of its own, but its children are siblings all the same.
            below = self.node(above, end, end) if step.num_children > 1 and not step.is_trained else above
            self.grow(index + 1, below, start, after)


def forest(plan: Plan, prompts: Tensor, log_prob: Tensor | None = None) -> Tree:
    """Build the trees of a rollout, one for each initial state.

    Below a root lie the states that split or fork; edges own the trained steps that lead to a node. Children that forked off at one state are
    siblings, and nothing else is.

    Args:
        plan: The plan.
        prompts: ``[seeds]``, id of each initial state's prompt, over all processes.
        log_prob: ``[seeds * leaves, T]`` mean log-probs of the trained steps, for averages that weigh by them.
    """
    growth = _Growth(plan)
    growth.grow(0, growth.node(-1, 0, 0), 0, 0)
    parent, start, end = (torch.tensor(column) for column in zip(*growth.nodes, strict=True))
    num, size = len(prompts), len(parent)
    offset = size * torch.arange(num)[:, None]
    leaf = torch.tensor(growth.leaves)
    return Tree(
        parent=torch.where(parent < 0, -1, parent + offset).flatten(),
        prompt=prompts.repeat_interleave(size),
        leaf_of_sample=(leaf + offset).flatten(),
        edge_start=start.repeat(num),
        edge_end=end.repeat(num),
        edge_log_prob=None if log_prob is None else _edge_log_probs(growth.nodes, growth.leaves, log_prob.view(num, len(leaf), -1)),
    )


def _edge_log_probs(nodes: Sequence[tuple[int, int, int]], leaves: Sequence[int], log_prob: Tensor) -> Tensor:
    """Average each edge's steps, read at any final state below it; 0 for an edge without steps."""
    below: dict[int, int] = {}
    for number, leaf in enumerate(leaves):
        at = leaf
        while at >= 0:
            below.setdefault(at, number)
            at = nodes[at][0]
    columns = [
        log_prob[:, below[node], start:end].mean(1) if end > start else torch.zeros(len(log_prob), dtype=log_prob.dtype)
        for node, (_, start, end) in enumerate(nodes)
    ]
    return torch.stack(columns, 1).flatten()
