"""Where samples share their beginnings: trees whose edges carry trained steps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A forest over the samples of a batch. Edges carry the trained steps; a root has no edge.

    Trees of one prompt that are to be compared with each other need a common root without steps of its own.

    Shapes:
        parent: ``[nodes]`` int64, -1 for a root.
        prompt: ``[nodes]`` int64, group of each node.
        leaf_of_sample: ``[batch]`` int64, the leaf that is the sample.
        edge_start, edge_end: ``[nodes]`` int64, trained steps ``[start, end)`` of the edge from the parent.
        edge_log_prob: ``[nodes]`` mean log-prob of the edge, for averages that weigh by it.
    """

    parent: Tensor
    prompt: Tensor
    leaf_of_sample: Tensor
    edge_start: Tensor
    edge_end: Tensor
    edge_log_prob: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse cycles and orphans, and edges that go backwards."""
        nodes = len(self.parent)
        for name in ("parent", "prompt", "leaf_of_sample", "edge_start", "edge_end", "edge_log_prob"):
            self._convert(name, nodes)
        self._refuse(
            (self.parent >= nodes) | (self.parent < -1),
            lambda row: f"tree.parent[{row}]: node {int(self.parent[row])} does not exist (nodes are 0 to {nodes - 1}, -1 is a root)",
        )
        at = self.parent
        for _ in range(nodes + 1):
            if bool((at < 0).all()):
                break
            at = self.parents_of(at)
        self._refuse(at >= 0, lambda row: f"tree.parent: node {row} is its own ancestor; a tree must lead to a root (-1)")
        above = self.parent.clamp(min=0)
        child = self.parent >= 0
        self._refuse(
            child & (self.prompt != self.prompt[above]),
            lambda row: (
                f"tree.prompt[{row}]: is {int(self.prompt[row])}, but its parent's is {int(self.prompt[above[row]])}; "
                "a tree belongs to one prompt"
            ),
        )
        self._refuse(
            (self.edge_start < 0)
            | (self.edge_end < self.edge_start)
            | (child & (self.edge_start < self.edge_end[above]))
            | (~child & (self.edge_end > self.edge_start)),
            lambda row: (
                f"tree.edge_start[{row}], edge_end[{row}]: got [{int(self.edge_start[row])}, {int(self.edge_end[row])}); "
                "an edge owns steps start <= step < end, begins where its parent's has ended, and a root owns none"
            ),
        )

    def _convert(self, name: str, nodes: int) -> None:
        value = vars(self)[name]
        if value is None:
            return
        if name == "edge_log_prob":
            object.__setattr__(self, name, value.detach().cpu().double())
        elif value.is_floating_point():
            raise ValueError(f"tree.{name}: got {value.dtype}, needed integers")
        else:
            object.__setattr__(self, name, value.detach().cpu().to(torch.int64))
        if name != "leaf_of_sample" and len(value) != nodes:
            raise ValueError(f"tree.{name}: got {len(value)} entries for {nodes} nodes, needed one each")

    @staticmethod
    def _refuse(wrong: Tensor, message: Callable[[int], str]) -> None:
        if bool(wrong.any()):
            raise ValueError(message(int(wrong.nonzero()[0])))

    def parents_of(self, node: Tensor) -> Tensor:
        """Go one edge up; above a root is -1, and stays so."""
        return torch.where(node >= 0, self.parent[node.clamp(min=0)], node)

    def depth(self) -> Tensor:
        """Return the number of edges from the root to each node."""
        depth, at = torch.zeros_like(self.parent), self.parent
        while bool((at >= 0).any()):
            depth = depth + (at >= 0)
            at = self.parents_of(at)
        return depth

    def root(self) -> Tensor:
        """Return the root above each node."""
        root = torch.arange(len(self.parent))
        while bool((self.parent[root] >= 0).any()):
            root = torch.where(self.parent[root] >= 0, self.parent[root], root)
        return root

    def num_samples(self, keep: Tensor) -> Tensor:
        """Return the number of samples below each node, of those that are kept."""
        count, at = torch.zeros_like(self.parent), self.leaf_of_sample[keep]
        while bool((at >= 0).any()):
            count = count.index_add(0, at[at >= 0], torch.ones_like(at[at >= 0]))
            at = self.parents_of(at)
        return count
