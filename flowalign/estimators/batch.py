"""What goes into an estimator and what comes out: flat, ragged tables. Nothing here knows what an image is."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A forest over the samples of a batch.

    Shapes:
        parent: ``[nodes]`` int64, -1 for a root.
        prompt: ``[nodes]`` int64, group of each node.
        leaf_of_sample: ``[batch]`` int64, the leaf that is the sample.
        edge_start, edge_end: ``[nodes]`` int64, trained steps ``[start, end)`` of the edge from the parent.
    """

    parent: Tensor
    prompt: Tensor
    leaf_of_sample: Tensor
    edge_start: Tensor
    edge_end: Tensor

    def __post_init__(self) -> None:
        """Refuse cycles and orphans."""
        nodes = len(self.parent)
        if bool(((self.parent >= nodes) | (self.parent < -1)).any()):
            row = int(((self.parent >= nodes) | (self.parent < -1)).nonzero()[0])
            raise ValueError(f"tree.parent[{row}]: node {int(self.parent[row])} does not exist (nodes are 0 to {nodes - 1}, -1 is a root)")
        at = torch.arange(nodes)
        for _ in range(nodes + 1):
            at = torch.where(at >= 0, self.parent[at.clamp(min=0)], at)
            if bool((at < 0).all()):
                return
        row = int((at >= 0).nonzero()[0])
        raise ValueError(f"tree.parent: node {row} is its own ancestor; a tree must lead to a root (-1)")

    def depth(self) -> Tensor:
        """Return the number of edges from the root to each node."""
        depth, at = torch.zeros_like(self.parent), self.parent
        while bool((at >= 0).any()):
            depth = depth + (at >= 0)
            at = torch.where(at >= 0, self.parent[at.clamp(min=0)], at)
        return depth


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
        step_rewards: ``[batch, T, R]``; anchor_id: ``[batch, T]`` int64, equal where samples share a state.
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
        if self.rewards.ndim != 2:
            raise ValueError(
                f"rewards: got shape {tuple(self.rewards.shape)}, needed [batch, rewards]; for one reward use rewards[:, None]"
            )
        num = len(self.rewards)
        for name in ("rewards", "clauses", "metric", "log_prob", "step_rewards", "baseline"):
            self._convert(name, torch.float64, num)
        for name in ("group_id", "sample_uid", "anchor_id"):
            self._convert(name, torch.int64, num)
        for name in ("clauses_valid", "step_mask"):
            self._convert(name, torch.bool, num)
        infinite = torch.isinf(self.rewards).nonzero()
        if len(infinite):
            row, column = infinite[0].tolist()
            raise ValueError(
                f"rewards[{row}, {column}]: got {self.rewards[row, column].item()} for sample {int(self.sample_uid[row])}; "
                f'rewards must be finite (NaN means "not computed")'
            )
        if len(torch.unique(self.sample_uid)) != num:
            values, counts = torch.unique(self.sample_uid, return_counts=True)
            twice = int(values[counts > 1][0])
            raise ValueError(f"sample_uid: {twice} occurs more than once; every sample needs its own id")

    def _convert(self, name: str, dtype: torch.dtype, num: int) -> None:
        value = vars(self)[name]
        if value is None:
            return
        if dtype == torch.int64 and value.is_floating_point():
            raise ValueError(f"{name}: got {value.dtype}, needed integers (a float32 cannot hold ids above 2**24)")
        if len(value) != num:
            raise ValueError(f"{name}: got {len(value)} rows for {num} samples, needed one each")
        object.__setattr__(self, name, value.detach().cpu().to(dtype))

    @property
    def num_steps(self) -> int:
        """Number of trained steps T that the batch knows of; 1 if nothing is per step."""
        for table in (self.step_mask, self.log_prob, self.anchor_id, self.step_rewards):
            if table is not None:
                return table.shape[1]
        return 1


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
            assert bool(torch.isfinite(vars(self)[name]).all()), f"a stage produced a {name} that is not finite"
