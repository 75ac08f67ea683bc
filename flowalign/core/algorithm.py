"""What an algorithm is to the training loop: roles, a plan, rows and a loss. It sees tensors and one function, never a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from flowalign.core.decays import Decay
from flowalign.core.heads import Evidence, Head
from flowalign.core.plans import Plan, ode
from flowalign.core.rollout import Trajectory

CURRENT = "current"
REFERENCE = "reference"
FEATURES = "features"

# velocity(x [rows, *event], sigma [rows], sample int64 [rows], role) -> [rows, *event] float32. `sample` picks the conditioning.
# With FEATURES in the role's place: what heads read, [rows, features] float32, from the reference; the pass of the reference on the same x is shared.
# With a head's name there and features for x: what the head says, [rows] float32.
Velocity = Callable[[Tensor, Tensor, Tensor, str], Tensor]


def sample_number(group: Tensor, sample: Tensor) -> Tensor:
    """Number the samples of a step for keyed noise; groups hold fewer than 2**20."""
    return group * 2**20 + sample


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What one step's rollout and scoring left to train on (the rows of one rank).

    A row is a final state (an image); where the plan forks, an initial state has several, side by side. Together with
    ``trajectory.transitions``, whose ``sample`` is such a row, that is the flat table of groups, seeds, steps, parents and leaves.

    Shapes:
        advantage, weight: ``[batch, T]`` float32; T is 1, or the number of trained steps of the plan. A column of several is for one step.
        keep: ``[batch]`` bool, False for samples that could not be scored or were filtered out: no loss is taken of them.
        target: ``[batch, T]`` float32, where the estimator gives ratios to reach.
        prompt: ``[batch]`` int64, the prompt's stable id.
        group: ``[batch]`` int64, position of the sample's group among the step's groups, over all ranks.
        sample: ``[batch]`` int64, position within the group; (prompt, group, sample) names the image on every rank layout.
    """

    trajectory: Trajectory
    advantage: Tensor
    weight: Tensor
    prompt: Tensor
    group: Tensor
    sample: Tensor
    keep: Tensor
    target: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Update:
    """Which optimizer update this is: update ``index`` of ``num_updates`` after rollout ``step`` of a run with ``seed``."""

    seed: int
    step: int
    index: int

    def key(self, num_updates: int) -> int:
        """Number the optimizer updates of the whole run."""
        return self.step * num_updates + self.index


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A table that an update trains on: ``sample`` ``[rows]`` (row of the experience) and named columns with the same first axis.

    Rows come in blocks of ``block`` that a loss needs together; a micro-batch never splits one. Rows with equal ``state`` ``[rows]``, side by
    side, share one evaluation of the network; a micro-batch never splits these either, and its size counts evaluations. Rows that are grouped
    have losses that compare whole groups, which several processes do not hold.
    """

    sample: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    block: int = 1
    state: Tensor | None = None
    is_grouped: bool = False

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def split(self, size: int) -> list[Rows]:
        """Cut the table into micro-batches of at most ``size`` evaluations, whole blocks and states each."""
        size = max(self.block, size // self.block * self.block)
        if self.state is None:
            return [self.take(part) for part in torch.arange(len(self)).split(size)]
        counts = torch.unique_consecutive(self.state, return_counts=True)[1]
        return [self.take(part) for part in torch.arange(len(self)).split([int(part.sum()) for part in counts.split(size)])]

    def take(self, index: Tensor) -> Rows:
        """Select rows."""
        columns = {name: column[index] for name, column in self.columns.items()}
        state = None if self.state is None else self.state[index]
        return Rows(sample=self.sample[index], columns=columns, block=self.block, state=state, is_grouped=self.is_grouped)

    def states(self) -> tuple[Tensor, Tensor]:
        """Return the first row of each state, and for each row which state it has: evaluate the first, spread to the second."""
        if self.state is None:
            every = torch.arange(len(self), device=self.sample.device)
            return every, every
        _, which, counts = torch.unique_consecutive(self.state, return_inverse=True, return_counts=True)
        return counts.cumsum(0) - counts, which


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Loss of each row and what to log of each row; the loop takes means over the rows of the whole update, on all ranks.

    Shapes:
        value: ``[rows]`` float32 with gradient.
        metrics: name to ``[rows]``, detached; NaN where it says nothing of a row, which is left out of the mean.
    """

    value: Tensor
    metrics: Mapping[str, Tensor]


@runtime_checkable
class Algorithm(Protocol):
    """One file in ``flowalign/algorithms``: a composition of parts of the core."""

    def turns(self, update: Update, *, ready: bool) -> tuple[str, ...]:
        """Name the networks that an update moves, in order; ``("current",)`` for most.

        Args:
            update: Which update this is.
            ready: Whether critics, where there are some, have let the policy begin.
        """
        ...

    @property
    def behaviour(self) -> str:
        """The role that samples."""
        ...

    @property
    def num_updates(self) -> int:
        """Optimizer updates after each rollout."""
        ...

    @property
    def roles(self) -> Mapping[str, Decay]:
        """Other roles that the losses read, with the decay of each after a step (``reference`` never moves)."""
        ...

    def plan(self, step: int, num_steps: int, seed: int = 0) -> Plan:
        """Choose the kernels and forks of the rollout; ``seed`` is the run's, for what is drawn."""
        ...

    def rows(self, experience: Any, update: Update) -> Rows:
        """Lay out what one update trains on: an `Experience`, or in a distillation `flowalign.core.distillation.Pairs`."""
        ...

    def loss(self, player: str, rows: Rows, velocity: Velocity) -> Loss:
        """Compute the loss of some rows; ``velocity`` carries gradient for the player alone."""
        ...


WINDOW = 20  # steps of evidence


class NeverReady(ValueError):
    """Critics did not let the policy begin for as long as an algorithm waits."""


@runtime_checkable
class HasHeads(Protocol):
    """An algorithm with small networks of its own, players that read the frozen base's features, such as a critic.

    A head's loss logs ``NAME/error``, ``NAME/target`` and ``NAME/square`` of each row: its squared error, what was to be predicted, and the square.
    """

    @property
    def heads(self) -> Mapping[str, Head]:
        """Sizes and rates of each, by the player's name."""
        ...

    def look(self, rows: Rows, velocity: Velocity) -> Rows:
        """Add the columns that several players read of what is frozen, evaluated once for each update and without gradient."""
        ...

    def is_ready(self, evidence: Mapping[str, Evidence], held_back: int) -> bool:
        """Tell whether the policy may begin to move; once it does, it goes on.

        Args:
            evidence: Of each head over the last steps, at most ``WINDOW`` of them.
            held_back: Steps in which the policy was held back so far.

        Raises:
            NeverReady: If that has gone on for too long; says how to mend it.
        """
        ...


def share_of(experience: Experience, update: Update, num_shares: int) -> Tensor:
    """Return the rows of the experience that belong to an update's share: whole groups, dealt in turn.

    Args:
        experience: The step's data.
        update: Share ``update.index % num_shares`` is returned.
        num_shares: Disjoint shares of the groups; 1 for all.

    Returns:
        Row indices, int64, ascending.
    """
    return (experience.group % num_shares == update.index % num_shares).nonzero().squeeze(1)


class Passes(Protocol):
    """How often a rollout is passed over, and in how many updates each time."""

    @property
    def num_epochs(self) -> int:
        """Passes over a rollout."""
        ...

    @property
    def num_minibatches(self) -> int:
        """Updates of a pass, each on its own groups."""
        ...


class OnePolicy:
    """What algorithms share that sample with the current role by the ODE and train it, in passes over minibatches; each overrides what differs."""

    config: Passes

    def turns(self, update: Update, *, ready: bool) -> tuple[str, ...]:
        """Train the current role alone."""
        return (CURRENT,)

    @property
    def behaviour(self) -> str:
        """Sample with the current role."""
        return CURRENT

    @property
    def num_updates(self) -> int:
        """Passes times minibatches."""
        return self.config.num_epochs * self.config.num_minibatches

    def plan(self, step: int, num_steps: int, seed: int = 0) -> Plan:
        """Sample by the ODE; nothing of the path is trained."""
        return ode(num_steps)
