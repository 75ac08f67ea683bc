"""Which rows are compared with one another: the batch, prompts, steps, anchors, and the parts of a tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.needs import need, need_tree
from flowalign.estimators.segments import Segments, SegmentStats, compact, segment_stats
from flowalign.estimators.signals import Signal

Segmentation = Literal["batch", "group", "step", "group_step", "anchor", "tree", "siblings", "depth"]
"""``anchor``: rows of a group in the same state; ``tree``: samples or nodes under one root; ``siblings``: nodes with one parent;
``depth``: nodes of a group that are equally deep."""


def segment_needs(over: Segmentation) -> tuple[str, ...]:
    """Tell which table of the batch a segmentation cannot do without."""
    return {"anchor": ("anchor_id",), "tree": ("tree",), "siblings": ("tree",), "depth": ("tree",)}.get(over, ())


def segment_key(signal: Signal, batch: RewardBatch, over: Segmentation) -> Tensor:
    """Return the segment of each row.

    Raises:
        ValueError: If the segmentation does not fit the rows.
    """
    return _SEGMENTS[over](signal, batch)


def statistics(signal: Signal, batch: RewardBatch, over: Segmentation, values: Tensor | None = None) -> tuple[Signal, SegmentStats]:
    """Compute statistics over a segmentation, or look them up where an earlier stage did: a scale asks for what the baseline knew.

    Args:
        signal: The rows.
        batch: Its tables.
        over: Which rows are compared.
        values: ``[rows, rewards]``; None for ``signal.x``.

    Returns:
        The signal, which remembers them, and the statistics.
    """
    table = signal.x if values is None else values
    for known, segmentation, stats in signal.known:
        if known is table and segmentation == over:
            return signal, stats
    if over == "group" and signal.sample is batch.samples:
        stats = segment_stats(table, batch.groups)
    elif over == "batch":
        stats = segment_stats(table, Segments(torch.zeros_like(signal.sample), 1))
    else:
        stats = segment_stats(table, segment_key(signal, batch, over))
    return replace(signal, known=(*signal.known, (table, over, stats))), stats


def _pair(first: Tensor, second: Tensor) -> Tensor:
    """Number pairs; both are small non-negative integers."""
    return first * (int(second.max()) + 1 if len(second) else 1) + second


def _group(signal: Signal, batch: RewardBatch) -> Tensor:
    return batch.group[signal.sample]


def _anchor(signal: Signal, batch: RewardBatch) -> Tensor:
    anchor = need(batch, "anchor_id", "the segmentation 'anchor'").flatten()[signal.sample * batch.num_steps + signal.step]
    return _pair(_group(signal, batch), compact(anchor)[0])


def _tree(signal: Signal, batch: RewardBatch) -> Tensor:
    tree = need_tree(batch, "the segmentation 'tree'")
    return tree.root()[tree.leaf_of_sample[signal.sample] if signal.node is None else signal.node]


def _siblings(signal: Signal, batch: RewardBatch) -> Tensor:
    parent = need_tree(batch, "the segmentation 'siblings'").parent[_nodes(signal, "siblings")]
    return torch.where(parent >= 0, parent, len(parent) + torch.arange(len(parent)))  # a root has no siblings


def _depth(signal: Signal, batch: RewardBatch) -> Tensor:
    depth = need_tree(batch, "the segmentation 'depth'").depth()[_nodes(signal, "depth")]
    return _pair(_group(signal, batch), depth)


def _nodes(signal: Signal, over: str) -> Tensor:
    if signal.node is None:
        raise ValueError(f"over={over!r} is about the nodes of a tree: put node_values before it")
    return signal.node


_SEGMENTS: Mapping[Segmentation, Callable[[Signal, RewardBatch], Tensor]] = {
    "batch": lambda signal, batch: torch.zeros_like(signal.sample),
    "group": _group,
    "step": lambda signal, batch: signal.step,
    "group_step": lambda signal, batch: _pair(_group(signal, batch), signal.step),
    "anchor": _anchor,
    "tree": _tree,
    "siblings": _siblings,
    "depth": _depth,
}
