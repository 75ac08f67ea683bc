"""What goes into an estimator and what comes out: flat, ragged tables. Nothing here knows what an image is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from flowalign.estimators.forest import Tree as Tree
from flowalign.estimators.segments import Segments

LARGEST = 1e30  # float32 ends at 3e38: leaves room for sums over steps and divisions by small temperatures

_TABLES: Mapping[str, tuple[torch.dtype, str]] = {
    "rewards": (torch.float64, "batch rewards"),
    "clauses": (torch.float64, "batch clauses"),
    "metric": (torch.float64, "batch metrics"),
    "log_prob": (torch.float64, "batch steps"),
    "step_rewards": (torch.float64, "batch steps rewards"),
    "baseline": (torch.float64, "batch rewards"),
    "group_id": (torch.int64, "batch"),
    "sample_uid": (torch.int64, "batch"),
    "anchor_id": (torch.int64, "batch steps"),
    "clauses_valid": (torch.bool, "batch clauses"),
    "step_mask": (torch.bool, "batch steps"),
}
"""Every table's type and axes."""


@dataclass(frozen=True, kw_only=True)
class RewardBatch:
    """Everything that an estimator may read of one optimizer step, gathered over all ranks.

    NaN in a reward means that it was not computed for the sample; infinite values are refused.

    Shapes:
        rewards: ``[batch, R]``, converted to float64; higher is better.
        group_id: ``[batch]`` int64, samples of one prompt share it; groups may be ragged and in any order.
        sample_uid: ``[batch]`` int64, unique; the only tie-breaker.
        clauses: ``[batch, C]`` verifiable sub-checks; clauses_valid: ``[batch, C]`` bool, which of them the prompt has.
        metric: ``[batch, M]`` side measurements.
        log_prob: ``[batch, T]`` mean log-probs of the trained steps; step_mask: ``[batch, T]`` bool, which steps the sample trains.
        step_rewards: ``[batch, T, R]``, a reward of each trained step, or the value of the state that the step starts from: the
            recipe says which. anchor_id: ``[batch, T]`` int64, equal where samples share a state.
        baseline: ``[batch, R]``, for example the reward of the ODE sample from the same noise.
        tree: a ``Tree`` over the samples.

    Examples:
        >>> batch = RewardBatch(rewards=torch.tensor([[1.0], [float("inf")]]), group_id=torch.tensor([0, 0]), sample_uid=torch.tensor([0, 1]))
        Traceback (most recent call last):
        ValueError: rewards[1, 0]: got inf for sample 1; rewards must be finite (NaN means "not computed")
    """

    rewards: Tensor
    group_id: Tensor
    sample_uid: Tensor
    clauses: Tensor | None = None
    clauses_valid: Tensor | None = None
    metric: Tensor | None = None
    log_prob: Tensor | None = None
    step_mask: Tensor | None = None
    step_rewards: Tensor | None = None
    anchor_id: Tensor | None = None
    baseline: Tensor | None = None
    tree: Tree | None = None

    def __post_init__(self) -> None:
        """Convert to float64 and int64 on the CPU and check shapes, ids and values."""
        for name in _TABLES:
            if vars(self)[name] is not None and not isinstance(vars(self)[name], Tensor):
                raise ValueError(f"{name}: got {type(vars(self)[name]).__name__}, needed a torch.Tensor")
        if self.rewards.ndim != 2 or self.rewards.shape[1] == 0:
            raise ValueError(
                f"rewards: got shape {tuple(self.rewards.shape)}, needed [batch, rewards]; for one reward use rewards[:, None]"
            )
        num = len(self.rewards)
        if num == 0:
            raise ValueError("rewards: got no samples; gather the samples of all ranks before they are compared")
        for name, (dtype, axes) in _TABLES.items():
            self._convert(name, dtype, axes, num)
        for name, (dtype, _) in _TABLES.items():
            if dtype == torch.float64:
                self._refuse_infinite(name)
        self._check_widths()
        if len(torch.unique(self.sample_uid)) != num:
            values, counts = torch.unique(self.sample_uid, return_counts=True)
            twice = int(values[counts > 1][0])
            raise ValueError(f"sample_uid: {twice} occurs more than once; every sample needs its own id")
        self._check_steps()
        if self.tree is not None:
            self._check_leaves(self.tree)

    def _convert(self, name: str, dtype: torch.dtype, axes: str, num: int) -> None:
        value = vars(self)[name]
        if value is None:
            return
        if value.ndim != len(axes.split()):
            more = "; for one reward add [..., None]" if name == "step_rewards" else ""
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, needed [{axes.replace(' ', ', ')}]{more}")
        if dtype == torch.int64 and value.is_floating_point():
            raise ValueError(f"{name}: got {value.dtype}, needed integers (a float32 cannot hold ids above 2**24)")
        if len(value) != num:
            raise ValueError(f"{name}: got {len(value)} rows for {num} samples, needed one each")
        object.__setattr__(self, name, value.detach().cpu().to(dtype))

    def _refuse_infinite(self, name: str) -> None:
        value = vars(self)[name]
        if value is None or not bool((value.abs() > LARGEST).any()):
            return
        place = (value.abs() > LARGEST).nonzero()[0].tolist()
        got = value[tuple(place)]
        wanted = 'finite (NaN means "not computed")' if torch.isinf(got) else f"at most {LARGEST:g} in size, so that advantages are finite"
        raise ValueError(
            f"{name}[{', '.join(map(str, place))}]: got {got.item():g} for sample {int(self.sample_uid[place[0]])}; "
            f"{name.replace('_', ' ')} must be {wanted}"
        )

    def _check_widths(self) -> None:
        rewards = self.rewards.shape[1]
        if self.baseline is not None and self.baseline.shape[1] != rewards:
            raise ValueError(f"baseline: got {self.baseline.shape[1]} columns for {rewards} rewards, needed one each")
        if self.step_rewards is not None and self.step_rewards.shape[2] != rewards:
            raise ValueError(f"step_rewards: got {self.step_rewards.shape[2]} rewards at each step for {rewards} rewards, needed one each")
        if self.clauses is not None and self.clauses_valid is not None and self.clauses.shape != self.clauses_valid.shape:
            raise ValueError(
                f"clauses_valid: got shape {tuple(self.clauses_valid.shape)}, needed that of clauses, {tuple(self.clauses.shape)}"
            )

    def _check_steps(self) -> None:
        steps = self.num_steps
        for name in ("step_mask", "log_prob", "anchor_id", "step_rewards"):
            value = vars(self)[name]
            if value is not None and value.shape[1] != steps:
                raise ValueError(f"{name}: got {value.shape[1]} steps where the batch has {steps}")
        if self.tree is not None and len(self.tree.parent) and int(self.tree.edge_end.max()) > steps:
            row = int(self.tree.edge_end.argmax())
            raise ValueError(f"tree.edge_end[{row}]: is {int(self.tree.edge_end[row])}, but the batch has {steps} trained steps")

    def _check_leaves(self, tree: Tree) -> None:
        leaf, nodes = tree.leaf_of_sample, len(tree.parent)
        if len(leaf) != len(self.rewards):
            raise ValueError(f"tree.leaf_of_sample: got {len(leaf)} leaves for {len(self.rewards)} samples, needed one each")
        if not len(leaf):
            return
        if bool(((leaf < 0) | (leaf >= nodes)).any()):
            raise ValueError(f"tree.leaf_of_sample: needed nodes from 0 to {nodes - 1}, got {int(leaf.min())} to {int(leaf.max())}")
        inner = torch.zeros(nodes, dtype=torch.bool)
        inner[tree.parent[tree.parent >= 0]] = True
        for wrong, why in (
            (inner[leaf], "has children; a sample is a leaf"),
            (torch.bincount(leaf, minlength=nodes)[leaf] > 1, "is the leaf of another sample too; give each its own"),
            (tree.prompt[leaf] != self.group_id, "belongs to another prompt than the sample's group_id"),
        ):
            if bool(wrong.any()):
                row = int(wrong.nonzero()[0])
                raise ValueError(f"tree.leaf_of_sample[{row}]: node {int(leaf[row])} {why}")

    @property
    def num_steps(self) -> int:
        """Number of trained steps T that the batch knows of; 1 if nothing is per step."""
        for table in (self.step_mask, self.log_prob, self.anchor_id, self.step_rewards):
            if table is not None:
                return table.shape[1]
        if self.tree is not None and len(self.tree.parent):
            return max(1, int(self.tree.edge_end.max()))
        return 1

    @cached_property
    def group(self) -> Tensor:
        """``group_id`` numbered from 0 in increasing order: sorted once, looked up by every stage."""
        return torch.unique(self.group_id, return_inverse=True)[1]

    @cached_property
    def samples(self) -> Tensor:
        """The samples numbered in the order of the rows; a signal whose ``sample`` is this very tensor has one row for each."""
        return torch.arange(len(self.rewards))

    @cached_property
    def groups(self) -> Segments:
        """The samples of each group."""
        return Segments(self.group, int(self.group.max()) + 1)


@dataclass(frozen=True, kw_only=True)
class AdvantageBatch:
    """What training sees.

    Shapes:
        advantage: ``[batch, T]`` float32, always finite; 0 for samples that are not kept.
        weight: ``[batch, T]`` float32, importance apart from the advantage's sign and size.
        keep: ``[batch]`` bool, False where a sample could not be scored or was filtered out.
        target: ``[batch, T]`` float32 or None, for objectives that regress on a ratio.
        stats: plain numbers to log.
    """

    advantage: Tensor
    weight: Tensor
    keep: Tensor
    target: Tensor | None = None
    stats: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Guarantee finite output: anything else is a defect of a stage."""
        for name in ("advantage", "weight"):
            low, high = vars(self)[name].aminmax() if vars(self)[name].numel() else (0.0, 0.0)
            # Both are NaN if any value is.
            assert all(map(math.isfinite, (low, high))), f"a stage produced a {name} that is not finite"
