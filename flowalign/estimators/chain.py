"""Chains of stages: an estimator. A chain is checked when it is built, so an order that makes no sense never runs.

Each stage declares which kind of signal it takes (``kinds.Signature``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce

import torch
from torch import Tensor

from flowalign.estimators.batch import AdvantageBatch, RewardBatch
from flowalign.estimators.kinds import END, START
from flowalign.estimators.segments import flat_segments
from flowalign.estimators.signals import Signal, Stage, State, scored_samples


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

    @property
    def gives_targets(self) -> bool:
        """Whether it gives ratios to reach, beside advantages."""
        return "targets" in reduce(lambda kind, stage: stage.signature(kind), self.stages, START).marks

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
        order = None if bool((batch.sample_uid[1:] > batch.sample_uid[:-1]).all()) else torch.argsort(batch.sample_uid)
        ordered = batch if order is None else _reorder(batch, order)
        rows = len(batch.rewards)
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
            signal, after = stage.apply(signal, ordered, _state_of(stage, state, position))
            if after:
                new[str(position)] = after
        signal = signal.note(flat_groups=_share_of_flat_groups(signal, ordered))
        return (_spread if late else _collect)(signal, ordered, None if order is None else torch.argsort(order)), new


def _state_of(stage: Stage, state: Mapping[str, State], position: int) -> State:
    """Return a stage's own state.

    Raises:
        ValueError: If the state is of another estimator.
    """
    found, begun = state.get(str(position), {}), stage.init()
    if found.keys() != begun.keys():
        raise ValueError(
            f"state of stage {position + 1} ({stage.name}): got {sorted(found) or 'nothing'}, needed {sorted(begun) or 'nothing'}; "
            "begin with init(), and go on with what update returned of the same estimator"
        )
    return found


def _share_of_flat_groups(signal: Signal, batch: RewardBatch) -> float:
    """Count the groups in which no reward differs: one meaning for every recipe, whatever it compares."""
    for table, segmentation, stats in signal.known:
        if table is batch.rewards and segmentation == "group":
            return float(stats.is_flat.all(1).double().mean())
    return float(flat_segments(batch.rewards, batch.groups).all(1).double().mean())


def _reorder(batch: RewardBatch, order: Tensor) -> RewardBatch:
    values = {item.name: vars(batch)[item.name] for item in fields(batch)}
    tables = {name: value[order] for name, value in values.items() if isinstance(value, Tensor)}
    tree = batch.tree and replace(batch.tree, leaf_of_sample=batch.tree.leaf_of_sample[order])
    return RewardBatch(**tables, tree=tree)


def _spread(signal: Signal, batch: RewardBatch, back: Tensor | None) -> AdvantageBatch:
    """Repeat what the samples got for each of their steps; see ``_collect``."""
    keep = signal.keep & scored_samples(signal, batch)

    def table(values: Tensor, default: float) -> Tensor:
        rows = torch.where(keep, values.float(), default)[:, None].expand(-1, batch.num_steps)
        rows = rows if batch.step_mask is None else torch.where(batch.step_mask, rows, default)
        return rows.contiguous() if back is None else rows[back]

    return _result(signal, batch, keep, table, back)


def _collect(signal: Signal, batch: RewardBatch, back: Tensor | None) -> AdvantageBatch:
    """Lay the rows out as ``[batch, T]`` in the caller's order; what could not be scored or is masked is 0."""
    num, steps = len(batch.rewards), batch.num_steps
    keep = signal.keep & scored_samples(signal, batch)
    usable = keep[:, None] if batch.step_mask is None else keep[:, None] & batch.step_mask
    place = signal.sample * steps + signal.step  # one flat index is several times faster than a pair of them
    complete = len(place) == num * steps and torch.equal(place, torch.arange(num * steps))
    everything = bool(usable.all())

    def table(values: Tensor, default: float) -> Tensor:
        # float32 is what the losses work in; all statistics before this line are float64.
        rows = values.float()
        laid_out = rows if complete else torch.full((num * steps,), default).index_copy(0, place, rows)
        laid_out = laid_out.view(num, steps)
        laid_out = laid_out if everything else torch.where(usable, laid_out, default)
        return laid_out if back is None else laid_out[back]

    return _result(signal, batch, keep, table, back)


def _result(
    signal: Signal, batch: RewardBatch, keep: Tensor, table: Callable[[Tensor, float], Tensor], back: Tensor | None
) -> AdvantageBatch:
    rows = torch.nan_to_num(signal.x[:, 0], posinf=torch.inf, neginf=-torch.inf)
    for name, values in (("advantage", rows), ("weight", signal.weight)):
        largest = values.abs().max() if len(values) else 0.0
        if largest > torch.finfo(torch.float32).max:
            row = int(values.abs().argmax())
            uid = int(batch.sample_uid[signal.sample[row]])
            raise ValueError(
                f"the {name} of sample {uid} is {float(values[row]):g}, which float32 cannot hold; rescale the rewards, their weights or the "
                "temperature"
            )
    advantage = table(rows, 0.0)
    stats = {**signal.stats, "kept": float(keep.double().mean()), "size": float(advantage.abs().mean())}
    return AdvantageBatch(
        advantage=advantage,
        weight=table(signal.weight, 0.0),
        keep=keep if back is None else keep[back],
        target=None if signal.target is None else table(signal.target, 1.0),
        stats=stats,
    )


def chain(*stages: Stage | Sequence[Stage]) -> Estimator:
    """Compose stages, flattening sequences of them."""
    flat: list[Stage] = []
    for stage in stages:
        flat.extend([stage] if isinstance(stage, Stage) else stage)
    return Estimator(tuple(flat))
