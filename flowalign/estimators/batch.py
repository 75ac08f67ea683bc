"""What goes into an estimator and what comes out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowalign.estimators.tree import Tree

Rows = slice | Int[Tensor, " taken"]


@dataclass(frozen=True, kw_only=True)
class RewardBatch:
    """Everything an estimator may read about one optimizer step; flat, ragged, float64, on the CPU.

    Groups need not be contiguous nor of equal size. NaN means "not computed"; inf is refused.

    Shapes:
        rewards: ``[batch, reward]``, higher is better.
        group_id: ``[batch]``, samples of one prompt share a value; any int64.
        sample_uid: ``[batch]``, unique over the job, and the only breaker of ties.
        clauses, clauses_valid: ``[batch, clause]``, verifiable sub-checks and which of them were evaluated.
        metric: ``[batch, metric]``, further qualities that some recipes condition on.
        log_prob: ``[batch, step]``, mean over event dims of the transition log-probability.
        step_mask: ``[batch, step]``, which steps are trained.
        step_rewards: ``[batch, step, reward]``, rewards of partial rollouts.
        anchor_id: ``[batch, step]``, equal where samples of a group share a state.
        baseline: ``[batch, reward]``, for example the reward of the ODE sample from the same noise.
        tree: Which samples share how much of their trajectory.

    Raises:
        ValueError: If shapes or types disagree, a value is infinite, or a ``sample_uid`` occurs twice.
    """

    rewards: Float[Tensor, "batch reward"]
    group_id: Int[Tensor, " batch"]
    sample_uid: Int[Tensor, " batch"]
    clauses: Float[Tensor, "batch clause"] | None = None
    clauses_valid: Bool[Tensor, "batch clause"] | None = None
    metric: Float[Tensor, "batch metric"] | None = None
    log_prob: Float[Tensor, "batch step"] | None = None
    step_mask: Bool[Tensor, "batch step"] | None = None
    step_rewards: Float[Tensor, "batch step reward"] | None = None
    anchor_id: Int[Tensor, "batch step"] | None = None
    baseline: Float[Tensor, "batch reward"] | None = None
    tree: Tree | None = None

    def __post_init__(self) -> None:
        """Convert every field to its type and check it."""
        if self.rewards.ndim != 2:
            shape = list(self.rewards.shape)
            raise ValueError(f"rewards: must be [batch, reward], got {shape}; one reward is rewards[:, None]")
        if self.clauses is not None and self.clauses_valid is None:
            valid = torch.ones_like(self.clauses, dtype=torch.bool)
            object.__setattr__(self, "clauses_valid", valid)
        for name, value in self.tensors().items():
            object.__setattr__(self, name, _converted(name, value))
        self._check_shapes()
        self._check_values()
        if self.tree is not None:
            self._check_tree(self.tree)

    @property
    def num_samples(self) -> int:
        """Number of samples N."""
        return self.rewards.shape[0]

    @property
    def num_rewards(self) -> int:
        """Number of rewards R."""
        return self.rewards.shape[1]

    @property
    def num_steps(self) -> int:
        """Number of trained steps T; 1 when no field says anything per step."""
        for per_step in (self.step_mask, self.log_prob, self.step_rewards, self.anchor_id):
            if per_step is not None:
                return per_step.shape[1]
        return max(1, self.tree.num_steps) if self.tree is not None else 1

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are present, by name; each has one row per sample."""
        values = {name: self.__dict__[name] for name in FIELDS}
        return {name: value for name, value in values.items() if value is not None}

    def take(self, rows: Rows) -> RewardBatch:
        """Return the given samples, in the given order, with the whole forest."""
        taken = {name: value[rows] for name, value in self.tensors().items()}
        tree = self.tree
        if tree is not None:
            tree = dataclasses.replace(tree, leaf_of_sample=tree.leaf_of_sample[rows])
        return RewardBatch(**taken, tree=tree)

    def _check_shapes(self) -> None:
        sizes: dict[str, tuple[int, str]] = {
            "batch": (self.num_samples, "rewards"),
            "reward": (self.num_rewards, "rewards"),
        }
        for name, value in self.tensors().items():
            axes = FIELDS[name].axes
            if value.ndim != len(axes):
                raise ValueError(f"{name}: must be [{', '.join(axes)}], got {list(value.shape)}")
            for axis, size in zip(axes, value.shape, strict=True):
                expected, source = sizes.setdefault(axis, (size, name))
                if size != expected:
                    raise ValueError(f"{name}: has {size} on axis {axis!r}, but {source} has {expected}")
        if self.clauses is None and self.clauses_valid is not None:
            raise ValueError("clauses_valid: given without clauses")

    def _check_values(self) -> None:
        for name, value in self.tensors().items():
            for place in torch.isinf(value).nonzero().tolist()[:1]:
                where = ", ".join(f"{axis} {at}" for axis, at in zip(FIELDS[name].axes[1:], place[1:], strict=True))
                uid = int(self.sample_uid[place[0]])
                raise ValueError(
                    f"{name}: {float(value[tuple(place)])} for the sample with uid {uid} (row {place[0]}), {where}; "
                    "infinite values are refused, NaN means 'not computed'"
                )
        uid, count = self.sample_uid.unique(return_counts=True)
        for repeated in uid[count > 1].tolist()[:1]:
            raise ValueError(f"sample_uid: {repeated} occurs more than once; every sample needs its own")

    def _check_tree(self, tree: Tree) -> None:
        if tree.leaf_of_sample.numel() != self.num_samples:
            got = tree.leaf_of_sample.numel()
            raise ValueError(f"tree.leaf_of_sample: must have {self.num_samples} samples like rewards, got {got}")
        if tree.num_steps > self.num_steps:
            raise ValueError(f"tree.edge_stop: reaches {tree.num_steps} steps, but there are {self.num_steps}")
        root = tree.root[tree.leaf_of_sample]
        group = torch.zeros_like(tree.parent).scatter(0, root, self.group_id)
        for sample in (group[root] != self.group_id).nonzero().flatten().tolist()[:1]:
            raise ValueError(f"tree: the root above sample {sample} has samples of more than one group")


@dataclass(frozen=True)
class _Field:
    dtype: torch.dtype
    axes: tuple[str, ...]


FIELDS: Mapping[str, _Field] = {
    "rewards": _Field(torch.float64, ("batch", "reward")),
    "group_id": _Field(torch.int64, ("batch",)),
    "sample_uid": _Field(torch.int64, ("batch",)),
    "clauses": _Field(torch.float64, ("batch", "clause")),
    "clauses_valid": _Field(torch.bool, ("batch", "clause")),
    "metric": _Field(torch.float64, ("batch", "metric")),
    "log_prob": _Field(torch.float64, ("batch", "step")),
    "step_mask": _Field(torch.bool, ("batch", "step")),
    "step_rewards": _Field(torch.float64, ("batch", "step", "reward")),
    "anchor_id": _Field(torch.int64, ("batch", "step")),
    "baseline": _Field(torch.float64, ("batch", "reward")),
}
"""Type and axes of each tensor of a batch; validation, ``take`` and the gather all read this table."""


@dataclass(frozen=True, kw_only=True)
class AdvantageBatch:
    """The only thing a trainer sees of an estimator; finite, and 0 wherever a sample or step is left out.

    Shapes:
        advantage: ``[batch, step]`` float32, signed.
        weight: ``[batch, step]`` float32, the importance of a row in the loss, without sign.
        keep: ``[batch]``, False for samples that carry no comparison or were filtered.
        target: ``[batch, step]`` float32 or None, the ratio to reach for regressing recipes; 1 is "stay".
        stats: Plain floats to log.

    Raises:
        ValueError: If a value is not finite in float32.
    """

    advantage: Float[Tensor, "batch step"]
    weight: Float[Tensor, "batch step"]
    keep: Bool[Tensor, " batch"]
    target: Float[Tensor, "batch step"] | None = None
    stats: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that nothing infinite or undefined leaves the estimator."""
        given = {"advantage": self.advantage, "weight": self.weight, "target": self.target}
        for name, value in given.items():
            if value is not None and not bool(value.isfinite().all()):
                row = value.isfinite().logical_not().nonzero()[0].tolist()
                raise ValueError(f"{name}: not finite at sample {row[0]}, step {row[1]}; are rewards of a sane size?")

    def take(self, rows: Rows) -> AdvantageBatch:
        """Return the given samples, in the given order; the statistics stay those of the whole batch."""
        target = None if self.target is None else self.target[rows]
        return dataclasses.replace(self, advantage=self.advantage[rows], weight=self.weight[rows], keep=self.keep[rows], target=target)


def require[T](value: T | None, field: str) -> T:
    """Return ``value``, or say which field of the batch is missing.

    Raises:
        ValueError: If the field is None.
    """
    if value is None:
        raise ValueError(f"RewardBatch.{field}: this estimator needs it, got None")
    return value


def _converted(name: str, value: Tensor) -> Tensor:
    dtype = FIELDS[name].dtype
    if dtype == torch.int64 and value.is_floating_point():
        raise ValueError(f"{name}: must be integers (floats lose digits of large ids), got {value.dtype}")
    # float64 is missing on some devices and these tables are tiny, so the CPU it is, with the same bits everywhere.
    return value.detach().to("cpu", dtype)
