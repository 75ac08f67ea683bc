"""The queue of a reward server: bounded, batching, with deadlines; each request is scored once however often it is sent."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowalign.rewards.wire import Reply, Request
from flowalign.train.scoring import NamedReward, RewardTable, score


class QueueFull(Exception):
    """There is no room for the request now."""


class TooMuch(Exception):
    """The request is larger than the whole queue; it will never fit."""


class DeadlinePassed(Exception):
    """The request was not scored in the time that its client waits."""


class RewardFailed(Exception):
    """The reward broke; the message is for the client and holds no internals."""


@dataclass(kw_only=True)
class _Asked:
    """What is remembered of a request: its body's digest, its reply, and how many wait for that."""

    digest: bytes
    done: asyncio.Future[Reply]
    num_waiting: int = 0


@dataclass(kw_only=True, eq=False)
class _Job:
    request: Request
    names: tuple[str, ...]
    arrived: float
    asked: _Asked

    @property
    def key(self) -> tuple[Any, ...]:
        """Jobs of one key can be scored together."""
        return (self.names, tuple(self.request.images.shape[2:]))


@dataclass(kw_only=True)
class Counts:
    """What ``/metrics`` shows; only ever raised, but for what is queued."""

    requests: dict[int, int] = field(default_factory=dict)
    images: int = 0
    batches: int = 0
    queued_images: int = 0
    queued_bytes: int = 0
    score_seconds: float = 0.0
    repeated: int = 0


@dataclass(kw_only=True)
class Batcher:
    """Collects requests and scores them in batches, in one thread.

    Attributes:
        rewards: By name; requests to one that does not score each image by itself are never mixed.
        max_batch: Images scored together; a request is never split.
        max_wait_s: How long a request waits for others.
        max_queue: Images that may wait.
        max_queue_bytes: Bytes of images that may wait.
        remember: Finished requests whose replies are kept for repetitions.
        counts: For ``/metrics``.
        failed: Is told of what a reward raises.
        has_ended: Whether :meth:`run` has: nothing will be scored any more.
    """

    rewards: Mapping[str, NamedReward]
    max_batch: int = 32
    max_wait_s: float = 0.005
    max_queue: int = 1024
    max_queue_bytes: int = 2**30
    remember: int = 256
    counts: Counts = field(default_factory=Counts)
    failed: Callable[[BaseException], None] = lambda error: None
    has_ended: bool = False

    def __post_init__(self) -> None:
        """Make the empty queue."""
        self._waiting: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._known: OrderedDict[str, _Asked] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward")

    async def submit(self, request: Request, digest: bytes) -> Reply:
        """Queue a request and wait for its scores; a repeated one waits for those of the first, by a deadline of its own.

        Args:
            request: What is asked.
            digest: Of its body, by which a repetition is told from another request of the same id.

        Raises:
            TooMuch: If it would not fit into the empty queue either.
            QueueFull: If it does not fit into the queue now.
            DeadlinePassed: If its time is over before it is scored.
            ValueError: If another request came under its id, or a reward refuses the images, prompts or records.
            RewardFailed: If a reward breaks.
        """
        asked = self._known.get(request.request_id)
        if asked is None:
            asked = self._queue(request, digest)
        elif asked.digest != digest:
            raise ValueError(
                f"request_id: another request came as {request.request_id!r}; needed one of its own, the same only for the same body"
            )
        else:
            self.counts.repeated += 1
        asked.num_waiting += 1
        try:
            return await asyncio.wait_for(asyncio.shield(asked.done), request.deadline_s)
        except TimeoutError as error:
            raise DeadlinePassed from error
        finally:
            asked.num_waiting -= 1
            if not asked.num_waiting:
                self._drop(asked)

    def _queue(self, request: Request, digest: bytes) -> _Asked:
        num, size = len(request.images), request.images.nbytes
        if num > self.max_queue or size > self.max_queue_bytes:
            raise TooMuch(
                f"{num} images of {size} bytes, needed at most {self.max_queue} images and {self.max_queue_bytes} bytes; send fewer at once"
            )
        if self.counts.queued_images + num > self.max_queue or self.counts.queued_bytes + size > self.max_queue_bytes:
            raise QueueFull
        asked = _Asked(digest=digest, done=asyncio.get_running_loop().create_future())
        names = tuple(request.rewards) or tuple(self.rewards)
        self._known[request.request_id] = asked
        self._waiting.append(_Job(request=request, names=names, arrived=time.monotonic(), asked=asked))
        self.counts.queued_images += num
        self.counts.queued_bytes += size
        self._arrived.set()
        return asked

    def _drop(self, asked: _Asked) -> None:
        """Free the place of a request for which nobody waits; once it is being scored its reply is kept, for a repetition."""
        job = next((job for job in self._waiting if job.asked is asked), None)
        if job is not None:
            self._leave([job])
            del self._known[job.request.request_id]

    def _leave(self, jobs: Sequence[_Job]) -> None:
        """Take jobs out of the queue."""
        self._waiting = deque(job for job in self._waiting if job not in jobs)
        self.counts.queued_images -= sum(len(job.request.images) for job in jobs)
        self.counts.queued_bytes -= sum(job.request.images.nbytes for job in jobs)

    def _forget(self, request_id: str) -> None:
        """Keep replies of good requests for a while; what failed may be tried again."""
        if self._known[request_id].done.exception() is not None:  # looked at here: where all clients have left, nobody else does
            del self._known[request_id]
        finished = [key for key, asked in self._known.items() if asked.done.done()]
        for key in finished[: max(0, len(finished) - self.remember)]:
            del self._known[key]

    async def run(self) -> None:
        """Score batch after batch until cancelled."""
        try:
            while True:
                await self._score_next()
        finally:
            self.has_ended = True

    async def _score_next(self) -> None:
        """Wait for requests and score a batch of them."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        first = self._waiting[0]
        while time.monotonic() < first.arrived + self.max_wait_s and self._fitting(first) < self.max_batch:
            await asyncio.sleep(self.max_wait_s / 5)
        if first not in self._waiting:  # its client has left
            return
        jobs = self._take(first)
        began = time.monotonic()
        results = await asyncio.get_running_loop().run_in_executor(self._thread, self._score_all, jobs)
        self.counts.score_seconds += time.monotonic() - began
        self.counts.batches += 1
        for job, result in zip(jobs, results, strict=True):
            self.counts.images += len(job.request.images)
            if isinstance(result, Reply):
                job.asked.done.set_result(result)
            else:
                job.asked.done.set_exception(result)
            self._forget(job.request.request_id)

    @property
    def is_full(self) -> bool:
        """Whether nothing more fits in."""
        return self.counts.queued_images >= self.max_queue or self.counts.queued_bytes >= self.max_queue_bytes

    def _fitting(self, first: _Job) -> int:
        return sum(len(job.request.images) for job in self._waiting if job.key == first.key)

    def _take(self, first: _Job) -> list[_Job]:
        """Remove the first job and others that can be scored with it from the queue."""
        taken, size = [first], len(first.request.images)
        if all(self.rewards[name].is_alone for name in first.names):
            for job in list(self._waiting)[1:]:
                if job.key == first.key and size + len(job.request.images) <= self.max_batch:
                    taken.append(job)
                    size += len(job.request.images)
        self._leave(taken)
        return taken

    def _score_all(self, jobs: Sequence[_Job]) -> list[Reply | Exception]:
        """Score jobs together; where that fails, one by one, so that none suffers from another's mistake."""
        try:
            return list(self._score(jobs))
        except Exception as error:
            if len(jobs) == 1:
                return [error if isinstance(error, ValueError) else self._broken(error)]
            return [self._score_all([job])[0] for job in jobs]

    def _broken(self, error: Exception) -> RewardFailed:
        self.failed(error)
        return RewardFailed("the reward failed; the server's log says why")

    def _score(self, jobs: Sequence[_Job]) -> list[Reply]:
        began = time.monotonic()
        images = torch.cat([job.request.images for job in jobs]).float() / 255
        prompts = [prompt for job in jobs for prompt in job.request.prompts]
        metadata = [dict(record) for job in jobs for record in job.request.metadata]
        with torch.no_grad():
            tables = {name: score([self.rewards[name]], images, prompts, metadata) for name in jobs[0].names}
        spent = time.monotonic() - began
        replies, start = [], 0
        for job in jobs:
            rows = slice(start, start + len(job.request.images))
            start = rows.stop
            timing = {"queue_s": round(began - job.arrived, 6), "score_s": round(spent, 6)}
            replies.append(_reply(job.request.request_id, tables, rows, timing))
        return replies


def _reply(request_id: str, tables: Mapping[str, RewardTable], rows: slice, timing: Mapping[str, float]) -> Reply:
    columns = {
        column: _plain(values[rows])
        for name, table in tables.items()
        for column, values in zip(table.names if len(table.names) > 1 else (name,), table.values.unbind(1), strict=True)
    }
    first = next((table for table in tables.values() if table.clauses is not None), None)
    clauses = None if first is None or first.clauses is None else [_plain(row) for row in first.clauses[rows].double().cpu()]
    valid = None if first is None or first.clauses_valid is None else first.clauses_valid[rows].cpu().tolist()
    return Reply(request_id=request_id, scores=columns, clauses=clauses, clauses_valid=valid, timing=timing)


def _plain(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
