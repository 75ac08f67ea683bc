"""The client of reward servers against peers that die, hang, drip, flood, lie and refuse; and judges that answer nonsense."""

import json
import math
import time
import warnings

import pytest
import torch
from safetensors.torch import load

from flowalign.rewards import remote, vlm_judge, wire
from flowalign.rewards.http import Refused, Unavailable
from flowalign.train.scoring import NamedReward, score
from tests.rewards import peers

IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WANTED = ((IMAGES * 255).round() / 1).double().mean((1, 2, 3)).tolist()
PROMPTS = list("abcde")
RECORDS = [{"n": i} for i in range(5)]


PATIENT = 20.0  # seconds: where an answer comes, a busy machine may take its time
SOON = 0.6  # where none comes, and it is waited for


def client(*servers, **options):
    reward = remote.Config(servers=servers, **{"deadline_s": PATIENT, "batch_size": 2, **options}).build()
    reward.client.first_delay_s = 0.01
    return reward


def test_scores_come_back_in_the_order_of_the_images():
    with peers.peer(peers.right) as (url, calls):
        found = client(url, batch_size=2)(IMAGES, PROMPTS, RECORDS)
        assert found.values["reward"].tolist() == pytest.approx(WANTED)
        assert len(calls) == 3


def test_images_of_a_prompt_are_sent_together_unless_the_server_or_the_config_says_otherwise():
    prompts = list("ababa")
    for alone, said, sizes in ((False, None, [3, 2]), (True, None, [2, 2, 1]), (False, True, [2, 2, 1]), (True, False, [3, 2])):
        with peers.peer(peers.right, alone=alone) as (url, calls):
            reward = client(url, batch_size=2, concurrency=1, scores_alone=said)
            assert reward(IMAGES, prompts, RECORDS).values["reward"].tolist() == pytest.approx(WANTED)
            sent = [wire.decode(body, wire.Limits()) for body in calls]
            assert [len(request.images) for request in sent] == sizes
            assert NamedReward(name="r", reward=reward).is_alone == (len(sizes) == 3)
            if len(sizes) == 2:
                assert [request.prompts for request in sent] == [["a"] * 3, ["b"] * 2]
                assert [record["n"] for record in sent[0].metadata] == [0, 2, 4]


@pytest.mark.parametrize("listing", [[], {"rewards": "mean"}, {"rewards": ["mean"], "scores_alone": 1}, {}])
def test_a_listing_that_is_none_is_refused(listing):
    with pytest.raises(wire.Malformed, match="no listing"):
        wire.read_listing(listing, None)


def test_what_a_server_does_not_say_to_score_each_image_by_itself_does_not():
    assert not wire.read_listing({"rewards": ["a"]}, None)
    assert not wire.read_listing({"rewards": ["a", "b"], "scores_alone": ["a"]}, None)
    assert wire.read_listing({"rewards": ["a", "b"], "scores_alone": ["a"]}, "a")
    assert not wire.read_listing({"rewards": ["a", "b"], "scores_alone": ["a"]}, "b")


PASSING = {
    "dies": peers.dies,
    "busy": peers.status(503, retry_after="0"),
    "gateway": peers.status(502),
    "broken": peers.status(500),
    "short": peers.lies(lambda reply: {**reply, "scores": {"mean": reply["scores"]["mean"][:-1]}}),
    "nan": peers.lies(lambda reply: json.dumps({**reply, "scores": {"mean": [math.nan] * 5}}).encode()),
    "text": peers.lies(lambda reply: {**reply, "scores": {"mean": ["7"] * 5}}),
    "true": peers.lies(lambda reply: {**reply, "scores": {"mean": [True] * 5}}),
    "other request": peers.lies(lambda reply: {**reply, "request_id": "x"}),
    "not json": peers.lies(lambda reply: b"\x80\x04cos\nsystem\n"),
    "list": peers.lies(lambda reply: [reply]),
    "deep": peers.lies(lambda reply: b"[" * 200_000),
    "huge": peers.lies(lambda reply: {**reply, "scores": {"mean": [10**400] * 5}}),
    "huge clause": peers.lies(lambda reply: {**reply, "clauses": [[10**400]] * 5, "clauses_valid": [[True]] * 5}),
    "clauses": peers.lies(lambda reply: {**reply, "clauses": [[1.0]], "clauses_valid": [[True]]}),
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_costs_a_repetition_and_no_score(fault):
    with peers.peer(PASSING[fault], peers.right) as (url, calls):
        found = client(url, batch_size=5)(IMAGES, PROMPTS, RECORDS)
        assert found.values["reward"].tolist() == pytest.approx(WANTED)
        assert len(calls) == 2
        assert calls[0] == calls[1]  # the same request id: a server scores it once


@pytest.mark.parametrize(
    "fault",
    [
        peers.dies,
        peers.hangs,
        peers.drips,
        peers.drips_headers,
        peers.floods,
        PASSING["nan"],
        PASSING["short"],
        PASSING["busy"],
        peers.status(401),
        peers.status(404),
        peers.status(413),
    ],
)
def test_a_lasting_fault_fails_over_to_the_next_server_which_then_stays_the_first(fault):
    with peers.peer(fault) as (bad, first), peers.peer(peers.right) as (good, second):
        reward = client(bad, good, batch_size=5, deadline_s=4.0)  # of which the first gets half
        assert reward(IMAGES, PROMPTS, RECORDS).values["reward"].tolist() == pytest.approx(WANTED)
        assert reward(IMAGES, PROMPTS, RECORDS).values["reward"].tolist() == pytest.approx(WANTED)
        assert (len(first), len(second)) == (1, 2)


@pytest.mark.parametrize(
    "fault", [peers.dies, peers.hangs, peers.drips, peers.drips_headers, peers.floods, PASSING["nan"], peers.status(503)]
)
def test_a_lasting_fault_of_all_servers_stops_within_the_deadline_and_says_why(fault):
    with peers.peer(fault) as (url, _):
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"no answer within 0.6 s after \d+ attempts .*127.0.0.1"):
            client(url, batch_size=5, deadline_s=SOON)(IMAGES, PROMPTS, RECORDS)
        assert time.monotonic() - began < SOON + 1


def test_no_server_at_all_stops_the_run_or_marks_samples_as_configured():
    with pytest.raises(ConnectionError, match="ConnectError"):
        client("http://127.0.0.1:9", deadline_s=0.2)(IMAGES, PROMPTS, RECORDS)
    reward = client("http://127.0.0.1:9", deadline_s=0.2, on_failure="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = score([NamedReward(name="r", reward=reward, may_skip=True)], IMAGES, PROMPTS, RECORDS)
        with pytest.raises(ValueError, match="may_skip"):
            score([NamedReward(name="r", reward=reward)], IMAGES, PROMPTS, RECORDS)
    assert bool(torch.isnan(table.values).all())


def test_a_server_that_refuses_the_request_is_not_asked_again():
    with peers.peer(lambda handler, body: (422, {"error": "prompts: no"})) as (url, calls):
        with pytest.raises(Refused, match="refused the request: .*status 422: .*prompts: no"):
            client(url, batch_size=5)(IMAGES, PROMPTS, RECORDS)
        assert len(calls) == 1


def test_a_request_is_refused_when_all_servers_have_refused_it_and_each_is_asked_once():
    with peers.peer(peers.status(401)) as (one, first), peers.peer(peers.status(422)) as (two, second):
        with pytest.raises(Refused, match=r"status 401.*status 422"):
            client(one, two, batch_size=5)(IMAGES, PROMPTS, RECORDS)
        assert (len(first), len(second)) == (1, 1)


def test_clients_that_are_sent_away_together_do_not_come_back_together(monkeypatch):
    slept = []
    monkeypatch.setattr("flowalign.rewards.http.time.sleep", slept.append)
    with peers.peer(*[peers.status(503, retry_after="1")] * 3, peers.right) as (url, _):
        reward = client(url, batch_size=5, deadline_s=30.0)
        reward.client.first_delay_s = 0.1
        reward(IMAGES, PROMPTS, RECORDS)
    waits = [wait for wait in slept if wait >= 1]  # the peer sleeps by the same function
    assert len(waits) == 3
    assert len(set(waits)) == 3


def test_one_of_several_rewards_is_asked_for_by_name():
    both = peers.lies(lambda reply: {**reply, "scores": {**reply["scores"], "other": [1.0] * 5}})
    with peers.peer(both) as (url, calls):
        assert client(url, batch_size=5, reward="mean")(IMAGES, PROMPTS, RECORDS).values["reward"].tolist() == pytest.approx(WANTED)
        assert wire.decode(calls[0], wire.Limits()).rewards == ["mean"]
        with pytest.raises(Unavailable, match="needed exactly one reward"):
            client(url, batch_size=5, deadline_s=SOON)(IMAGES, PROMPTS, RECORDS)


def test_waiting_is_the_callers_choice():
    with peers.peer(lambda handler, body: time.sleep(0.2) or peers.right(handler, body)) as (url, _):
        began = time.monotonic()
        pending = client(url, batch_size=5, deadline_s=5)(IMAGES, PROMPTS, RECORDS) and client(url, deadline_s=5).submit(
            IMAGES, PROMPTS, RECORDS
        )
        begun = time.monotonic()
        assert begun - began >= 0.2
        assert pending().values["reward"].tolist() == pytest.approx(WANTED)
        assert time.monotonic() - begun >= 0.1


def test_addresses_that_are_none_are_refused():
    with pytest.raises(ValueError, match="needed addresses such as"):
        remote.Config(servers=("127.0.0.1:8100",))
    with pytest.raises(ValueError, match="servers"):
        remote.Config(servers=())


# -- judges ---------------------------------------------------------------------------------------------------------------------------


def says(*texts):
    def make(text):
        return lambda handler, body: (200, {"choices": [{"message": {"content": text}}]})

    return [make(text) for text in texts]


def judge(url, **options):
    return vlm_judge.Config(model="m", url=url + "/v1", **{"deadline_s": PATIENT, "concurrency": 1, **options}).build()


def test_a_judge_is_asked_with_the_image_and_its_rating_scaled():
    with peers.peer(*says('{"score": 5}', '{"score": 1}', '```json\n{"score": 3.5}\n```')) as (url, calls):
        assert judge(url)(IMAGES[:3], ["a dog", "b", "c"], RECORDS[:3]).tolist() == [1, 0, 0.625]
        body = json.loads(calls[0])
        image, text = body["messages"][0]["content"]
        assert image["image_url"]["url"].startswith("data:image/png;base64,")
        assert "a dog" in text["text"]
        assert (body["temperature"], body["model"]) == (0, "m")
        assert body["response_format"]["json_schema"]["schema"]["required"] == ["score"]


NONSENSE = [
    "",
    "great!",
    "5",
    '{"score": 45}',
    '{"score": "5"}',
    '{"score": true}',
    '{"score": null}',
    '{"scor": 3}',
    "[]",
    '{"score": NaN}',
    '{"score": ' + "[" * 200_000 + "}",
    None,
]


@pytest.mark.parametrize("text", NONSENSE, ids=lambda text: str(text)[:20])
def test_nonsense_is_invalid_and_never_a_score(text):
    with peers.peer(*says(text)) as (url, _):
        assert math.isnan(judge(url, max_invalid=1.0)(IMAGES[:1], ["a"], RECORDS[:1]).item())
        with pytest.raises(ValueError, match=r"1 of the last 1 answers cannot be read .*check model and question"):
            judge(url)(IMAGES[:1], ["a"], RECORDS[:1])


def test_the_openai_token_is_not_sent_in_the_clear_unless_it_is_named(monkeypatch):
    def sent(**options):
        return vlm_judge.Config(model="m", **options).build().client.token

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert [sent(url=url) for url in ("https://api.openai.com/v1", "http://127.0.0.1:8000/v1", "http://localhost/v1")] == ["secret"] * 3
    for url in ("http://10.0.0.2:8000/v1", "http://localhost.example.org/v1"):
        with pytest.warns(UserWarning, match=f"OPENAI_API_KEY is not sent to {url}"):
            assert sent(url=url) is None
    monkeypatch.setenv("MINE", "other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sent(url="http://10.0.0.2/v1", token_variable="OPENAI_API_KEY") == "secret"
        assert sent(url="http://10.0.0.2/v1", token_variable="MINE") == "other"
        monkeypatch.delenv("OPENAI_API_KEY")
        assert sent(url="http://10.0.0.2/v1") is None


def test_unreadable_answers_are_counted_over_calls():
    good, bad = says('{"score": 3}', "what?")
    told = [good] * 8 + [bad] * 2 + [good] * 10 + [bad] * 3
    with peers.peer(*told) as (url, _):
        reward = judge(url, max_invalid=0.2, window=10)
        found = [
            reward(IMAGES[:1], ["a"], RECORDS[:1]).item() for _ in range(len(told) - 1)
        ]  # one bad answer of a call of one is no reason
        assert [math.isnan(value) for value in found] == [False] * 8 + [True] * 2 + [False] * 10 + [True] * 2
        with pytest.raises(ValueError, match=r"3 of the last 10 answers cannot be read .* for example .*what\?"):
            reward(IMAGES[:1], ["a"], RECORDS[:1])
    with peers.peer(good, bad, bad, bad, good) as (url, _), pytest.raises(ValueError, match="3 of the last 5 answers"):
        judge(url, max_invalid=0.5, window=1)(IMAGES, PROMPTS, RECORDS)  # a call counts whole
    with pytest.raises(ValueError, match="window and concurrency of at least 1"):
        vlm_judge.Config(model="m", window=0)


def test_braces_in_questions_and_prompts_are_text():
    prompt = "a sign that says {low} and {prompt}, {0} {"
    for question, asked in (
        (None, 'Answer with JSON only: {"score": N}, where N is a number from 1 (bad) to 5 (perfect).'),
        ('{prompt}? As {"score": N, "why": {}}, {low} to {high}', prompt + '? As {"score": N, "why": {}}, 1 to 5'),
    ):
        with peers.peer(*says('{"score": 3}')) as (url, calls):
            assert judge(url, question=question)(IMAGES[:1], [prompt], RECORDS[:1]).item() == 0.5
            text = json.loads(calls[0])["messages"][0]["content"][1]["text"]
            assert prompt in text
            assert text.endswith(asked)


def test_yes_is_weighed_against_no_over_all_spellings():
    def answer(handler, body):
        assert json.loads(body)["top_logprobs"] == 20
        tokens = [("Yes", math.log(0.5)), (" yes", math.log(0.1)), ("No", math.log(0.2)), ("maybe", math.log(0.2))]
        return 200, {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": t, "logprob": p} for t, p in tokens]}]}}]}

    with peers.peer(answer) as (url, _):
        assert judge(url, answer="yes_no")(IMAGES[:1], ["a"], RECORDS[:1]).item() == pytest.approx(0.75)
    with peers.peer(*says("yes")) as (url, _):
        assert math.isnan(judge(url, answer="yes_no", max_invalid=1.0)(IMAGES[:1], ["a"], RECORDS[:1]).item())


def test_a_judge_that_is_down_is_an_error_and_no_score():
    with pytest.raises(Unavailable):
        judge("http://127.0.0.1:9", deadline_s=0.2)(IMAGES[:1], ["a"], RECORDS[:1])
    with peers.peer(lambda handler, body: (200, {"error": "x"})) as (url, _), pytest.raises(Unavailable, match="no completion"):
        judge(url, deadline_s=0.2)(IMAGES[:1], ["a"], RECORDS[:1])
    with pytest.raises(ValueError, match="the prompt of sample 0 is empty"):
        judge("http://127.0.0.1:9")(IMAGES[:1], [" "], RECORDS[:1])
    with pytest.raises(ValueError, match=r"needed \{prompt\} in it"):
        vlm_judge.Config(model="m", question="good?")


# -- wire -----------------------------------------------------------------------------------------------------------------------------


def request(**changes):
    images = (IMAGES * 255).round().to(torch.uint8)
    return wire.Request(**{"request_id": "r", "images": images, "prompts": PROMPTS, "metadata": RECORDS, "deadline_s": 2.0, **changes})


def test_a_request_comes_through_bit_for_bit():
    sent = request(rewards=("a",), prompts=["\u7ea2", *PROMPTS[1:]])
    found = wire.decode(wire.encode(sent), wire.Limits())
    assert torch.equal(found.images, sent.images)
    assert torch.equal(load(wire.encode(sent))["images"], sent.images)  # safetensors, whoever reads it
    assert (found.prompts, found.metadata, found.rewards, found.deadline_s) == (list(sent.prompts), RECORDS, ["a"], 2.0)


def test_encoding_takes_less_than_a_millisecond_an_image():
    sent = request(images=torch.zeros(16, 3, 512, 512, dtype=torch.uint8), prompts=["a"] * 16, metadata=[{}] * 16)
    wire.encode(sent)
    times = []
    for _ in range(5):
        began = time.process_time()
        wire.encode(sent)
        times.append((time.process_time() - began) / 16)
    assert min(times) < 1e-3


def forged(header, data=b""):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + data


GOOD = {"dtype": "U8", "shape": [1, 3, 2, 2], "data_offsets": [0, 12]}
ASKED = {"protocol": 1, "request_id": "r", "prompts": ["a"], "metadata": [{}], "rewards": [], "deadline_s": 1}
HOSTILE = {
    "empty": b"",
    "pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "huge header": (2**62).to_bytes(8, "little") + b"{}",
    "no json": forged(b"not json"),
    "deep json": forged(b"[" * 500_000),
    "no images": forged({"__metadata__": {"request": json.dumps(ASKED)}}),
    "two tensors": forged({"images": GOOD, "more": GOOD, "__metadata__": {"request": json.dumps(ASKED)}}, bytes(12)),
    "floats": forged({"images": {**GOOD, "dtype": "F32"}, "__metadata__": {"request": json.dumps(ASKED)}}, bytes(48)),
    "huge shape": forged({"images": {**GOOD, "shape": [2**40, 3, 2**40, 2]}, "__metadata__": {"request": json.dumps(ASKED)}}, bytes(12)),
    "many": forged(
        {"images": {**GOOD, "shape": [1000, 3, 1, 1], "data_offsets": [0, 3000]}, "__metadata__": {"request": "{}"}}, bytes(3000)
    ),
    "negative": forged({"images": {**GOOD, "shape": [-1, 3, -2, 2]}, "__metadata__": {"request": json.dumps(ASKED)}}, bytes(12)),
    "true": forged({"images": {**GOOD, "shape": [True, 3, 2, 2]}, "__metadata__": {"request": json.dumps(ASKED)}}, bytes(12)),
    "short data": forged({"images": GOOD, "__metadata__": {"request": json.dumps(ASKED)}}, bytes(11)),
    "offsets": forged({"images": {**GOOD, "data_offsets": [4, 16]}, "__metadata__": {"request": json.dumps(ASKED)}}, bytes(12)),
    **{
        f"bad {name}": forged({"images": GOOD, "__metadata__": {"request": json.dumps({**ASKED, name: value})}}, bytes(12))
        for name, value in {
            "protocol": 2,
            "prompts": ["a", "b"],
            "metadata": ["x"],
            "rewards": "all",
            "request_id": "",
            "deadline_s": "never",
        }.items()
    },
    **{
        f"{kind} in the id": forged({"images": GOOD, "__metadata__": {"request": json.dumps({**ASKED, "request_id": text})}}, bytes(12))
        for kind, text in {"half a character": "a\ud800", "line break": "a\nb", "letter beyond ASCII": "\u00e9"}.items()
    },
    "long id": forged({"images": GOOD, "__metadata__": {"request": json.dumps({**ASKED, "request_id": "a" * 101})}}, bytes(12)),
    "long prompt": forged({"images": GOOD, "__metadata__": {"request": json.dumps({**ASKED, "prompts": ["a" * 10_001]})}}, bytes(12)),
    "many times the same": forged(
        {"images": GOOD, "__metadata__": {"request": json.dumps({**ASKED, "rewards": ["mean"] * 1000})}}, bytes(12)
    ),
    "huge deadline": forged({"images": GOOD, "__metadata__": {"request": json.dumps({**ASKED, "deadline_s": 10**400})}}, bytes(12)),
    "endless deadline": forged({"images": GOOD, "__metadata__": {"request": json.dumps({**ASKED, "deadline_s": math.inf})}}, bytes(12)),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bodies_are_refused_before_anything_is_allocated(body):
    with pytest.raises(wire.Malformed):
        wire.decode(body, wire.Limits())


def test_the_forged_body_is_good_but_for_what_was_changed():
    assert wire.decode(forged({"images": GOOD, "__metadata__": {"request": json.dumps(ASKED)}}, bytes(12)), wire.Limits()).prompts == ["a"]
    with pytest.raises(wire.Malformed, match="bytes, needed at most"):
        wire.decode(wire.encode(request()), wire.Limits(max_bytes=100))
