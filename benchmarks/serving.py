"""A reward server under load, and what faulty peers do to a client and hostile ones to a server: the two tables of docs/rewards.md.

    python -m benchmarks.serving

The server is a process of its own; the clients are threads of this one, so that on few cores both share them.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import torch
from torch import Tensor

from flowalign.env import hardware
from flowalign.rewards import remote, wire
from flowalign.rewards.http import Client
from tests.rewards import peers
from tests.rewards.test_remote import HOSTILE, PASSING

REQUESTS, CLIENTS, SIDE = 500, 16, 64
DEADLINE_S = 1.0  # of a client that meets a faulty peer
FAULTS = {
    "killed while it answers": peers.dies,
    "hanging": peers.hangs,
    "slow: a byte at a time": peers.drips,
    "slow: a header at a time": peers.drips_headers,
    "lying: too few scores": PASSING["short"],
    "lying: NaN": PASSING["nan"],
    "lying: another request's scores": PASSING["other request"],
    "hostile: a pickle for an answer": PASSING["not json"],
    "hostile: an endless answer": peers.floods,
    "hostile: JSON without end in depth": PASSING["deep"],
    "overloaded (503)": peers.status(503),
    "broken (500)": peers.status(500),
    "refusing (401)": peers.status(401),
}


def marked(prompts: Sequence[str], images: Tensor) -> list[float]:
    """Score an image by a number that belongs to it and its prompt alone: a wrong pairing shows."""
    return [int(prompt) * 1000 + round(float(image.mean() * 255)) for prompt, image in zip(prompts, images, strict=True)]


marked.scores_alone = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def server() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Serve ``marked`` in a process of its own: its address and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "flowalign", "serve-reward", "benchmarks.serving.marked", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(url + "/healthz", trust_env=False)
                break
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit("the server did not start")
            time.sleep(0.1)
        yield url, process
    finally:
        process.kill()
        process.wait()


def request(start: int, num: int, side: int = SIDE) -> wire.Request:
    """Make a request of images that are told apart by their brightness, and prompts by their number."""
    images = torch.stack([torch.full((3, side, side), (start + i) % 256, dtype=torch.uint8) for i in range(num)])
    prompts = [str(start + i) for i in range(num)]
    return wire.Request(request_id=f"{start}-{num}", images=images, prompts=prompts, metadata=[{}] * num, deadline_s=60.0)


def under_load(url: str) -> str:
    """Send many small requests at once and say how long they took; ends the command where one is lost or has another's scores."""
    client = Client(servers=(url,), where="load", deadline_s=60.0)

    def ask(number: int) -> tuple[float, bool]:
        asked = request(3 * number, 1 + number % 3)
        began = time.perf_counter()
        answer = client.post(wire.SCORE_PATH, wire.encode(asked), wire.CONTENT_TYPE)
        _, values, _ = wire.read_reply(answer.json(), asked.request_id, None, len(asked.images))
        wanted = [(3 * number + i) * 1000 + (3 * number + i) % 256 for i in range(len(values))]
        return time.perf_counter() - began, values == wanted

    began = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(ask, range(REQUESTS)))
    took = time.perf_counter() - began
    wrong = sum(not right for _, right in found)
    images = sum(1 + number % 3 for number in range(REQUESTS))
    counts = dict(line.split() for line in httpx.get(url + "/metrics", trust_env=False).text.splitlines())
    if wrong or len(found) < REQUESTS:
        raise SystemExit(f"{wrong} of {REQUESTS} requests have another's scores")
    times = sorted(1000 * seconds for seconds, _ in found)
    return (
        f"{REQUESTS} requests of {images} images of {SIDE} px from {CLIENTS} clients at once: {took:.2f} s, {REQUESTS / took:.0f} requests/s, "
        f"{images / took:.0f} images/s; none lost, none mixed up. A request took {statistics.median(times):.0f} ms (median), {times[int(0.99 * REQUESTS)]:.0f} ms (99 %), "
        f"{times[-1]:.0f} ms (longest); the server scored them in {counts['flowalign_batches_total']} batches."
    )


def told(ask: Callable[[], list[float]], wanted: list[float]) -> str:
    """Run a client and say what came of it and after how long."""
    began = time.perf_counter()
    try:
        found = "right scores" if ask() == wanted else "WRONG SCORES"
    except (ConnectionError, ValueError) as error:
        found = f"{type(error).__name__}, run stops with its state saved"
    return f"{found}, {time.perf_counter() - began:.2f} s"


def against_faults() -> list[tuple[str, str, str]]:
    """Ask each faulty peer alone, and before a good one."""
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = images, list("abcde"), [{}] * 5
    with peers.peer(peers.right) as (good, _):

        def scores(*servers: str) -> Callable[[], list[float]]:
            reward = remote.Config(servers=servers, deadline_s=DEADLINE_S, scores_alone=True).build()
            return lambda: reward(*asked).values["reward"].tolist()

        wanted = scores(good)()
        rows = []
        for name, fault in FAULTS.items():
            with peers.peer(fault) as (bad, _):
                rows.append((name, told(scores(bad), wanted), told(scores(bad, good), wanted)))
        gone = "http://127.0.0.1:9"
        rows.insert(0, ("not there", told(scores(gone), wanted), told(scores(gone, good), wanted)))
    return rows


def killed() -> tuple[str, str, str]:
    """Kill a real server between two requests."""
    images, prompts = torch.zeros(2, 3, 8, 8), ["1", "2"]
    wanted = [1000.0, 2000.0]
    with server() as (url, process), server() as (other, _):
        alone = remote.Config(servers=(url,), deadline_s=DEADLINE_S).build()
        both = remote.Config(servers=(url, other), deadline_s=DEADLINE_S).build()
        for reward in (alone, both):
            assert reward(images, prompts, [{}] * 2).values["reward"].tolist() == wanted
        process.send_signal(signal.SIGKILL)
        process.wait()
        ask = [lambda r=reward: r(images, prompts, [{}] * 2).values["reward"].tolist() for reward in (alone, both)]
        return "killed (SIGKILL) after a request", told(ask[0], wanted), told(ask[1], wanted)


def hostile(url: str) -> str:
    """Send what no client sends and say what the server answers."""
    with httpx.Client(trust_env=False, timeout=20) as client:
        headers = {"content-type": wire.CONTENT_TYPE}
        found = Counter(client.post(url + wire.SCORE_PATH, content=body, headers=headers).status_code for body in HOSTILE.values())
        huge = client.post(url + wire.SCORE_PATH, content=b"x" * (wire.Limits().max_bytes + 1), headers=headers).status_code
        alive = client.get(url + "/healthz").json()["status"]
        good = client.post(url + wire.SCORE_PATH, content=wire.encode(request(7, 1)), headers=headers).json()["scores"]
    answered = ", ".join(f"{count} times {status}" for status, count in sorted(found.items()))
    return f"{len(HOSTILE)} hostile bodies ({', '.join(list(HOSTILE)[:6])}, ...): {answered}; a body too large: {huge}. Then: {alive}, scores {good}."


def main() -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")
    print(hardware())
    with server() as (url, _):
        print(f"\n{under_load(url)}\n{hostile(url)}\n")
    print(f"| peer | alone, deadline {DEADLINE_S:g} s | before a good server |\n|---|---|---|")
    for row in [*against_faults(), killed()]:
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
