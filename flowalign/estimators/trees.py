"""Statistics over trees: values of nodes, what an edge gained, and which steps an edge pays.

A rollout that branches shares its beginnings: children of a node start from the same state and differ in what came after. The value of a
node is an average over what lies below it, and the advantage of the edge to a node is paid to the steps that the edge owns.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.forest import Tree
from flowalign.estimators.kinds import FACTORS, Signature
from flowalign.estimators.needs import need_tree
from flowalign.estimators.scale import divisor, quotient, refuse_divisor
from flowalign.estimators.segmentation import segment_key
from flowalign.estimators.segments import RTOL, segment_stats
from flowalign.estimators.signals import Signal, Stage, pure, scored_samples, stage

Average = Literal["children", "leaves", "softmax"]
Share = Literal["mean", "sqrt", "each"]


@stage
def node_values(average: Average = "children", *, temperature: float = 1.0) -> Stage:
    """Give every node of the tree a value.

    Args:
        average: ``children`` is the mean of the children's values, ``leaves`` the mean of all samples below (they differ as soon as the
            tree is ragged), ``softmax`` the mean of the children weighted by the likelihood of their edges.
        temperature: Of the softmax over the edges' mean log-probs. (Of log-probs summed over dimensions it would be an argmax.)
    """
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}, needed a positive number")

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        tree = need_tree(batch, "node_values")
        if average == "leaves":
            value = _mean_of_leaves(tree, signal.x)
        else:
            value = _mean_of_children(tree, signal.x, _edge_weights(tree, temperature) if average == "softmax" else None)
        nodes = len(tree.parent)
        return replace(
            signal,
            x=value,
            node=torch.arange(nodes),
            sample=_any_sample(tree, batch),
            step=tree.depth(),
            weight=torch.ones(nodes, dtype=torch.float64),
            keep=signal.keep & ~torch.isnan(signal.x).all(1),
            raw=None,
        )

    return pure(Signature(rows="sample -> node", phase="reward | centred", refuses="weights"), apply, needs=("tree",))


def _mean_of_leaves(tree: Tree, x: Tensor) -> Tensor:
    total, count = x.new_zeros(len(tree.parent), x.shape[1]), x.new_zeros(len(tree.parent), x.shape[1])
    known = (~torch.isnan(x)).double()
    filled, at = torch.nan_to_num(x), tree.leaf_of_sample
    while bool((at >= 0).any()):
        below = at >= 0
        total = total.index_add(0, at[below], filled[below])
        count = count.index_add(0, at[below], known[below])
        at = tree.parents_of(at)
    return total / count


def _mean_of_children(tree: Tree, x: Tensor, weight: Tensor | None) -> Tensor:
    depth = tree.depth()
    value = x.new_full((len(tree.parent), x.shape[1]), torch.nan)
    value[tree.leaf_of_sample] = x
    order = torch.argsort(depth, descending=True, stable=True)
    # From the deepest level up: a level is averaged into its parents at once.
    for level in order.split(torch.bincount(depth).flip(0).tolist()):
        level = level[tree.parent[level] >= 0]
        parent = tree.parent[level]
        share = torch.where(
            torch.isnan(value[level]), 0.0, torch.ones(1, 1, dtype=torch.float64) if weight is None else weight[level, None]
        )
        total = torch.zeros_like(value).index_add(0, parent, share * torch.nan_to_num(value[level]))
        mass = torch.zeros_like(value).index_add(0, parent, share)
        value[parent] = (total / mass)[parent]
    return value


def _edge_weights(tree: Tree, temperature: float) -> Tensor:
    if tree.edge_log_prob is None:
        raise ValueError(
            "node_values(softmax) needs Tree.edge_log_prob: give the mean log-prob of every edge, or average over children or leaves"
        )
    logit = tree.edge_log_prob / temperature
    child = tree.parent >= 0
    highest = torch.full_like(logit, -torch.inf).scatter_reduce(0, tree.parent[child], logit[child], "amax")
    return torch.where(child, (logit - highest[tree.parent.clamp(min=0)]).exp(), 1.0)


def _any_sample(tree: Tree, batch: RewardBatch) -> Tensor:
    """Return a sample of each node's prompt, by which segmentations find the group."""
    groups = torch.unique(batch.group_id)
    first = torch.zeros_like(groups).scatter(0, batch.group.flip(0), torch.arange(len(batch.group_id)).flip(0))
    return first[torch.searchsorted(groups, tree.prompt).clamp(max=max(0, len(groups) - 1))]


@stage
def subtract_parent() -> Stage:
    """Subtract from each node's value that of its parent; a root, and what differs by rounding only, gets 0."""

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        tree = need_tree(batch, "subtract_parent")
        return replace(signal, x=_gain(tree, signal.x), raw=signal.x)

    return pure(Signature(rows="node", phase="reward -> centred"), apply, needs=("tree",))


def _gain(tree: Tree, value: Tensor) -> Tensor:
    above = value[tree.parent.clamp(min=0)]
    same = (value - above).abs() <= RTOL * torch.maximum(value.abs(), above.abs())
    return torch.where((tree.parent < 0)[:, None] | same, 0.0, value - above)


@stage
def add_gain(*, divide: Literal["sqrt_leaves", "none"] = "sqrt_leaves") -> Stage:
    """Add to each node's value what it gained over its parent's: how good it is at all, and how good the edge to it was.

    Args:
        divide: By the square root of the number of samples below, so that an edge that many samples share does not count as often.
    """

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        tree = need_tree(batch, "add_gain")
        both = torch.where((tree.parent < 0)[:, None], 0.0, signal.x + _gain(tree, signal.x))
        leaves = tree.num_samples(signal.keep).clamp(min=1).double()[:, None]
        return replace(signal, x=both / leaves.sqrt() if divide == "sqrt_leaves" else both, raw=None)

    return pure(Signature(rows="node", phase="centred"), apply, needs=("tree",))


@stage
def scale_edges(*, ddof: int, eps: float) -> Stage:
    """Divide by the standard deviation over all edges of the batch that change anything.

    Each edge counts as often as it owns steps, however many samples share it. Its mean stays, so that 0 stays 0.

    Args:
        ddof: Delta degrees of freedom.
        eps: Added to the standard deviation.
    """
    refuse_divisor(ddof=ddof, eps=eps)

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        tree = need_tree(batch, "scale_edges")
        counted = (signal.x[:, 0] != 0) & ~torch.isnan(signal.x[:, 0])
        values = signal.x[counted].repeat_interleave((tree.edge_end - tree.edge_start)[counted], 0)
        by = divisor(segment_stats(values, torch.zeros(len(values), dtype=torch.int64)).variance(ddof=ddof), eps=eps, rule="add")
        return replace(signal, x=quotient(signal.x, by)) if len(values) else signal

    signature = Signature(rows="node", rewards="one", phase="centred -> scaled", refuses=FACTORS)
    return pure(signature, apply, needs=("tree",))


@stage
def edges_to_steps(share: Share = "mean", *, zeros: Literal["train", "skip"] = "train") -> Stage:
    """Pay each edge's advantage to the steps that the edge owns, in every sample below it.

    Args:
        share: An edge above n samples occurs n times among the rows. ``mean`` weighs each copy by 1 / n, so that the edge is trained once;
            ``sqrt`` by 1 / sqrt(n); ``each`` by 1, which multiplies the gradient of early steps by n.
        zeros: ``skip`` leaves edges of advantage 0 out, so that later statistics do not see them.
    """

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        tree = need_tree(batch, "edges_to_steps")
        sample, step, node = step_owners(tree, batch)
        if zeros == "skip":
            chosen = signal.x[node, 0] != 0
            sample, step, node = sample[chosen], step[chosen], node[chosen]
        weight = (signal.weight * edge_shares(tree, signal.keep, share)).index_select(0, node)
        return replace(signal, x=signal.x.index_select(0, node), sample=sample, step=step, node=None, weight=weight, raw=None)

    return pure(Signature(rows="node -> step", rewards="one"), apply, needs=("tree",))


def step_owners(tree: Tree, batch: RewardBatch) -> tuple[Tensor, Tensor, Tensor]:
    """List the trained steps of all samples: sample, step, and the node whose edge owns it; ordered by sample, then step."""
    num, steps = len(batch.rewards), batch.num_steps
    first = torch.full((num, steps), -1)  # the node whose edge begins at a step
    at, row = tree.leaf_of_sample, torch.arange(num)
    while bool((at >= 0).any()):
        chosen = ((at >= 0) & (tree.edge_end > tree.edge_start)[at.clamp(min=0)]).nonzero()[:, 0]
        first[row[chosen], tree.edge_start[at[chosen]]] = at[chosen]
        at = tree.parents_of(at)
    step = torch.arange(steps).expand(num, -1)
    begin = torch.where(first >= 0, step, -1).cummax(1).values
    owner = first.gather(1, begin.clamp(min=0))
    owned = (begin >= 0) & (step < tree.edge_end.index_select(0, owner.clamp(min=0).view(-1)).view_as(owner))
    if batch.step_mask is not None:
        owned = owned & batch.step_mask
    place = owned.view(-1).nonzero()[:, 0]
    sample, step, owner = row[:, None].expand(-1, steps).reshape(-1), step.reshape(-1), owner.view(-1)
    if len(place) == len(sample):
        return sample, step, owner
    return sample[place], step[place], owner[place]


def edge_shares(tree: Tree, keep: Tensor, share: Share) -> Tensor:
    """Compute by what a copy of an edge is weighed, see ``edges_to_steps``; samples that are not kept are no copies."""
    copies = tree.num_samples(keep).clamp(min=1).double()
    return {"mean": 1 / copies, "sqrt": copies.rsqrt(), "each": torch.ones_like(copies)}[share]


@stage
def share_steps(share: Share = "mean") -> Stage:
    """Weigh steps that several samples share, as ``edges_to_steps`` does, for advantages that are not the tree's own."""

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        tree = need_tree(batch, "share_steps")
        sample, step, node = step_owners(tree, batch)
        weight = torch.zeros(len(batch.rewards), batch.num_steps, dtype=torch.float64)
        weight[sample, step] = edge_shares(tree, signal.keep & scored_samples(signal, batch), share)[node]
        return replace(signal, weight=signal.weight * weight[signal.sample, signal.step])

    return pure(Signature(rows="step", rewards="one", adds="weights"), apply, needs=("tree",))


@stage
def compare_in_groups_and_trees(*, ddof: int, eps: float) -> Stage:
    """Normalise the rewards over the samples of the prompt, and over those of each tree, and add the two.

    Args:
        ddof: Delta degrees of freedom of both standard deviations.
        eps: Added to both.
    """
    refuse_divisor(ddof=ddof, eps=eps)

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        total = torch.zeros_like(signal.x)
        for over in ("group", "tree"):
            stats = segment_stats(signal.x, segment_key(signal, batch, over))
            by = stats.rows(divisor(stats.variance(ddof=ddof), eps=eps, rule="add"))
            flat = stats.rows(stats.is_flat) & ~torch.isnan(signal.x)
            total = total + torch.where(flat, 0.0, (signal.x - stats.rows(stats.mean)) / by)
        return replace(signal, x=total, raw=None)

    return pure(Signature(rows="sample", phase="reward -> scaled", refuses=FACTORS), apply, needs=("tree",))


STAGES = (node_values, subtract_parent, add_gain, scale_edges, edges_to_steps, share_steps, compare_in_groups_and_trees)
"""For ``stages.STAGES``."""
