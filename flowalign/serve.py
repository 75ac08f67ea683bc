"""``flowalign serve-reward``: rewards behind HTTP, for other machines, environments and processes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from flowalign.config import ConfigError
from flowalign.plugins import require
from flowalign.rewards import wire
from flowalign.serve_queue import Batcher, Counts, DeadlinePassed, QueueFull, RewardFailed, TooMuch
from flowalign.suite_options import named_rewards
from flowalign.train.scoring import NamedReward

ENDED = "the server scores no more; its log may say why, and it must be started again"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_log = logging.getLogger("flowalign.serve")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How a server listens and what it takes.

    Attributes:
        host: Address; another than this machine's own needs a token.
        port: Port; 0 for any free one.
        token: Clients must send it as a bearer token; None for no token.
        max_batch, max_wait_ms, max_queue, max_queue_bytes: See :class:`flowalign.serve_queue.Batcher`.
        limits: Of one request.
        body_seconds: A client must have sent its request by then.
        max_connections: Connections at a time.
    """

    host: str = "127.0.0.1"
    port: int = 8100
    token: str | None = None
    max_batch: int = 32
    max_wait_ms: float = 5.0
    max_queue: int = 1024
    max_queue_bytes: int = 2**30
    limits: wire.Limits = field(default_factory=wire.Limits)
    body_seconds: float = 30.0
    max_connections: int = 512

    def __post_init__(self) -> None:
        """Refuse to be reachable by others without a token, and numbers out of their range."""
        if self.token is None and self.host not in _LOOPBACK:
            raise ConfigError(f"host: {self.host} can be reached from elsewhere; set a token (--token-variable), or listen on 127.0.0.1")
        if self.token is not None and len(self.token) < 16:
            raise ConfigError("token: needed at least 16 characters")
        if min(self.max_batch, self.max_queue, self.max_queue_bytes) < 1 or self.max_wait_ms < 0:
            raise ConfigError("max_batch, max_queue and max_queue_bytes: needed at least 1, and max_wait_ms of at least 0")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port: got {self.port}, needed 0 to 65535 (0 for any free one)")


def app(rewards: Sequence[NamedReward], config: ServeConfig) -> Any:
    """Return the ASGI application that serves rewards.

    Args:
        rewards: What is served, each under its name. Requests to one that does not score each image by itself are never scored together.
        config: Limits and token; host and port are the caller's business.
    """
    fastapi = require("fastapi", "serve")
    responses = require("fastapi.responses", "serve")
    batcher = Batcher(
        rewards={entry.name: entry for entry in rewards},
        max_batch=config.max_batch,
        max_wait_s=config.max_wait_ms / 1000,
        max_queue=config.max_queue,
        max_queue_bytes=config.max_queue_bytes,
        failed=lambda error: _log.error("a reward failed", exc_info=error),
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        task.add_done_callback(_tell_end)
        yield
        task.remove_done_callback(_tell_end)
        task.cancel()

    served = fastapi.FastAPI(title="flowalign rewards", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    def answer(status: int, content: Any, **headers: str) -> Any:
        batcher.counts.requests[status] = batcher.counts.requests.get(status, 0) + 1
        return responses.JSONResponse(content, status_code=status, headers=headers)

    async def score(request: Any) -> Any:
        if not _allowed(request.headers.get("authorization"), config.token):
            return answer(401, {"error": "needs the header 'Authorization: Bearer TOKEN'"}, **{"www-authenticate": "Bearer"})
        if batcher.has_ended:
            return answer(503, {"error": ENDED})
        status, content = await _score(request, batcher, config)
        return answer(status, content, **({"retry-after": "1"} if status == 503 else {}))

    async def listed(request: Any) -> Any:
        if not _allowed(request.headers.get("authorization"), config.token):
            return responses.JSONResponse({"error": "needs the header 'Authorization: Bearer TOKEN'"}, status_code=401)
        served = {"rewards": [entry.name for entry in rewards], "scores_alone": [entry.name for entry in rewards if entry.is_alone]}
        return responses.JSONResponse({"protocol": wire.PROTOCOL, **served, "limits": asdict(config.limits)})

    async def alive(request: Any) -> Any:
        if batcher.has_ended:
            return responses.JSONResponse({"status": ENDED}, status_code=503)
        return responses.JSONResponse({"status": "alive"})

    async def ready(request: Any) -> Any:
        if batcher.has_ended:
            return responses.JSONResponse({"status": ENDED}, status_code=503)
        return responses.JSONResponse({"status": "full" if batcher.is_full else "ready"}, status_code=503 if batcher.is_full else 200)

    async def metrics(request: Any) -> Any:
        return responses.PlainTextResponse(_metrics(batcher.counts))

    routes: tuple[tuple[str, str, Callable[[Any], Awaitable[Any]]], ...] = (
        ("POST", wire.SCORE_PATH, score),
        ("GET", wire.REWARDS_PATH, listed),
        ("GET", "/healthz", alive),
        ("GET", "/readyz", ready),
        ("GET", "/metrics", metrics),
    )
    for method, path, function in routes:
        served.router.add_route(path, function, methods=[method])
    return served


def _tell_end(task: asyncio.Task[None]) -> None:
    _log.error(ENDED, exc_info=None if task.cancelled() else task.exception())


def _allowed(header: str | None, token: str | None) -> bool:
    return token is None or hmac.compare_digest((header or "").encode(), f"Bearer {token}".encode())


async def _score(request: Any, batcher: Batcher, config: ServeConfig) -> tuple[int, Any]:
    """Answer one request: a status and what to send."""
    # A web page may post to this machine, but not with this type unless it was allowed to.
    if request.headers.get("content-type", "").split(";")[0].strip() != wire.CONTENT_TYPE:
        return 415, {"error": f"needs content-type {wire.CONTENT_TYPE}"}
    try:
        body = await asyncio.wait_for(_body(request, config.limits.max_bytes), config.body_seconds)
        asked = wire.decode(body, config.limits)
        unknown = next((name for name in asked.rewards if name not in batcher.rewards), None)
        if unknown is not None:
            raise wire.Malformed(f"rewards: {unknown!r} is not served; there are {', '.join(batcher.rewards)}")
        reply = await batcher.submit(asked, hashlib.blake2b(body).digest())
    except _TooLarge:
        return 413, {"error": f"needs a body of at most {config.limits.max_bytes} bytes"}
    except TooMuch as error:
        return 413, {"error": str(error)}
    except QueueFull:
        return 503, {"error": "the queue is full; try again"}
    except DeadlinePassed:
        return 504, {"error": "not scored in the time the client waits"}
    except TimeoutError:
        return 408, {"error": f"the request did not arrive within {config.body_seconds:g} s"}
    except RewardFailed as error:
        return 500, {"error": str(error)}
    except ValueError as error:
        # A message may quote what was sent, even halves of characters, which no answer can hold.
        return 422, {"error": str(error)[:500].encode(errors="replace").decode()}
    return 200, asdict(reply)


class _TooLarge(Exception):
    pass


async def _body(request: Any, most: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise _TooLarge
    parts = bytearray()
    async for part in request.stream():
        parts += part
        if len(parts) > most:
            raise _TooLarge
    return bytes(parts)


def _metrics(counts: Counts) -> str:
    """Write the counts as Prometheus reads them."""
    lines = [f'flowalign_requests_total{{status="{status}"}} {count}' for status, count in sorted(counts.requests.items())]
    lines += [
        f"flowalign_images_total {counts.images}",
        f"flowalign_batches_total {counts.batches}",
        f"flowalign_repeated_requests_total {counts.repeated}",
        f"flowalign_score_seconds_total {counts.score_seconds:.6f}",
        f"flowalign_queued_images {counts.queued_images}",
        f"flowalign_queued_bytes {counts.queued_bytes}",
    ]
    return "\n".join(lines) + "\n"


def serve(types: Sequence[str], config: ServeConfig) -> None:
    """Serve rewards until stopped; the command ``flowalign serve-reward``.

    Raises:
        ImportError: If fastapi or uvicorn is missing, with the command that installs them.
        ConfigError: If the address cannot be listened on.
    """
    uvicorn = require("uvicorn", "serve")
    require("fastapi", "serve")
    with _bound(config.host, config.port) as listener:  # before the rewards are loaded, which may take minutes
        rewards = named_rewards(types, "serve-reward")
        server = uvicorn.Server(
            uvicorn.Config(
                app(rewards, config),
                log_level="warning",
                access_log=False,
                limit_concurrency=config.max_connections,
                timeout_keep_alive=30,
                server_header=False,
            )
        )
        listener.listen(config.max_connections)
        host = f"[{config.host}]" if ":" in config.host else config.host
        names = ", ".join(entry.name for entry in rewards)
        print(f"serving {names} on http://{host}:{listener.getsockname()[1]} (Ctrl-C stops)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def _bound(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"host, port: cannot listen on {host} port {port} ({error}); take another port, or 0 for any free one") from error
    return listener


def token_of(variable: str) -> str | None:
    """Read the token from an environment variable; None where it is not set."""
    return os.environ.get(variable) or None
