"""All stages by name, for chains that are written down in a configuration."""

from flowalign.estimators import weigh
from flowalign.estimators.baseline import center as center
from flowalign.estimators.baseline import leave_one_out as leave_one_out
from flowalign.estimators.calibrate import clip as clip
from flowalign.estimators.combine import combine_rewards as combine_rewards
from flowalign.estimators.credit import broadcast_steps as broadcast_steps
from flowalign.estimators.scale import scale_by_std as scale_by_std

STAGES = {stage.__name__: stage for stage in (combine_rewards, center, leave_one_out, scale_by_std, clip, broadcast_steps)}
STAGES = {**STAGES, **{stage.__name__: stage for stage in (*weigh.STAGES,)}}
"""Names for chains that are written down in a configuration."""
