"""Asking servers: whole deadlines, bounded answers, retries with jitter, and the next server where one fails."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowalign.plugins import require

RETRYABLE = (408, 429, 502, 503, 504)


class Unavailable(ConnectionError):
    """No server gave an answer in time."""


class Refused(ValueError):
    """The request itself is wrong, as every server says; asking again would not help."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A server's answer, read whole."""

    server: str
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the body as JSON.

        Raises:
            ValueError: If it is none.
        """
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.server}: answered what is not JSON: {self.body[:80]!r}") from error


Body = Sequence[bytes | memoryview]
_PIECE = 2**20


@dataclass(frozen=True, kw_only=True)
class _Request:
    method: str
    path: str
    body: Body = (b"",)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class Client:
    """Asks the first server that answers.

    Attributes:
        servers: Base addresses, tried in turn; who answered is asked first the next time, who failed is not.
        where: For messages.
        deadline_s: Of one request with all its retries; the servers share it.
        token: Sent as a bearer token.
        max_answer_bytes: A longer answer is cut off and counts as a failure.
        first_delay_s, max_delay_s: Between rounds through all servers a random time is waited, at most this, doubled each round.
        headers: Further headers.
    """

    servers: Sequence[str]
    where: str
    deadline_s: float
    token: str | None = None
    max_answer_bytes: int = 16 * 2**20
    first_delay_s: float = 0.1
    max_delay_s: float = 5.0
    headers: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        """Open the client; connections are made when they are needed."""
        # Asked in a loop of its own, as only there the whole of an attempt can be cut off: httpx bounds each read, not their sum.
        self._loop = asyncio.new_event_loop()
        self._http = require("httpx", "serve").AsyncClient(trust_env=False, follow_redirects=False)
        threading.Thread(target=_turn, args=(self._loop,), name="http-client", daemon=True).start()
        weakref.finalize(self, _end, self._loop, self._http)
        self._first = 0

    def post(self, path: str, body: bytes | Body, content_type: str, *, check: Callable[[Answer], Any] = lambda answer: answer) -> Any:
        """Post and return what ``check`` makes of the first good answer; an answer that it refuses (ValueError) counts as a failure.

        Each server gets an equal share of the time that is left for those not yet asked in a round. One that refuses the request is not asked
        again: it may lack what another has.

        Raises:
            Refused: If all servers refuse the request as wrong, or ``check`` raises it.
            Unavailable: If no server gave a good answer before the deadline; says what each last did.
        """
        return self._first_good(
            _Request(method="POST", path=path, body=(body,) if isinstance(body, bytes) else body, headers={"content-type": content_type}),
            check,
        )

    def get(self, path: str, *, check: Callable[[Answer], Any] = lambda answer: answer) -> Any:
        """Get and return what ``check`` makes of the first good answer; as :meth:`post`."""
        return self._first_good(_Request(method="GET", path=path), check)

    def _first_good(self, request: _Request, check: Callable[[Answer], Any]) -> Any:
        end = time.monotonic() + self.deadline_s
        last: dict[str, str] = {}
        willing = [(self._first + place) % len(self.servers) for place in range(len(self.servers))]
        attempts = 0
        for number in itertools.count(1):
            waits = []
            for place, index in enumerate(asked := tuple(willing)):
                attempts += 1
                try:
                    found = check(self._ask(index, request, (end - time.monotonic()) / (len(asked) - place)))
                    self._first = index
                    return found
                except Refused:
                    raise
                except (ValueError, OverflowError, RecursionError, OSError, require("httpx", "serve").HTTPError) as error:
                    told, wait, is_refusal = _told(error)
                    # What is cut off by the deadline says less than why it was asked again.
                    if self.servers[index] not in last or time.monotonic() < end:
                        last[self.servers[index]] = told
                if is_refusal:
                    willing.remove(index)
                waits.append(wait)
                if self._first == index:  # others that ask meanwhile may have moved on already
                    self._first = (index + 1) % len(self.servers)
            story = "; ".join(f"{server}: {what}" for server, what in last.items())
            if not willing:
                raise Refused(f"{self.where}: refused the request: {story}")
            # The jitter is added: clients that were all sent away for a second must not all come back after one.
            pause = min(waits) + random.uniform(0, min(self.max_delay_s, self.first_delay_s * 2 ** min(number, 20)))
            if time.monotonic() + pause >= end:
                break
            time.sleep(pause)
        raise Unavailable(f"{self.where}: no answer within {self.deadline_s:g} s after {attempts} attempts ({story})")

    def _ask(self, index: int, request: _Request, within_s: float) -> Answer:
        """Ask one server once.

        Raises:
            _Unsuccessful: If it answers with another status than success.
            TimeoutError: If the whole answer was not there in time.
        """
        asking = asyncio.wait_for(self._read(self.servers[index].rstrip("/"), request), max(0.001, within_s))
        try:
            answer = asyncio.run_coroutine_threadsafe(asking, self._loop).result()
        except TimeoutError as error:
            raise TimeoutError(f"no whole answer within {within_s:.3g} s") from error
        if answer.status >= 300:
            raise _Unsuccessful(answer)
        return answer

    async def _read(self, server: str, request: _Request) -> Answer:
        headers = {**request.headers, "content-length": str(sum(map(len, request.body))), **(self.headers or {})}
        if self.token is not None:
            headers["authorization"] = f"Bearer {self.token}"
        url = server + request.path
        async with self._http.stream(request.method, url, content=_pieces(request.body), headers=headers, timeout=None) as response:
            parts: list[bytes] = []
            size = 0
            async for part in response.aiter_bytes():
                size += len(part)
                if size > self.max_answer_bytes:
                    raise ValueError(f"answer of more than {self.max_answer_bytes} bytes")
                parts.append(part)
            return Answer(server=server, status=response.status_code, headers=dict(response.headers), body=b"".join(parts))


async def _pieces(body: Body) -> AsyncIterator[bytes | memoryview]:
    """Send in pieces: a body of many images is never copied as a whole."""
    for part in body:
        for start in range(0, len(part), _PIECE):
            yield part[start : start + _PIECE]


class _Unsuccessful(ConnectionError):
    def __init__(self, answer: Answer) -> None:
        super().__init__(f"status {answer.status}: {answer.body[:200].decode(errors='replace')}")
        self.answer = answer


def _told(error: Exception) -> tuple[str, float, bool]:
    """Return what a failure says, how long its server asks to wait, and whether it refuses the request."""
    if not isinstance(error, _Unsuccessful):
        return f"{type(error).__name__}: {error}"[:300], 0.0, False
    answer = error.answer
    return str(error), _seconds(answer.headers.get("retry-after")), answer.status not in RETRYABLE and answer.status < 500


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _end(loop: asyncio.AbstractEventLoop, http: Any) -> None:
    async def end() -> None:
        await http.aclose()
        loop.stop()

    asyncio.run_coroutine_threadsafe(end(), loop)


def _seconds(text: str | None) -> float:
    """Read a Retry-After in seconds; its date form is left to the random wait."""
    return min(float(text), 60.0) if text is not None and text.strip().isdigit() else 0.0
