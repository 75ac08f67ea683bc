"""The best step of a run, by a reward or metric that is only watched or by any other that is logged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

WINDOW = 5  # steps; one step's prompts are few, and the best of many noisy numbers is the luckiest


@dataclass(kw_only=True)
class Best:
    """Follows a logged value, a mean over the last five steps.

    Attributes:
        by: Name of a reward, metric or monitor.
        recent: Its last values.
        value: The best mean so far; None before five steps.
        step: Number of finished steps when it was reached.
    """

    by: str
    recent: list[float] = field(default_factory=list)
    value: float | None = None
    step: int = 0

    def look(self, line: Mapping[str, Any]) -> bool:
        """Take a finished step's line; tell whether the run is better than ever.

        Raises:
            ValueError: If nothing of this name is logged.
        """
        known = {**line.get("monitor", {}), **line["reward"], **line.get("metric", {})}
        if self.by not in known:
            raise ValueError(
                f"train.keep_best_by: got {self.by!r}, but what is logged is {', '.join(sorted(known))}; "
                "add it under rewards with weight 0, or under metrics"
            )
        self.recent = [*self.recent, float(known[self.by])][-WINDOW:]
        if len(self.recent) < WINDOW or not all(map(math.isfinite, self.recent)):
            return False
        mean = fmean(self.recent)
        if self.value is not None and mean <= self.value:
            return False
        self.value, self.step = mean, int(line["step"]) + 1
        return True

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on."""
        return {"by": self.by, "recent": list(self.recent), "value": self.value, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave; a run that goes on by another measure begins anew."""
        if state["by"] == self.by:
            self.recent, self.value, self.step = list(state["recent"]), state["value"], state["step"]
