"""A buffer of samples that are worth another look: ids, advantages and ages. The trainer keeps the samples themselves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.kinds import Signature
from flowalign.estimators.options import at_least
from flowalign.estimators.signals import Signal, Stage, State, stage


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """Samples drawn from the buffer.

    Shapes:
        uid, group: ``[draws]`` int64.
        advantage: ``[draws]`` float64, as it was when the sample was made.
        age: ``[draws]`` int64, steps since then; the next step sees age 1.
    """

    uid: Tensor
    group: Tensor
    advantage: Tensor
    age: Tensor


def priorities(advantage: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Return probabilities proportional to ``|A|**alpha``; 0 where ``A`` is 0.

    Examples:
        >>> priorities(torch.tensor([1.5, -0.5, 0.0])).tolist()
        [0.75, 0.25, 0.0]
    """
    size = torch.where(advantage == 0, 0.0, advantage.abs() ** alpha)
    return size / size.sum().clamp(min=torch.finfo(size.dtype).tiny)


@stage
def remember(capacity: int = 1024, *, max_age: int = 3, alpha: float = 1.0) -> Stage:
    """Remember the samples with an advantage; advantages themselves pass unchanged. State: the buffer.

    Beyond the capacity the samples with the smallest ``|A|`` go first. A sample id that comes again replaces its earlier entry.

    Args:
        capacity: Samples that are remembered.
        max_age: Steps for which they are; off-policy ratios go astray after two or three.
        alpha: Exponent of the priority, for ``draw``.
    """
    if capacity < 1 or max_age < 1:
        raise ValueError(f"remember: got capacity {capacity} and max_age {max_age}, needed at least 1 each")
    at_least("alpha", alpha, 0.0)

    def apply(signal: Signal, batch: RewardBatch, state: State) -> tuple[Signal, State]:
        x = torch.nan_to_num(signal.x[:, 0])
        worth = (x != 0) & signal.keep[signal.sample]
        rows = signal.sample[worth]
        uid = batch.sample_uid[rows]
        stays = (state["age"] + 1 <= max_age) & ~torch.isin(state["uid"], uid)
        fresh = {"uid": uid, "group": batch.group_id[rows], "advantage": x[worth], "age": torch.ones_like(uid)}
        old = {**{name: state[name] for name in fresh}, "age": state["age"] + 1}
        joined = {name: torch.cat([old[name][stays], fresh[name]]) for name in fresh}
        best = torch.argsort(joined["advantage"].abs(), descending=True, stable=True)[:capacity].sort().values
        kept = {name: values[best] for name, values in joined.items()}
        share = float(worth.double().mean()) if len(x) else 0.0
        return signal.note(effective=share, remembered=float(len(best))), {**kept, "alpha": alpha}

    def init() -> State:
        empty = torch.zeros(0, dtype=torch.int64)
        return {"uid": empty, "group": empty, "advantage": torch.zeros(0, dtype=torch.float64), "age": empty, "alpha": alpha}

    signature = Signature(rows="sample", rewards="one", phase="centred | scaled | calibrated")
    return Stage(signature=signature, apply=apply, init=init)


def draw(state: Mapping[str, Mapping[str, Any]], num: int, *, seed: int) -> Replayed:
    """Draw samples from the buffer without replacement, with probability proportional to ``|A|**alpha``.

    Every rank that asks with the same seed (the step) gets the same samples.

    Args:
        state: An estimator's state.
        num: How many; fewer come where the buffer holds fewer.
        seed: For example the step.

    Raises:
        ValueError: If the estimator has no buffer.
    """
    entry = next((entry for entry in state.values() if {"uid", "age", "advantage"} <= entry.keys()), None)
    if entry is None:
        raise ValueError("draw: this estimator has no replay buffer; use the recipe 'ssb' or the stage 'remember'")
    weight = priorities(entry["advantage"], alpha=float(entry["alpha"]))
    # Adding Gumbel noise and taking the largest draws without replacement.
    uniform = torch.rand(len(weight), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noisy = weight.log() - (-uniform.clamp(min=1e-300).log()).log()
    chosen = torch.argsort(noisy, descending=True, stable=True)[: max(num, 0)]
    return Replayed(**{name: entry[name][chosen] for name in ("uid", "group", "advantage", "age")})


STAGES: Sequence[Callable[..., Stage]] = (remember,)
"""For ``stages.STAGES``."""
