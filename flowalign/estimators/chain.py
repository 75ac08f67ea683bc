"""Stages and their composition, in the manner of optax: pure functions with explicit state.

A stage takes a signal and the batch and gives a signal. A chain of stages is checked when it is built: each stage declares which kind of
signal it takes (``kinds.Signature``), so an order that makes no sense never runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from flowalign.estimators.batch import AdvantageBatch, RewardBatch
from flowalign.estimators.kinds import END, START, Signature
from flowalign.estimators.needs import need, need_tree
from flowalign.estimators.segments import SegmentStats, compact, segment_stats
from flowalign.estimators.spelling import unknown

State = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Signal:
    """The table that stages hand on.

    Shapes:
        x: ``[rows, rewards]`` float64; NaN where it could not be computed.
        sample, step: ``[rows]`` int64, which sample (row of the batch) and step a row belongs to; step is 0 before credit is given.
        node: ``[rows]`` int64 where rows are nodes of the tree, else None; ``sample`` is then any sample of the node's prompt.
        raw: ``x`` as it was before the baseline, for scales over raw rewards.
        known: Statistics that were computed already: of which table, over which segmentation.
        weight: ``[rows]`` float64.
        keep: ``[batch]`` bool.
        target: ``[rows]`` float64 or None.
    """

    x: Tensor
    sample: Tensor
    step: Tensor
    weight: Tensor
    keep: Tensor
    node: Tensor | None = None
    raw: Tensor | None = None
    target: Tensor | None = None
    stats: Mapping[str, float] = field(default_factory=dict)
    known: tuple[tuple[Tensor, str, SegmentStats], ...] = ()

    def note(self, **stats: float) -> Signal:
        """Add numbers to log."""
        return replace(self, stats={**self.stats, **stats})


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One named step of an estimator.

    Attributes:
        name: Its name with options, as ``explain`` prints it.
        signature: Kinds of signal it takes and gives.
        apply: From signal, batch and state to signal and new state; pure.
        init: Makes the state it begins with; a state is a mapping of tensors and numbers.
        spreads: It repeats each sample's row for every step and does nothing else: as the last stage it is done while laying out.
        needs: Tables of the batch that it cannot do without, besides rewards and ids; "step_judge" where ``step_rewards`` must judge steps
            and not value states.
    """

    name: str
    signature: Signature
    apply: Callable[[Signal, RewardBatch, State], tuple[Signal, State]]
    init: Callable[[], State] = dict
    needs: tuple[str, ...] = ()
    spreads: bool = False


def pure(name: str, signature: Signature, function: Callable[[Signal, RewardBatch], Signal], *, needs: tuple[str, ...] = ()) -> Stage:
    """Make a stage without state from a function."""
    return Stage(name=name, signature=signature, apply=lambda signal, batch, state: (function(signal, batch), state), needs=needs)


def segment_key(signal: Signal, batch: RewardBatch, over: str) -> Tensor:
    """Return the segment of each row.

    Args:
        signal: The rows.
        batch: Its tables.
        over: ``batch``, ``group``, ``step``, ``group_step``; ``anchor`` (rows of a group in the same state); ``tree`` (samples or nodes
            under one root), ``siblings`` (nodes with one parent), ``depth`` (nodes of a group that are equally deep).

    Raises:
        ValueError: If the segmentation is unknown, or does not fit the rows.
    """
    if over not in _SEGMENTS:
        raise ValueError(f"over: {unknown('segmentation', over, _SEGMENTS)}")
    return _SEGMENTS[over](signal, batch)


def statistics(signal: Signal, batch: RewardBatch, over: str, values: Tensor | None = None) -> tuple[Signal, SegmentStats]:
    """Compute statistics over a segmentation, or look them up where an earlier stage did: a scale asks for what the baseline knew.

    Args:
        signal: The rows.
        batch: Its tables.
        over: See ``segment_key``.
        values: ``[rows, rewards]``; None for ``signal.x``.

    Returns:
        The signal, which remembers them, and the statistics.
    """
    table = signal.x if values is None else values
    for known, segmentation, stats in signal.known:
        if known is table and segmentation == over:
            return signal, stats
    if over == "group" and signal.sample is batch.samples:
        stats = segment_stats(table, batch.group, num=batch.num_groups)
    elif over == "batch":
        stats = segment_stats(table, torch.zeros_like(signal.sample), num=1)
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


_SEGMENTS: Mapping[str, Callable[[Signal, RewardBatch], Tensor]] = {
    "batch": lambda signal, batch: torch.zeros_like(signal.sample),
    "group": _group,
    "step": lambda signal, batch: signal.step,
    "group_step": lambda signal, batch: _pair(_group(signal, batch), signal.step),
    "anchor": _anchor,
    "tree": _tree,
    "siblings": _siblings,
    "depth": _depth,
}


def scored_samples(signal: Signal, batch: RewardBatch) -> Tensor:
    """Tell which samples have been scored so far: ``[batch]`` bool, False where any row of the sample is NaN."""
    scored = torch.ones(len(batch.rewards), dtype=torch.bool)
    if not bool(torch.isnan(signal.x[:, 0].sum())):
        return scored
    scored[signal.sample[torch.isnan(signal.x[:, 0])]] = False
    return scored


@dataclass(frozen=True)
class Estimator:
    """A checked chain of stages: ``init() -> state`` and ``update(batch, state) -> (advantages, state)``.

    The state is explicit and can be checkpointed. Rows are processed in the order of ``sample_uid``, so that neither their order nor the
    ranks they came from can change a bit.

    Raises:
        ValueError: If a stage does not take what the one before it gives; the stage and the remedy are named.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        """Check the chain against the kinds of signals."""
        kind = START
        for position, stage in enumerate(self.stages):
            try:
                kind = stage.signature(kind)
            except TypeError as error:
                raise ValueError(f"stage {position + 1} ({stage.name}) {error}") from None
        try:
            END(kind)
        except TypeError as error:
            raise ValueError(f"the chain {' -> '.join(stage.name for stage in self.stages)} does not end in advantages: {error}") from None

    @property
    def needs(self) -> frozenset[str]:
        """Tables of the batch that the stages cannot do without, besides rewards and ids."""
        return frozenset(table for stage in self.stages for table in stage.needs)

    def init(self) -> dict[str, State]:
        """Return the state to begin with, one entry for each stage that has one."""
        return {str(position): state for position, stage in enumerate(self.stages) if (state := stage.init())}

    def update(self, batch: RewardBatch, state: Mapping[str, State]) -> tuple[AdvantageBatch, dict[str, State]]:
        """Turn rewards into advantages.

        Args:
            batch: All samples of the step, of all ranks.
            state: From ``init`` or the last ``update``.

        Returns:
            Advantages in the order of the batch's rows, and the new state.
        """
        order = torch.argsort(batch.sample_uid)
        ordered = _reorder(batch, order)
        rows = len(order)
        signal = Signal(
            x=ordered.rewards,
            sample=ordered.samples,
            step=torch.zeros(rows, dtype=torch.int64),
            weight=torch.ones(rows, dtype=torch.float64),
            keep=torch.ones(rows, dtype=torch.bool),
        )
        new: dict[str, State] = {}
        # The last stage usually repeats each sample's advantage for every step: cheaper while laying out than as 50 times the rows.
        late = self.stages[-1].spreads
        for position, stage in enumerate(self.stages[:-1] if late else self.stages):
            signal, after = stage.apply(signal, ordered, state.get(str(position), {}))
            if after:
                new[str(position)] = after
        return (_spread if late else _collect)(signal, ordered, torch.argsort(order)), new


def _reorder(batch: RewardBatch, order: Tensor) -> RewardBatch:
    if torch.equal(order, torch.arange(len(order))):
        return batch
    values = {item.name: vars(batch)[item.name] for item in fields(batch)}
    tables = {name: value[order] for name, value in values.items() if isinstance(value, Tensor)}
    tree = batch.tree and replace(batch.tree, leaf_of_sample=batch.tree.leaf_of_sample[order])
    return RewardBatch(**tables, tree=tree)


def _spread(signal: Signal, batch: RewardBatch, back: Tensor) -> AdvantageBatch:
    """Repeat what the samples got for each of their steps; see ``_collect``."""
    keep = signal.keep & scored_samples(signal, batch)
    mask = None if batch.step_mask is None else batch.step_mask[back]

    def table(values: Tensor, default: float) -> Tensor:
        rows = torch.where(keep, values.float(), default)[back][:, None].expand(-1, batch.num_steps)
        return rows.contiguous() if mask is None else torch.where(mask, rows, default)

    return _result(signal, keep, table, back)


def _collect(signal: Signal, batch: RewardBatch, back: Tensor) -> AdvantageBatch:
    """Lay the rows out as ``[batch, T]`` in the caller's order; what could not be scored or is masked is 0."""
    num, steps = len(batch.rewards), batch.num_steps
    keep = signal.keep & scored_samples(signal, batch)
    usable = keep[:, None] if batch.step_mask is None else keep[:, None] & batch.step_mask
    place = signal.sample * steps + signal.step  # one flat index is several times faster than a pair of them
    complete = len(place) == num * steps and torch.equal(place, torch.arange(num * steps))
    everything = bool(usable.all())
    in_order = torch.equal(back, torch.arange(num))

    def table(values: Tensor, default: float) -> Tensor:
        # float32 is what the losses work in; all statistics before this line are float64.
        rows = values.float()
        laid_out = rows if complete else torch.full((num * steps,), default).index_copy(0, place, rows)
        laid_out = laid_out.view(num, steps)
        laid_out = laid_out if everything else torch.where(usable, laid_out, default)
        return laid_out if in_order else laid_out[back]

    return _result(signal, keep, table, back)


def _result(signal: Signal, keep: Tensor, table: Callable[[Tensor, float], Tensor], back: Tensor) -> AdvantageBatch:
    advantage = table(torch.nan_to_num(signal.x[:, 0]), 0.0)
    stats = {**signal.stats, "kept": float(keep.double().mean()), "size": float(advantage.abs().mean())}
    return AdvantageBatch(
        advantage=advantage,
        weight=table(signal.weight, 0.0),
        keep=keep[back],
        target=None if signal.target is None else table(signal.target, 1.0),
        stats=stats,
    )


def chain(*stages: Stage | Sequence[Stage]) -> Estimator:
    """Compose stages, flattening sequences of them."""
    flat: list[Stage] = []
    for stage in stages:
        flat.extend([stage] if isinstance(stage, Stage) else stage)
    return Estimator(tuple(flat))
