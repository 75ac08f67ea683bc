"""Whether critics let the policy move: they learn alone until they know something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flowalign.core.algorithm import WINDOW, Algorithm, HasHeads, NeverReady
from flowalign.core.distillation import Distillation, State
from flowalign.core.heads import Evidence


class Gate:
    """Holds a policy back while its critics learn.

    Attributes:
        algorithm: Says when they know enough.
        is_open: Whether the policy may move; without critics it always may.
        held_back: Steps in which it did not.
        evidence: By head, what it knew of samples that it had not learnt from.
    """

    def __init__(self, algorithm: Algorithm, heads: Iterable[str]) -> None:
        """Begin closed where there are critics."""
        self.algorithm = algorithm
        self.is_open = not isinstance(algorithm, HasHeads | Distillation)
        self.held_back = 0
        self.evidence = {name: Evidence() for name in heads} if isinstance(algorithm, HasHeads) else {}

    def ask(self, state: State) -> None:
        """Open for good once critics know something, before a step's updates.

        Args:
            state: Statistics of a distillation.

        Raises:
            NeverReady: If they have not learnt it in the time that they were given.
        """
        if self.is_open:
            return
        if isinstance(self.algorithm, Distillation):
            self.is_open = self.algorithm.is_ready(state, self.held_back)
        else:
            assert isinstance(self.algorithm, HasHeads)
            self.is_open = self.algorithm.is_ready(self.evidence, self.held_back)
        self.held_back += not self.is_open

    def take(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Remember what a step's updates told of the heads; returns what to log."""
        told: dict[str, float] = {}
        for name in self.evidence:
            if f"{name}/error" in metrics:
                self.evidence[name] = self.evidence[name].after(metrics, name, window=WINDOW)
            told[f"{name}/explained"] = self.evidence[name].explained()
        if isinstance(self.algorithm, HasHeads | Distillation):
            told["held_back"] = self.held_back
        return told

    def check_opened(self, steps: int) -> None:
        """Refuse to end a run in which critics never let anything move: its weights are those that it began with.

        Raises:
            NeverReady: If they did not.
        """
        if self.is_open:
            return
        if not isinstance(self.algorithm, Distillation):
            what = f"the policy never moved in {steps} steps: {', '.join(self.evidence)} had not shown that it explains rewards (see explained in log.jsonl)"
        elif steps > self.algorithm.config.warmup_steps:
            what = (
                f"the student never moved after its warm-up in {steps} steps: its critics learnt alone (algorithm.least_steps, and with f_distill until "
                "ratio/calibrated is 1)"
            )
        else:
            return
        raise NeverReady(f"{what}; the state is saved, more --steps go on")

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {
            "may_move": self.is_open,
            "held_back": self.held_back,
            "evidence": {name: {key: list(values) for key, values in vars(seen).items()} for name, seen in self.evidence.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        if not isinstance(self.algorithm, HasHeads | Distillation):
            return
        self.is_open, self.held_back = state["may_move"], state["held_back"]
        self.evidence = {name: Evidence(**{key: tuple(values) for key, values in seen.items()}) for name, seen in state["evidence"].items()}
