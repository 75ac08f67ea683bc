"""All stages by name, for chains that are written down in a configuration."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from flowalign.estimators import (
    baseline,
    calibrate,
    clauses,
    combine,
    compare,
    controllers,
    credit,
    diversity,
    pairs,
    replay,
    scale,
    shape,
    trees,
    turning,
    weigh,
)
from flowalign.estimators.baseline import center as center
from flowalign.estimators.baseline import leave_one_out as leave_one_out
from flowalign.estimators.calibrate import clip as clip
from flowalign.estimators.combine import combine_rewards as combine_rewards
from flowalign.estimators.credit import broadcast_steps as broadcast_steps
from flowalign.estimators.scale import scale_by_std as scale_by_std
from flowalign.estimators.signals import Stage

_MODULES = (
    shape,
    clauses,
    compare,
    combine,
    baseline,
    scale,
    calibrate,
    credit,
    diversity,
    trees,
    turning,
    weigh,
    pairs,
    controllers,
    replay,
)

STAGES: Mapping[str, Callable[..., Stage]] = MappingProxyType({stage.__name__: stage for module in _MODULES for stage in module.STAGES})
"""Names for chains that are written down in a configuration."""
