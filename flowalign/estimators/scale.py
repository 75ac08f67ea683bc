"""What a centred reward is divided by. Each standard deviation names its ddof, its eps, the rule and what it is taken over."""

from dataclasses import replace
from typing import Literal

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.chain import Signal, Stage, pure, segment_key
from flowalign.estimators.kinds import Signature
from flowalign.estimators.segments import segment_stats

Rule = Literal["add", "floor", "rsqrt"]


def scale_by_std(over: str = "group", *, of: Literal["raw", "residual"] = "raw", ddof: int, eps: float, rule: Rule = "add") -> Stage:
    """Divide by a standard deviation.

    Args:
        over: Segment that it is taken over.
        of: The values before the baseline or after it. Within a group there is no difference.
        ddof: Delta degrees of freedom.
        eps: Keeps the quotient finite ...
        rule: ... added to the std ("add"), as its least value ("floor"), or added to the variance ("rsqrt").
    """
    if rule not in ("add", "floor", "rsqrt"):
        raise ValueError(f"rule: got {rule!r}, needed 'add', 'floor' or 'rsqrt'")

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        values = signal.x if of == "residual" or signal.raw is None else signal.raw
        stats = segment_stats(values, segment_key(signal, batch, over))
        variance = stats.variance(ddof=ddof)
        std = variance.sqrt()
        divisor = {"add": std + eps, "floor": std.clamp(min=eps), "rsqrt": (variance + eps).sqrt()}[rule]
        return replace(signal, x=signal.x / stats.rows(divisor)).note(std=float(std.mean()) if std.numel() else 0.0)

    name = f"scale_by_std(over={over}, of={of}, ddof={ddof}, eps={eps:g}, rule={rule})"
    return pure(name, Signature(phase="centred -> scaled", magnitude="free"), apply)
