"""Scoring beside the rollout: images are handed over as they are done, and scored while the next ones are sampled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowalign.images import finite
from flowalign.train.protocols import Pipeline
from flowalign.train.scoring import NamedReward, Result, RewardTable, Submits, to_table

Records = list[dict[str, Any]]


class Scorers:
    """The threads of a run's rewards: one in which those of this process score, in turn, and one for each that works elsewhere, to wait in."""

    def __init__(self, *tables: Sequence[NamedReward], device: torch.device) -> None:
        self.tables = tables
        num_threads = torch.get_num_threads()
        # Beside a rollout on the same cores: a second team of workers would take the first one's, and more workers than cores are put to sleep after
        # every operation, for the rest of the run. Training took 1.8 times as long.
        scoring_threads = 1 if device.type == "cpu" else num_threads

        def begin() -> None:
            # Both are of a thread: a new one would take all cores, and the first device. Asking first keeps the start-up from undoing it.
            torch.get_num_threads()
            torch.set_num_threads(scoring_threads)
            if device.type != "cpu":
                torch.accelerator.set_device_index(device.index or 0)

        self._here = ThreadPoolExecutor(1, thread_name_prefix="rewards", initializer=begin)
        self._here.submit(int).result()
        torch.set_num_threads(num_threads)  # what one thread sets, later ones begin with
        far = sum(isinstance(entry.reward, Submits) for table in tables for entry in table)
        self._waiting = ThreadPoolExecutor(max(1, far), thread_name_prefix="rewards-elsewhere")

    def begin(self) -> StepScores:
        """Begin to score the images of a step."""
        return StepScores(tables=self.tables, here=self._here, waiting=self._waiting)


@dataclass(kw_only=True)
class StepScores:
    """The scores of one step, under way.

    A reward that scores every image by itself is given each part at once; any other is given all images together at the end, in their order (see
    :mod:`flowalign.rewards.parts`). Which thread works, and when, changes no score.

    Attributes:
        tables: What images are scored by, and what else they are measured by: each makes a table of its own.
        here: Where rewards of this process score.
        waiting: Where answers of others are waited for.
    """

    tables: Sequence[Sequence[NamedReward]]
    here: ThreadPoolExecutor
    waiting: ThreadPoolExecutor
    _rows: list[Tensor] = field(default_factory=list, repr=False)
    _found: dict[int, list[Future[Result]]] = field(default_factory=dict, repr=False)
    _worked: list[tuple[float, float]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        """Ask once which rewards may be given parts: one that works elsewhere may have to ask there."""
        self._early = {number for number, entry in enumerate(self.rewards) if entry.is_alone}

    @property
    def rewards(self) -> list[NamedReward]:
        """Of all tables."""
        return [entry for table in self.tables for entry in table]

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
            if number not in self._early:
                continue
            began = time.perf_counter()
            if isinstance(entry.reward, Submits):
                future = self.waiting.submit(self._timed, _begun(entry.reward, images, prompts, metadata), began)
            else:
                future = self.here.submit(self._timed, _call(entry, images, prompts, metadata))
            self._found.setdefault(number, []).append(future)

    def _timed(self, work: Callable[[], Result], began: float | None = None) -> Result:
        start = time.perf_counter() if began is None else began
        try:
            return work()
        finally:
            self._worked.append((start, time.perf_counter()))

    def finish(self, images: Tensor, prompts: list[str], metadata: Records) -> tuple[list[RewardTable], float]:
        """Wait for what is under way, score what could not begin before, and join all.

        Args:
            images: All of the step, ``[batch, 3, h, w]``, in order.
            prompts: One text for each.
            metadata: One record for each.

        Returns:
            The tables, and the seconds for which scorers worked while nobody waited for them.

        Raises:
            ValueError: As :func:`flowalign.train.scoring.score`.
        """
        began = time.perf_counter()
        late = {number: entry for number, entry in enumerate(self.rewards) if number not in self._early}
        sent = {n: entry.reward.submit(images, prompts, metadata) for n, entry in late.items() if isinstance(entry.reward, Submits)}
        whole = {n: _call(entry, images, prompts, metadata)() for n, entry in late.items() if n not in sent}
        whole |= {number: wait() for number, wait in sent.items()}
        order = torch.argsort(torch.cat(self._rows)) if self._rows else torch.arange(len(images))
        results = []
        for number in range(len(self.rewards)):
            parts = [whole[number]] if number in whole else [future.result() for future in self._found[number]]
            results.append((parts, None if number in whole else order))
        hidden = sum(min(end, began) - start for start, end in _union(self._worked) if start < began)
        found = iter(results)
        return [to_table(table, [next(found) for _ in table], prompts) for table in self.tables], hidden


@dataclass(kw_only=True)
class Decoder:
    """Decodes what a rollout has finished in batches of full size, and hands the images over to be scored.

    Attributes:
        pipeline: Decodes.
        scores: Takes the images.
        prompts: One text for each image of the rollout.
        metadata: One record for each.
        batch_size: Images that are decoded together.
    """

    pipeline: Pipeline
    scores: StepScores
    prompts: list[str]
    metadata: Records
    batch_size: int
    _done: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)  # images with their rows
    _held: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)  # final states that wait, with their rows

    def take(self, x0: Tensor, rows: Tensor) -> None:
        """Take final states ``[part, *event]`` and their places among the rollout's images, ``[part]``."""
        self._held.append((x0, rows))
        if sum(len(rows) for _, rows in self._held) >= self.batch_size:
            self._hand_over()

    def images(self) -> Tensor:
        """Decode what waits; returns all images of the rollout in order, ``[batch, 3, h, w]``."""
        self._hand_over()
        images, rows = (torch.cat(column) for column in zip(*self._done, strict=True))
        return images[torch.argsort(rows).to(images.device)]

    def _hand_over(self) -> None:
        if not self._held:
            return
        x0, rows = (torch.cat(column) for column in zip(*self._held, strict=True))
        self._held.clear()
        images = finite(self.pipeline.decode(x0))
        self._done.append((images, rows))
        mine = rows.tolist()
        self.scores.hand_over(rows, images, [self.prompts[row] for row in mine], [self.metadata[row] for row in mine])


def _call(entry: NamedReward, images: Tensor, prompts: list[str], metadata: Records) -> Callable[[], Result]:
    return lambda: entry.reward(images, prompts, metadata)


def _begun(reward: Submits, images: Tensor, prompts: list[str], metadata: Records) -> Callable[[], Result]:
    """Ask another place; what goes wrong at once is told at the end as everything else, where all ranks listen."""
    try:
        return reward.submit(images, prompts, metadata)
    except Exception as error:
        failure = error

    def fail() -> Result:
        raise failure

    return fail


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Join spans of time that overlap."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
