"""Scoring beside the rollout: images are handed over as they are done, and scored while the next ones are sampled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowalign.train.scoring import NamedReward, Result, RewardTable, Submits, to_table

Records = list[dict[str, Any]]


class Scorers:
    """The threads of a run's rewards: one in which those of this process score, in turn, and one for each that works elsewhere, to wait in."""

    def __init__(self, rewards: Sequence[NamedReward], device: torch.device) -> None:
        self.rewards = rewards
        num_threads = torch.get_num_threads()

        def begin() -> None:
            # Both are of a thread: a new one would take all cores, and the first device.
            torch.set_num_threads(num_threads)
            if device.type != "cpu":
                torch.accelerator.set_device_index(device.index or 0)

        self._here = ThreadPoolExecutor(1, thread_name_prefix="rewards", initializer=begin)
        far = sum(isinstance(entry.reward, Submits) for entry in rewards)
        self._waiting = ThreadPoolExecutor(max(1, far), thread_name_prefix="rewards-elsewhere")

    def begin(self) -> StepScores:
        """Begin to score the images of a step."""
        return StepScores(rewards=self.rewards, here=self._here, waiting=self._waiting)


@dataclass(kw_only=True)
class StepScores:
    """The scores of one step, under way.

    A reward that scores every image by itself is given each part at once; any other is given all images together at the end, in their order. Which
    thread works, and when, changes no score.

    Attributes:
        rewards: What images are scored by.
        here: Where rewards of this process score.
        waiting: Where answers of others are waited for.
    """

    rewards: Sequence[NamedReward]
    here: ThreadPoolExecutor
    waiting: ThreadPoolExecutor
    _rows: list[Tensor] = field(default_factory=list, repr=False)
    _found: dict[int, list[Future[Result]]] = field(default_factory=dict, repr=False)
    _worked: list[tuple[float, float]] = field(default_factory=list, repr=False)

    def hand_over(self, rows: Tensor, images: Tensor, prompts: list[str], metadata: Records) -> None:
        """Take images that are done.

        Args:
            rows: Their places among the step's images, ``[part]``.
            images: ``[part, 3, h, w]`` in [0, 1].
            prompts: One text for each.
            metadata: One record for each.
        """
        self._rows.append(rows)
        for number, entry in enumerate(self.rewards):
            if not entry.is_alone:
                continue
            began = time.perf_counter()
            if isinstance(entry.reward, Submits):
                future = self.waiting.submit(self._timed, entry.reward.submit(images, prompts, metadata), began)
            else:
                future = self.here.submit(self._timed, _call(entry, images, prompts, metadata))
            self._found.setdefault(number, []).append(future)

    def _timed(self, work: Callable[[], Result], began: float | None = None) -> Result:
        start = time.perf_counter() if began is None else began
        try:
            return work()
        finally:
            self._worked.append((start, time.perf_counter()))

    def finish(self, images: Tensor, prompts: list[str], metadata: Records) -> tuple[RewardTable, float]:
        """Wait for what is under way, score what could not begin before, and join all.

        Args:
            images: All of the step, ``[batch, 3, h, w]``, in order.
            prompts: One text for each.
            metadata: One record for each.

        Returns:
            The table, and the seconds for which scorers worked while nobody waited for them.

        Raises:
            ValueError: As :func:`flowalign.train.scoring.score`.
        """
        began = time.perf_counter()
        late = {number: entry for number, entry in enumerate(self.rewards) if not entry.is_alone}
        sent = {n: entry.reward.submit(images, prompts, metadata) for n, entry in late.items() if isinstance(entry.reward, Submits)}
        whole = {n: _call(entry, images, prompts, metadata)() for n, entry in late.items() if n not in sent}
        whole |= {number: wait() for number, wait in sent.items()}
        order = torch.argsort(torch.cat(self._rows)) if self._rows else torch.arange(len(images))
        results = []
        for number in range(len(self.rewards)):
            parts = [whole[number]] if number in whole else [future.result() for future in self._found[number]]
            results.append((parts, None if number in whole else order))
        hidden = sum(min(end, began) - start for start, end in _union(self._worked) if start < began)
        return to_table(self.rewards, results, prompts), hidden


def _call(entry: NamedReward, images: Tensor, prompts: list[str], metadata: Records) -> Callable[[], Result]:
    return lambda: entry.reward(images, prompts, metadata)


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Join spans of time that overlap."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
