"""Trees of samples: which images share how much of their trajectory.

One forest describes a whole batch. A node is a branching point or a leaf, and the edge from its parent to it
owns the denoising steps in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A forest over the samples of a batch.

    Shapes:
        parent: ``[nodes]``, the parent of each node, -1 for a root.
        leaf_of_sample: ``[batch]``, the leaf each sample ends in; no two samples share one.
        edge_start, edge_stop: ``[nodes]``, the edge that ends in a node owns the steps ``start <= t < stop``;
            children go on at or after the step where their parent stops, and roots own none.
        edge_log_prob: ``[nodes]`` or None, mean log-probability of the transitions of the edge.
        uid: ``[nodes]`` or None. Nodes of several ranks with the same uid are one node; without uids the
            forests of two ranks have no node in common.
        depth: ``[nodes]``, 0 for roots; worked out, and checked if given.

    Raises:
        ValueError: If a parent or leaf does not exist, if parents form a cycle, if a leaf has children or
            two samples, or if the steps of an edge overlap those of its parent.

    Examples:
        >>> none = torch.zeros(3, dtype=torch.int64)
        >>> tree = Tree(parent=torch.tensor([-1, 0, 0]), leaf_of_sample=torch.tensor([1, 2]),
        ...             edge_start=none, edge_stop=torch.tensor([0, 2, 2]))
        >>> tree.depth.tolist(), tree.root.tolist()
        ([0, 1, 1], [0, 0, 0])
    """

    parent: Int[Tensor, " nodes"]
    leaf_of_sample: Int[Tensor, " batch"]
    edge_start: Int[Tensor, " nodes"]
    edge_stop: Int[Tensor, " nodes"]
    edge_log_prob: Float[Tensor, " nodes"] | None = None
    uid: Int[Tensor, " nodes"] | None = None
    depth: Int[Tensor, " nodes"] = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        """Bring every field to the CPU and check that the arrays describe a forest."""
        store = object.__setattr__
        for name, ids in self._integers().items():
            if ids.is_floating_point():
                raise ValueError(f"tree.{name}: must be integers, got {ids.dtype}")
            store(self, name, ids.detach().to("cpu", torch.int64))
        if self.edge_log_prob is not None:
            store(self, "edge_log_prob", self.edge_log_prob.detach().to("cpu", torch.float64))
        self._check_shapes()
        depth = _depths(self.parent)
        if self.depth.numel() and not torch.equal(self.depth, depth):
            node = int((self.depth != depth).nonzero()[0])
            raise ValueError(f"tree.depth: node {node} is at depth {int(depth[node])}, got {int(self.depth[node])}")
        store(self, "depth", depth)
        self._check_leaves()
        self._check_steps()

    @property
    def root(self) -> Int[Tensor, " nodes"]:
        """The root above each node."""
        root = torch.arange(self.parent.numel())
        for _ in range(int(self.depth.max()) if root.numel() else 0):
            root = torch.where(self.parent[root] < 0, root, self.parent[root])
        return root

    @property
    def is_leaf(self) -> Bool[Tensor, " nodes"]:
        """Which nodes have no children."""
        is_leaf = torch.ones_like(self.parent, dtype=torch.bool)
        is_leaf[self.parent[self.parent >= 0]] = False
        return is_leaf

    @property
    def num_steps(self) -> int:
        """Number of denoising steps that the edges reach."""
        return int(self.edge_stop.max()) if self.edge_stop.numel() else 0

    def _integers(self) -> dict[str, Tensor]:
        fields = {"parent": self.parent, "leaf_of_sample": self.leaf_of_sample, "depth": self.depth}
        fields |= {"edge_start": self.edge_start, "edge_stop": self.edge_stop}
        return fields if self.uid is None else fields | {"uid": self.uid}

    def _check_shapes(self) -> None:
        num = self.parent.numel()
        per_node = {"edge_start": self.edge_start, "edge_stop": self.edge_stop}
        per_node |= {"edge_log_prob": self.edge_log_prob} if self.edge_log_prob is not None else {}
        per_node |= {"uid": self.uid} if self.uid is not None else {}
        per_node |= {"depth": self.depth} if self.depth.numel() else {}
        for name, value in {"parent": self.parent, **per_node}.items():
            if value.shape != (num,):
                raise ValueError(f"tree.{name}: must have shape [{num}] like parent, got {list(value.shape)}")
        if self.uid is not None and self.uid.unique().numel() != num:
            raise ValueError("tree.uid: two nodes have the same uid")
        if self.leaf_of_sample.ndim != 1:
            raise ValueError(f"tree.leaf_of_sample: must be [batch], got {list(self.leaf_of_sample.shape)}")

    def _check_leaves(self) -> None:
        num, leaves = self.parent.numel(), self.leaf_of_sample
        for sample, leaf in enumerate(leaves.tolist()):
            if not 0 <= leaf < num:
                raise ValueError(f"tree.leaf_of_sample[{sample}]: node {leaf} does not exist, there are {num}")
        inner = (~self.is_leaf[leaves]).nonzero().flatten().tolist()
        if inner:
            raise ValueError(f"tree.leaf_of_sample[{inner[0]}]: node {int(leaves[inner[0]])} has children")
        if leaves.unique().numel() != leaves.numel():
            node, count = (x.tolist() for x in leaves.unique(return_counts=True))
            shared = next(n for n, c in zip(node, count, strict=True) if c > 1)
            raise ValueError(f"tree.leaf_of_sample: two samples share leaf {shared}; every sample needs its own")

    def _check_steps(self) -> None:
        above = torch.where(self.parent >= 0, self.edge_stop[self.parent], 0)
        wrong = (self.edge_start < above) | (self.edge_stop < self.edge_start)
        wrong |= (self.parent < 0) & (self.edge_stop > self.edge_start)
        for node in wrong.nonzero().flatten().tolist()[:1]:
            raise ValueError(
                f"tree.edge_start, edge_stop: the edge to node {node} owns steps {int(self.edge_start[node])} to "
                f"{int(self.edge_stop[node])}; its parent stops at {int(above[node])}, and roots own no steps"
            )


def _depths(parent: Int[Tensor, " nodes"]) -> Int[Tensor, " nodes"]:
    num = parent.numel()
    for node in ((parent < -1) | (parent >= num)).nonzero().flatten().tolist()[:1]:
        raise ValueError(f"tree.parent[{node}]: node {int(parent[node])} does not exist (orphan); roots have -1")
    depth = torch.where(parent < 0, 0, -1)
    level = 0
    while bool((depth < 0).any()):
        reached = (depth < 0) & (depth[parent] == level)
        if not bool(reached.any()):
            raise ValueError(f"tree.parent: node {int((depth < 0).nonzero()[0])} is part of or below a cycle")
        level += 1
        depth[reached] = level
    return depth


def merge(trees: Sequence[Tree]) -> Tree:
    """Join the forests of several ranks; samples are numbered on.

    Args:
        trees: One forest per rank, all with uids or all without, all with edge log-probs or all without.

    Returns:
        One forest. Nodes with the same uid become one node.

    Raises:
        ValueError: If ranks disagree on the parent or the steps of a node they share.
    """
    sizes = [tree.parent.numel() for tree in trees]
    first = [sum(sizes[:rank]) for rank in range(len(sizes))]
    parent = torch.cat([torch.where(t.parent < 0, -1, t.parent + at) for t, at in zip(trees, first, strict=True)])
    leaf = torch.cat([t.leaf_of_sample + at for t, at in zip(trees, first, strict=True)])
    start, stop = torch.cat([t.edge_start for t in trees]), torch.cat([t.edge_stop for t in trees])
    log_probs = [t.edge_log_prob for t in trees if t.edge_log_prob is not None]
    uids = [t.uid for t in trees if t.uid is not None]
    if not uids:
        log_prob = torch.cat(log_probs) if log_probs else None
        return Tree(parent=parent, leaf_of_sample=leaf, edge_start=start, edge_stop=stop, edge_log_prob=log_prob)
    uid, node = torch.unique(torch.cat(uids), return_inverse=True)
    parent = torch.where(parent < 0, -1, node[parent])
    merged = [_agree(x, node, uid, name) for x, name in ((parent, "parent"), (start, "edge_start"), (stop, "edge_stop"))]
    log_prob = _agree(torch.cat(log_probs), node, uid, "edge_log_prob") if log_probs else None
    return Tree(
        parent=merged[0],
        leaf_of_sample=node[leaf],
        edge_start=merged[1],
        edge_stop=merged[2],
        edge_log_prob=log_prob,
        uid=uid,
    )


def _agree(value: Tensor, node: Tensor, uid: Tensor, name: str) -> Tensor:
    merged = value.new_zeros(uid.numel()).scatter(0, node, value)
    for row in (merged[node] != value).nonzero().flatten().tolist()[:1]:
        raise ValueError(f"tree.{name}: ranks disagree on the node with uid {int(uid[node[row]])}")
    return merged
