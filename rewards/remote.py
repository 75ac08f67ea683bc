"""A reward on another machine or in another environment, behind ``flowalign serve-reward``."""

from __future__ import annotations

import math
import os
import uuid
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from flowalign.rewards import pixels, wire
from flowalign.rewards.http import Answer, Client, Refused, Unavailable
from flowalign.rewards.parts import cut
from flowalign.rewards.scored import RewardScores


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sends images to reward servers and waits for their scores.

    A request is repeated, after random growing pauses and with the next server first, until its deadline; a server scores a repeated request
    once. Replies are checked: another number of scores, or ones that are not finite, count as a failure.

    Where the reward compares images of a prompt with each other, as the server says or ``scores_alone``, they are sent in one request, however many
    they are; else requests are cut anywhere.

    Attributes:
        servers: Base addresses, such as ``http://127.0.0.1:8100``; the first that answers is asked first from then on.
        reward: The reward's name at the server; null where it serves one.
        batch_size: Images of one request.
        scores_alone: Whether the reward scores each image by itself; null asks the server, for whom what it does not say means no.
        concurrency: Requests at a time.
        deadline_s: Of one request, with all its repetitions.
        on_failure: "stop" stops the run, which saves its state; "skip" marks the samples invalid (NaN, so ``may_skip: true`` belongs
            beside this reward) and warns.
        token_variable: Environment variable that holds the servers' token.
    """

    servers: tuple[str, ...] = ("http://127.0.0.1:8100",)
    reward: str | None = None
    batch_size: int = 16
    scores_alone: bool | None = None
    concurrency: int = 4
    deadline_s: float = 120.0
    on_failure: Literal["stop", "skip"] = "stop"
    token_variable: str = "FLOWALIGN_REWARD_TOKEN"

    def __post_init__(self) -> None:
        """Refuse addresses and sizes that are none."""
        bad = next((server for server in self.servers if not server.startswith(("http://", "https://"))), None)
        if bad is not None or not self.servers:
            raise ValueError(f"servers: got {bad!r}, needed addresses such as http://127.0.0.1:8100")
        if self.batch_size < 1 or self.concurrency < 1 or not self.deadline_s > 0:
            raise ValueError("batch_size and concurrency: needed at least 1, and a positive deadline_s")

    def build(self) -> Remote:
        """Make the client; the servers are asked with the first images."""
        token = os.environ.get(self.token_variable)
        client = Client(servers=self.servers, where="remote reward", deadline_s=self.deadline_s, token=token)
        return Remote(self, client, ThreadPoolExecutor(self.concurrency, thread_name_prefix="remote-reward"))


Part = tuple[list[float], wire.Reply | None]


@dataclass(frozen=True)
class Remote:
    """See ``Config``."""

    config: Config
    client: Client
    pool: ThreadPoolExecutor
    told: list[bool] = field(default_factory=list, repr=False)  # what a server said of ``scores_alone``, once one has

    @property
    def scores_alone(self) -> bool:
        """Whether the reward scores each image by itself, as configured or as a server says; False as long as none answers."""
        if self.config.scores_alone is not None:
            return self.config.scores_alone

        def read(answer: Answer) -> bool:
            return wire.read_listing(answer.json(), self.config.reward)

        if not self.told:
            try:
                self.told.append(self.client.get(wire.REWARDS_PATH, check=read))
            except (Unavailable, Refused):
                return False  # sending the images says so
        return self.told[0]

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> RewardScores:
        """Score images ``[batch, 3, h, w]`` in [0, 1].

        Raises:
            Unavailable: If no server gave good scores in time, and ``on_failure`` is "stop".
            Refused: If a server says that the request is wrong.
        """
        return self.submit(images, prompts, metadata)()

    def submit(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> _Pending:
        """Start scoring and return at once; calling the result waits for the scores."""
        pixels.check(images, prompts, "remote reward")
        flat = pixels.to_bytes_checked(images).cpu()
        parts = cut(range(len(flat)) if self.scores_alone else prompts, self.config.batch_size)
        sent = [self.pool.submit(self._ask, flat[rows], [prompts[row] for row in rows], [metadata[row] for row in rows]) for rows in parts]
        return _Pending(sent, torch.tensor([row for rows in parts for row in rows]).argsort())

    def _ask(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Part:
        request_id = uuid.uuid4().hex
        name = self.config.reward
        body = wire.parts(
            wire.Request(
                request_id=request_id,
                images=images,
                prompts=prompts,
                metadata=metadata,
                rewards=() if name is None else (name,),
                deadline_s=self.config.deadline_s,
            )
        )

        def read(answer: Answer) -> Part:
            _, values, reply = wire.read_reply(answer.json(), request_id, name, len(images))
            return values, reply

        try:
            return self.client.post(wire.SCORE_PATH, body, wire.CONTENT_TYPE, check=read)
        except Unavailable as error:
            if self.config.on_failure == "stop":
                raise
            warnings.warn(f"{error}; {len(images)} samples are marked invalid", stacklevel=2)
            return [math.nan] * len(images), None


@dataclass(frozen=True)
class _Pending:
    parts: Sequence[Future[Part]]
    order: Tensor

    def __call__(self) -> RewardScores:
        found = [part.result() for part in self.parts]
        values = torch.tensor([value for values, _ in found for value in values], dtype=torch.float64)
        clauses = valid = None
        replies = [reply for _, reply in found]
        if all(reply is not None and reply.clauses is not None for reply in replies):
            rows = [row for reply in replies if reply is not None for row in reply.clauses or ()]
            flags = [row for reply in replies if reply is not None for row in reply.clauses_valid or ()]
            clauses = torch.tensor([[math.nan if value is None else value for value in row] for row in rows], dtype=torch.float64)
            valid = torch.tensor(flags, dtype=torch.bool)
            clauses, valid = clauses[self.order], valid[self.order]
        return RewardScores(values={"reward": values[self.order]}, clauses=clauses, clauses_valid=valid)
