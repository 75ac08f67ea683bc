"""Asking servers: whole deadlines, bounded answers, retries with jitter, and the next server where one fails."""

from __future__ import annotations

import json
import random
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowalign.plugins import require

RETRYABLE = (408, 429, 502, 503, 504)


class Unavailable(ConnectionError):
    """No server gave an answer in time."""


class Refused(ValueError):
    """A server says that the request itself is wrong; asking again would not help."""


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
        except ValueError as error:
            raise ValueError(f"{self.server}: answered what is not JSON: {self.body[:80]!r}") from error


@dataclass(kw_only=True)
class Client:
    """Posts to the first server that answers.

    Attributes:
        servers: Base addresses, tried in turn; who answered is asked first the next time.
        where: For messages.
        deadline_s: Of one request with all its retries.
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
        self._http = require("httpx", "serve").Client(trust_env=False, follow_redirects=False)
        weakref.finalize(self, self._http.close)
        self._first = 0

    def post(self, path: str, body: bytes, content_type: str, *, check: Callable[[Answer], Any] = lambda answer: answer) -> Any:
        """Post and return what ``check`` makes of the first good answer; an answer that it refuses (ValueError) counts as a failure.

        Raises:
            Refused: If a server refuses the request as wrong.
            Unavailable: If no server gave a good answer before the deadline; says what each last did.
        """
        end = time.monotonic() + self.deadline_s
        last: dict[str, str] = {}
        attempt = 0
        while True:
            index = (self._first + attempt) % len(self.servers)
            server = self.servers[index].rstrip("/")
            wait = 0.0
            try:
                answer = self._ask(server, path, body, content_type, end)
                if answer.status < 300:
                    found = check(answer)
                    self._first = index
                    return found
                last[server] = f"status {answer.status}: {answer.body[:200].decode(errors='replace')}"
                if answer.status not in RETRYABLE and answer.status < 500:
                    raise Refused(f"{self.where}: {server} refused the request with {last[server]}")
                wait = _seconds(answer.headers.get("retry-after"))
            except Refused:
                raise
            except (ValueError, OSError, require("httpx", "serve").HTTPError) as error:
                # What is cut off by the deadline says less than why it was asked again.
                if server not in last or time.monotonic() < end:
                    last[server] = f"{type(error).__name__}: {error}"[:300]
            attempt += 1
            if attempt % len(self.servers) == 0:
                rounds = attempt // len(self.servers)
                wait = max(wait, random.uniform(0, min(self.max_delay_s, self.first_delay_s * 2 ** min(rounds, 20))))
            else:
                wait = 0.0  # the next server is another one
            if time.monotonic() + wait >= end:
                story = "; ".join(f"{server}: {what}" for server, what in last.items())
                raise Unavailable(f"{self.where}: no answer within {self.deadline_s:g} s after {attempt} attempts ({story})")
            time.sleep(wait)

    def _ask(self, server: str, path: str, body: bytes, content_type: str, end: float) -> Answer:
        headers = {"content-type": content_type, **(self.headers or {})}
        if self.token is not None:
            headers["authorization"] = f"Bearer {self.token}"
        # httpx bounds each read, not the whole: a server that drips bytes is stopped by the clock below.
        left = max(0.001, end - time.monotonic())
        with self._http.stream("POST", server + path, content=body, headers=headers, timeout=left) as response:
            parts: list[bytes] = []
            size = 0
            for part in response.iter_bytes():
                size += len(part)
                if size > self.max_answer_bytes:
                    raise ValueError(f"answer of more than {self.max_answer_bytes} bytes")
                if time.monotonic() > end:
                    raise TimeoutError("the answer did not end in time")
                parts.append(part)
            return Answer(server=server, status=response.status_code, headers=dict(response.headers), body=b"".join(parts))


def _seconds(text: str | None) -> float:
    """Read a Retry-After in seconds; its date form is left to the random wait."""
    return min(float(text), 60.0) if text is not None and text.strip().isdigit() else 0.0
