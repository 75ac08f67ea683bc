"""Signals and stages, in the manner of optax: pure functions with explicit state."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec

import torch
from torch import Tensor

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.kinds import Signature
from flowalign.estimators.options import fit, title
from flowalign.estimators.segments import SegmentStats

State = Mapping[str, Any]
P = ParamSpec("P")


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

    def before(self, stage: str) -> Tensor:
        """Return the rewards as they were before the baseline.

        Args:
            stage: Who asks, for the message.

        Raises:
            ValueError: If there was none, or credit was given since, so that they belong to other rows.
        """
        if self.raw is None:
            raise ValueError(
                f"{stage} reads the rewards before the baseline, which are gone once credit is given to steps: put it before that"
            )
        return self.raw

    def note(self, **stats: float) -> Signal:
        """Add numbers to log."""
        return replace(self, stats={**self.stats, **stats})


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One named step of an estimator.

    Attributes:
        signature: Kinds of signal it takes and gives.
        apply: From signal, batch and state to signal and new state; pure.
        init: Makes the state it begins with; a state is a mapping of tensors and numbers.
        spreads: It repeats each sample's row for every step and does nothing else: as the last stage it is done while laying out.
        needs: Tables of the batch that it cannot do without, besides rewards and ids; "step_judge" where ``step_rewards`` must judge steps
            and not value states.
        name: Its name with options, as ``explain`` prints it; set by the decorator ``stage``.
    """

    signature: Signature
    apply: Callable[[Signal, RewardBatch, State], tuple[Signal, State]]
    init: Callable[[], State] = dict
    needs: tuple[str, ...] = ()
    spreads: bool = False
    name: str = ""


def pure(signature: Signature, function: Callable[[Signal, RewardBatch], Signal], *, needs: tuple[str, ...] = ()) -> Stage:
    """Make a stage without state from a function."""
    return Stage(signature=signature, apply=lambda signal, batch, state: (function(signal, batch), state), needs=needs)


def stage(make: Callable[P, Stage]) -> Callable[P, Stage]:
    """Decorate a maker of stages: its options are checked against their annotations, and name the stage.

    Raises:
        ValueError: When the stage is made with an option that does not fit.
    """
    signature = inspect.signature(make)

    @functools.cache
    def kinds() -> dict[str, Any]:
        return typing.get_type_hints(make, include_extras=True)

    @functools.wraps(make)
    def build(*args: P.args, **kwargs: P.kwargs) -> Stage:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        options = {key: fit(kinds()[key], value, key) for key, value in bound.arguments.items()}
        bound.arguments.update(options)
        return replace(make(*bound.args, **bound.kwargs), name=title(make.__name__, options))

    return build


def scored_samples(signal: Signal, batch: RewardBatch) -> Tensor:
    """Tell which samples have been scored so far: ``[batch]`` bool, False where any row of the sample is NaN."""
    scored = torch.ones(len(batch.rewards), dtype=torch.bool)
    if not bool(torch.isnan(signal.x[:, 0].sum())):
        return scored
    scored[signal.sample[torch.isnan(signal.x[:, 0])]] = False
    return scored
