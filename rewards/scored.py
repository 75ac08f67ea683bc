"""What a reward returns that has more to tell than one number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RewardScores:
    """Named values ``[batch]``, and verifiable sub-checks ``[batch, C]`` where there are some (NaN: not computed for this sample)."""

    values: Mapping[str, Tensor]
    clauses: Tensor | None = None
    clauses_valid: Tensor | None = None
