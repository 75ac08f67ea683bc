"""What a rollout leaves: one flat table of trained transitions, and the final states."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from flowalign.core.gaussians import gaussian_log_prob


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """Rows of trained transitions, ordered by step, then sample.

    Shapes:
        x, x_next, velocity, mean: ``[rows, *event]`` float32; ``x_next`` is a draw from N(mean, std**2).
        std, sigma, sigma_next: ``[rows]``.
        step: ``[rows]`` int64, position in the plan.
        seed: ``[rows]`` int64, which initial state the row descends from.
        state: ``[rows]`` int64, equal where transitions start from the very same state and share its evaluation.
        sample: ``[rows]`` int64, row of the final table that the transition leads to; the first of them where the plan forks later.
        num_leaves: ``[rows]`` int64, how many final states the transition leads to: rows ``sample`` to ``sample + num_leaves - 1``.
        parent: ``[rows]`` int64, row (of the whole table) of the last trained transition before this one, -1 for none.
    """

    x: Tensor
    x_next: Tensor
    velocity: Tensor
    mean: Tensor
    std: Tensor
    sigma: Tensor
    sigma_next: Tensor
    step: Tensor
    seed: Tensor
    state: Tensor
    sample: Tensor
    num_leaves: Tensor
    parent: Tensor

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.sample)

    def take(self, index: Tensor) -> "Transitions":
        """Select rows."""
        return Transitions(**{field.name: vars(self)[field.name][index] for field in fields(self)})

    def mean_log_prob(self) -> Tensor:
        """Return the log density of each recorded draw, a mean over latent elements, ``[rows]``."""
        return gaussian_log_prob(self.x_next, self.mean, self.std, reduction="mean")

    def leaves(self) -> tuple[Tensor, Tensor]:
        """List row and final state of every pair in which the row leads to the final state, ordered by row."""
        row = torch.arange(len(self), device=self.sample.device).repeat_interleave(self.num_leaves)
        first = self.num_leaves.cumsum(0) - self.num_leaves
        return row, self.sample[row] + torch.arange(len(row), device=row.device) - first[row]

    @staticmethod
    def concatenate(parts: "Sequence[Transitions]", like: Tensor) -> "Transitions":
        """Join tables into a whole one: rows in order, parents looked up.

        Args:
            parts: Tables of one rollout, whose ``parent`` is not looked at.
            like: Latents ``[batch, *event]``, for the shape of a table without rows.
        """
        if not parts:
            none, rows = like[:0].float(), like.new_zeros(0, dtype=torch.float32)
            ids = torch.zeros(0, dtype=torch.int64, device=like.device)
            return Transitions(
                **dict.fromkeys(("x", "x_next", "velocity", "mean"), none),
                **dict.fromkeys(("std", "sigma", "sigma_next"), rows),
                **dict.fromkeys(("step", "seed", "state", "sample", "num_leaves", "parent"), ids),
            )
        joined = {field.name: torch.cat([vars(part)[field.name] for part in parts]) for field in fields(Transitions)}
        order = torch.argsort(joined["step"] * (joined["sample"].max() + 1) + joined["sample"])
        return _with_parents(Transitions(**{name: value[order] for name, value in joined.items()}))


def _with_parents(table: Transitions) -> Transitions:
    """Descendants of a row lie side by side, so the last row seen above a final state is the parent of the next one below."""
    row, leaf = table.leaves()
    above = torch.full((int(leaf.max()) + 1,), -1, device=leaf.device)
    parent = torch.empty_like(table.sample)
    for step in torch.unique(table.step).tolist():
        here = (table.step == step).nonzero().squeeze(1)
        parent[here] = above[table.sample[here]]
        below = table.step[row] == step
        above[leaf[below]] = row[below]
    return Transitions(**{**vars(table), "parent": parent})


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What a rollout leaves: where it began and ended, its grid, and the trained transitions.

    Attributes:
        num_leaves: Final states of each initial state; those of one lie side by side, and so do those of every state on the way.
        evaluations: States that the model was evaluated at.

    Shapes:
        x_init: ``[batch, *event]``.
        x0: ``[batch * num_leaves, *event]``.
        sigmas: ``[steps + 1]``, decreasing.
    """

    x_init: Tensor
    x0: Tensor
    sigmas: Tensor
    transitions: Transitions
    num_leaves: int = 1
    evaluations: int = 0
