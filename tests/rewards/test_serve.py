"""The reward server, over real sockets: the same scores as in the process, under load, and what it answers to bad requests."""

import asyncio
import contextlib
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
import uvicorn

from flowalign import shapes
from flowalign.config import ConfigError
from flowalign.rewards import diversity, remote, wire
from flowalign.rewards.http import Refused, Unavailable
from flowalign.rewards.plain import PlainReward
from flowalign.rewards.shapes import Config as Verifier
from flowalign.serve import ServeConfig, app, serve, token_of
from flowalign.train.overlap import Scorers
from flowalign.train.scoring import NamedReward, score
from tests.rewards.test_remote import HOSTILE


@contextlib.contextmanager
def serving(*rewards, **options):
    config = ServeConfig(**options)
    server = uvicorn.Server(uvicorn.Config(app(rewards, config), host="127.0.0.1", port=0, log_level="critical", lifespan="on"))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(5)


def plain(function, name="mine", **options):
    return NamedReward(name=name, reward=PlainReward(function), **options)


def code(prompts, images):
    """A number that belongs to this prompt and this image alone."""
    return [int(prompt) * 1000 + round(float(image.mean() * 255)) for prompt, image in zip(prompts, images, strict=True)]


code.scores_alone = True


class Held:
    """``code``, which waits until it is let go.

    Attributes:
        begun: Set once it is asked.
        gate: Lets it go.
        seen: The prompts that it was asked of.
    """

    def __init__(self):
        self.begun, self.gate, self.seen = threading.Event(), threading.Event(), []

    def __call__(self, prompts, images):
        self.seen.extend(prompts)
        self.begun.set()
        assert self.gate.wait(60)
        return code(prompts, images)


def answered(url, status):
    found = re.search(rf'status="{status}"}} (\d+)', get(url + "/metrics").text)
    return int(found[1]) if found else 0


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def body(num=1, size=4, start=0, **changes):
    images = torch.stack([torch.full((3, size, size), (start + i) % 256, dtype=torch.uint8) for i in range(num)])
    fields = {"request_id": f"{start}-{num}-{time.monotonic_ns()}", "images": images, "prompts": [str(start + i) for i in range(num)]}
    return wire.encode(wire.Request(**{**fields, "metadata": [{}] * num, **changes}))


@pytest.fixture(autouse=True, scope="module")
def client():
    """One client for all: making one costs more than most requests."""
    with httpx.Client(trust_env=False, timeout=90) as made:
        CLIENT.append(made)
        yield made


CLIENT = []


def post(url, data, **headers):
    return CLIENT[-1].post(url + wire.SCORE_PATH, content=data, headers={"content-type": wire.CONTENT_TYPE, **headers})


def get(url):
    return CLIENT[-1].get(url)


@pytest.fixture(scope="module")
def url():
    with serving(plain(code)) as url:
        yield url


def test_remote_scores_are_local_scores_clauses_included():
    records = shapes.prompts("heldout", seed=0, num=10)
    images = (shapes.render(records, seed=0) * 255).round() / 255
    local = NamedReward(name="shapes", reward=Verifier().build())
    with serving(local) as url:
        far = NamedReward(name="shapes", reward=remote.Config(servers=(url,), batch_size=3, deadline_s=20).build())
        texts = [record["prompt"] for record in records]
        found, wanted = (score([reward], images, texts, records) for reward in (far, local))
        assert torch.equal(found.values, wanted.values)
        assert torch.equal(found.clauses_valid, wanted.clauses_valid)
        assert torch.equal(found.clauses, wanted.clauses)


def test_five_hundred_requests_at_once_lose_and_mix_nothing(url):
    def ask(start):
        answer = post(url, body(num=1 + start % 3, size=4 + 4 * (start % 2), start=start))
        for _ in range(200):
            if answer.status_code != 503:
                break
            time.sleep(0.02)
            answer = post(url, body(num=1 + start % 3, size=4 + 4 * (start % 2), start=start))
        return start, answer.json()["scores"]["mine"]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(0, 1500, 3)))
    assert len(answers) == 500
    for start, scores in answers:
        assert scores == [(start + i) * 1000 + (start + i) % 256 for i in range(1 + start % 3)]
    counts = get(url + "/metrics").text
    batches = int(counts.split("flowalign_batches_total ")[1].split()[0])
    assert batches < 500  # requests were scored together


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bodies_get_a_refusal_and_the_server_lives_on(url, data):
    answer = post(url, data)
    assert answer.status_code == 422
    assert "Traceback" not in answer.text
    assert get(url + "/healthz").json() == {"status": "alive"}


def test_other_types_paths_and_sizes_are_refused(url):
    assert post(url, body(), **{"content-type": "application/json"}).status_code == 415
    assert get(url + "/v1/nothing").status_code == 404
    assert get(url + wire.SCORE_PATH).status_code == 405
    assert "is not served; there are mine" in post(url, body(rewards=("other",))).json()["error"]
    limits = wire.Limits(max_bytes=5000, max_images=3, max_side=16)
    with serving(plain(code), limits=limits) as small:
        assert post(small, body(num=40, size=8)).status_code == 413
        assert post(small, body(num=4)).status_code == 422
        assert post(small, body(size=17)).status_code == 422
        assert post(small, body(num=3)).status_code == 200

        def endless():
            for _ in range(100):
                yield b"x" * 1000

        assert post(small, endless()).status_code == 413


def test_the_server_says_what_it_serves(url):
    told = get(url + "/v1/rewards").json()
    assert (told["rewards"], told["scores_alone"]) == (["mine"], ["mine"])
    assert get(url + "/readyz").json() == {"status": "ready"}


def test_a_full_queue_asks_to_come_back_and_the_client_does():
    held = Held()

    with serving(plain(held), max_queue=4, max_batch=2, max_wait_ms=0) as url, ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(post, url, body(num=2, start=10 * i)) for i in range(6)]
        until(lambda: sum(answer.done() for answer in answers) >= 3)
        early = [answer.result() for answer in answers if answer.done()]
        assert {answer.status_code for answer in early} == {503}
        assert early[0].headers["retry-after"] == "1"
        assert get(url + "/readyz").status_code == 503
        patient = remote.Config(servers=(url,), batch_size=2, deadline_s=20).build()
        images = torch.tensor([5.0, 6.0]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4) / 255
        waiting = pool.submit(patient, images, ["5", "6"], [{}] * 2)
        until(lambda: answered(url, 503) >= 4)  # it too was asked to come back
        held.gate.set()
        assert waiting.result().values["reward"].tolist() == [5005, 6006]
        assert sorted(answer.result().status_code for answer in answers) == [200] * 3 + [503] * 3


def test_a_request_that_never_fits_is_told_so_at_once_and_not_sent_again():
    images = torch.zeros(6, 3, 4, 4)
    for options, said in (
        ({"max_queue": 5}, "6 images of 288 bytes"),
        ({"max_queue_bytes": 287}, "needed at most 1024 images and 287 bytes"),
    ):
        with serving(plain(code), **options) as url:
            assert post(url, body(num=6)).status_code == 413
            with pytest.raises(Refused, match=said):
                remote.Config(servers=(url,), deadline_s=20).build()(images, ["1"] * 6, [{}] * 6)
            assert 'status="413"} 2' in get(url + "/metrics").text  # asked once by each
            assert remote.Config(servers=(url,), batch_size=5).build()(images, ["1"] * 6, [{}] * 6).values["reward"].tolist() == [1000] * 6


def test_the_queue_is_bounded_in_bytes_too():
    held = Held()

    large = {"num": 1, "size": 8}  # 192 bytes
    with serving(plain(held), max_queue_bytes=400, max_batch=1, max_wait_ms=0) as url, ThreadPoolExecutor(4) as pool:
        first = pool.submit(post, url, body(start=1, **large))
        assert held.begun.wait(60)  # it is being scored and no longer waits
        waiting = [pool.submit(post, url, body(start=start, **large)) for start in (2, 3)]
        until(lambda: "flowalign_queued_bytes 384" in get(url + "/metrics").text)
        assert post(url, body(start=4, **large)).status_code == 503
        held.gate.set()
        assert [answer.result().status_code for answer in (first, *waiting)] == [200] * 3
        assert "flowalign_queued_bytes 0" in get(url + "/metrics").text
        assert post(url, body(start=4, **large)).status_code == 200


def test_deadlines_end_requests_and_free_the_queue():
    held = Held()

    with serving(plain(held), max_batch=1, max_wait_ms=0) as url, ThreadPoolExecutor(3) as pool:
        first = pool.submit(post, url, body(start=1))
        assert held.begun.wait(60)
        assert post(url, body(start=2, deadline_s=0.15)).status_code == 504
        held.gate.set()
        assert first.result().status_code == 200
        assert post(url, body(start=3)).status_code == 200
        assert held.seen == ["1", "3"]  # nobody waited for 2 any more


def test_a_request_that_nobody_waits_for_gives_its_place_to_the_next_at_once():
    held = Held()

    with serving(plain(held), max_queue=2, max_batch=2, max_wait_ms=0) as url, ThreadPoolExecutor(3) as pool:
        first = pool.submit(post, url, body(start=1))
        assert held.begun.wait(60)  # it is being scored, and its place is free
        assert post(url, body(num=2, start=2, deadline_s=0.1)).status_code == 504
        assert "flowalign_queued_images 0" in get(url + "/metrics").text
        last = pool.submit(post, url, body(num=2, start=4))
        until(lambda: "flowalign_queued_images 2" in get(url + "/metrics").text)
        assert not last.done()
        held.gate.set()
        assert (first.result().status_code, last.result().json()["scores"]) == (200, {"mine": [4004, 5005]})


def test_each_repetition_of_a_request_waits_by_its_own_deadline():
    held = Held()

    with serving(plain(held)) as url, ThreadPoolExecutor(2) as pool:
        data = body(start=7, deadline_s=3.0)
        first = pool.submit(post, url, data)
        assert held.begun.wait(60)
        assert post(url, data).status_code == 504
        assert first.result().status_code == 504
        held.gate.set()
        assert post(url, data).json()["scores"] == {"mine": [7007]}  # what was scored meanwhile is kept for it


def test_another_request_of_the_same_id_is_refused():
    with serving(plain(code)) as url:
        assert post(url, body(start=1, request_id="a")).json()["scores"] == {"mine": [1001]}
        other = post(url, body(start=2, request_id="a"))
        assert other.status_code == 422
        assert "another request came as 'a'" in other.json()["error"]
        assert post(url, body(start=1, request_id="a")).json()["scores"] == {"mine": [1001]}


def test_a_server_whose_queue_has_ended_says_so():
    def cancels(prompts, images):
        raise asyncio.CancelledError  # passes every `except Exception`

    with serving(plain(cancels)) as url:
        assert get(url + "/healthz").status_code == 200
        assert post(url, body(deadline_s=0.2)).status_code == 504
        for path in ("/healthz", "/readyz"):
            answer = get(url + path)
            assert answer.status_code == 503
            assert "scores no more" in answer.json()["status"]
        assert post(url, body()).status_code == 503


def test_an_answer_never_holds_half_a_character():
    def quotes(prompts, images):
        raise ValueError(f"refused: {prompts[0]}")

    with serving(plain(quotes)) as url:
        answer = post(url, body(prompts=["\ud800"]))
        assert (answer.status_code, answer.json()["error"]) == (422, "refused: ?")


def test_a_repeated_request_is_scored_once():
    seen = []

    def count(prompts, images):
        seen.extend(prompts)
        time.sleep(0.1)
        return code(prompts, images)

    with serving(plain(count)) as url, ThreadPoolExecutor(4) as pool:
        data = body(start=7)
        answers = [answer.json()["scores"] for answer in pool.map(lambda _: post(url, data), range(4))]
        assert answers == [{"mine": [7007.0]}] * 4
        assert post(url, data).json()["scores"] == {"mine": [7007.0]}
        assert seen == ["7"]


def test_one_clients_mistake_does_not_touch_the_others_of_its_batch():
    def picky(prompts, images):
        if any(prompt == "13" for prompt in prompts):
            raise ValueError("13 is refused")
        if any(prompt == "14" for prompt in prompts):
            raise RuntimeError("secret path")
        return code(prompts, images)

    picky.scores_alone = True
    with serving(plain(picky), max_wait_ms=100) as url, ThreadPoolExecutor(8) as pool:
        answers = dict(zip(range(11, 17), pool.map(lambda start: post(url, body(start=start)), range(11, 17)), strict=True))
    assert [answers[start].status_code for start in range(11, 17)] == [200, 200, 422, 500, 200, 200]
    assert "13 is refused" in answers[13].json()["error"]
    assert "secret" not in answers[14].text
    assert answers[15].json()["scores"]["mine"] == [15015]


def test_what_cannot_be_computed_is_null_and_infinity_an_error():
    with serving(plain(lambda prompts, images: [None] * len(prompts), may_skip=True)) as url:
        assert post(url, body(num=2)).json()["scores"]["mine"] == [None, None]
    with serving(plain(lambda prompts, images: [float("inf")] * len(prompts), may_skip=True)) as url:
        assert post(url, body()).status_code == 422


def over_its_prompt(images):
    """By how much an image is brighter than the mean of its call: a function that says nothing of itself."""
    bright = images.mean((1, 2, 3))
    return bright - bright.mean()


def test_a_reward_that_says_nothing_of_itself_sees_one_request_at_a_time():
    with serving(plain(over_its_prompt), max_wait_ms=50) as url, ThreadPoolExecutor(4) as pool:
        assert get(url + "/v1/rewards").json()["scores_alone"] == []
        pairs = list(pool.map(lambda start: post(url, body(num=2, start=start)), (0, 100, 200)))
        assert [pair.json()["scores"]["mine"] for pair in pairs] == [pytest.approx([-0.5 / 255, 0.5 / 255], abs=1e-6)] * 3


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_diversity_behind_a_server_equals_diversity_in_the_process(batch_size):
    images = (torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    prompts = list("abcabcaabbcb")
    local = NamedReward(name="diversity", reward=diversity.Config().build())
    wanted = score([local], images, prompts, [{}] * 12).values
    with serving(local) as url:
        far = NamedReward(name="diversity", reward=remote.Config(servers=(url,), batch_size=batch_size, deadline_s=20).build())
        assert torch.equal(score([far], images, prompts, [{}] * 12).values, wanted)
        # As in a run, whose rollout hands its images over in parts.
        scores = Scorers([far], device=torch.device("cpu")).begin()
        for rows in torch.randperm(12, generator=torch.Generator().manual_seed(1)).split(5):
            scores.hand_over(rows, images[rows], [prompts[row] for row in rows.tolist()], [{}] * len(rows))
        (table,), _ = scores.finish(images, prompts, [{}] * 12)
        assert torch.equal(table.values, wanted)


def test_rewards_that_compare_images_see_one_client_at_a_time():
    entry = NamedReward(name="diversity", reward=diversity.Config().build())
    with serving(entry, max_wait_ms=50) as url, ThreadPoolExecutor(4) as pool:
        pairs = list(pool.map(lambda start: post(url, body(num=2, start=start, prompts=["a", "a"])), (0, 100, 200)))
        assert [pair.json()["scores"]["diversity"] for pair in pairs] == [pytest.approx([1 / 255] * 2, abs=1e-4)] * 3


def test_a_token_is_asked_for_and_needed_away_from_this_machine(monkeypatch):
    token = "0123456789abcdef"
    with serving(plain(code), token=token) as url:
        assert post(url, body()).status_code == 401
        assert post(url, body(), authorization="Bearer wrong").status_code == 401
        assert get(url + "/v1/rewards").status_code == 401
        assert post(url, body(), authorization=f"Bearer {token}").status_code == 200
        images = torch.zeros(1, 3, 4, 4)
        with pytest.raises(Refused, match="401"):
            remote.Config(servers=(url,)).build()(images, ["1"], [{}])
        monkeypatch.setenv("FLOWALIGN_REWARD_TOKEN", token)
        assert token_of("FLOWALIGN_REWARD_TOKEN") == token
        assert remote.Config(servers=(url,)).build()(images, ["1"], [{}]).values["reward"].tolist() == [1000]
    with pytest.raises(ConfigError, match="can be reached from elsewhere; set a token"):
        ServeConfig(host="0.0.0.0")
    with pytest.raises(ConfigError, match="at least 16 characters"):
        ServeConfig(token="short")


def test_a_server_killed_in_the_middle_is_noticed_within_the_deadline():
    with serving(plain(code)) as url:
        reward = remote.Config(servers=(url,), deadline_s=1.0).build()
        assert reward(torch.zeros(1, 3, 4, 4), ["1"], [{}]).values["reward"].tolist() == [1000]
    began = time.monotonic()
    with pytest.raises(Unavailable):
        reward(torch.zeros(1, 3, 4, 4), ["1"], [{}])
    assert time.monotonic() - began < 2


def test_a_slow_body_is_cut_off():
    with serving(plain(code), body_seconds=0.2) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(
                f"POST {wire.SCORE_PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: {wire.CONTENT_TYPE}\r\ncontent-length: 999\r\n\r\nab".encode()
            )
            assert b" 408 " in connection.recv(1000)


def test_the_command_listens_before_it_says_where(monkeypatch, capsys):
    def run(server, sockets):
        told = capsys.readouterr().out
        address, port = sockets[0].getsockname()
        assert port > 0
        assert f"serving jpeg_size on http://127.0.0.1:{port} " in told
        with socket.create_connection((address, port), timeout=5):
            pass
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port} .*take another port"):
            serve(["jpeg_size"], ServeConfig(port=port))

    monkeypatch.setattr(uvicorn.Server, "run", run)
    serve(["jpeg_size"], ServeConfig(port=0))
    for port in (-1, 99999):
        with pytest.raises(ConfigError, match=f"port: got {port}, needed 0 to 65535"):
            ServeConfig(port=port)


def test_the_command_needs_its_packages(monkeypatch):
    import flowalign.serve as module

    def missing(package, extra=None):
        raise ImportError(f"{package} is not installed; run: pip install 'flowalign-diffusion[{extra}]'")

    monkeypatch.setattr(module, "require", missing)
    with pytest.raises(ImportError, match=r"pip install 'flowalign-diffusion\[serve\]'"):
        module.serve(["jpeg_size"], ServeConfig())
