"""Scoring beside the rollout: who is given what and when, the same scores in the same order, and what is logged of it."""

import threading
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from flowalign import run
from flowalign.core.randomness import generator
from flowalign.rewards.plain import PlainReward
from flowalign.run_config import load_config
from flowalign.train import overlap
from flowalign.train.journal import read_log, status
from flowalign.train.overlap import Scorers, _union
from flowalign.train.scoring import NamedReward, score

CPU = torch.device("cpu")
IMAGES = torch.rand(6, 3, 4, 4, generator=generator(0))
PROMPTS = [f"prompt {i}" for i in range(6)]
RECORDS = [{"number": i} for i in range(6)]


def alone(function):
    function.scores_alone = True
    return NamedReward(name=function.__name__, reward=PlainReward(function))


def hand_over(scores, *parts):
    for rows in parts:
        scores.hand_over(torch.tensor(rows), IMAGES[rows], [PROMPTS[i] for i in rows], [RECORDS[i] for i in rows])


def test_parts_are_scored_while_the_next_are_sampled_and_the_rest_at_the_end():
    seen, first_is_done = [], threading.Event()

    def bright(prompts, images):
        seen.append(("bright", prompts))
        first_is_done.set()
        return images.mean((1, 2, 3))

    def relative(images):
        seen.append(("relative", len(images)))
        return images.mean((1, 2, 3)) - images.mean()

    rewards = [NamedReward(name="relative", reward=PlainReward(relative)), alone(bright)]
    expected = score(rewards, IMAGES, PROMPTS, RECORDS)
    seen.clear()
    first_is_done.clear()
    scores = Scorers(rewards, device=CPU).begin()
    hand_over(scores, [4, 1])
    assert first_is_done.wait(10)  # before the rest is there
    hand_over(scores, [0, 5], [3, 2])
    (table,), _ = scores.finish(IMAGES, PROMPTS, RECORDS)
    assert [what for name, what in seen if name == "bright"] == [
        ["prompt 4", "prompt 1"],
        ["prompt 0", "prompt 5"],
        ["prompt 3", "prompt 2"],
    ]
    assert [what for name, what in seen if name == "relative"] == [6]
    assert table.names == expected.names == ("relative", "bright")
    assert torch.equal(table.values, expected.values)


def test_clauses_and_columns_of_parts_are_joined_in_order():
    class Judge:
        scores_alone = True

        def __call__(self, images, prompts, metadata):
            numbers = torch.tensor([float(record["number"]) for record in metadata])
            from tests.train.brightness import Scores

            return Scores(values={"a": numbers, "b": -numbers}, clauses=numbers[:, None], clauses_valid=numbers[:, None] > 2)

    scores = Scorers([NamedReward(name="judge", reward=Judge())], device=CPU).begin()
    hand_over(scores, [5, 0], [2, 1, 3, 4])
    (table,), _ = scores.finish(IMAGES, PROMPTS, RECORDS)
    assert table.names == ("judge/a", "judge/b")
    assert table.values[:, 0].tolist() == table.clauses[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert table.clauses_valid[:, 0].tolist() == [False] * 3 + [True] * 3


def test_a_reward_elsewhere_is_asked_for_each_part_at_once_and_waited_for_at_the_end():
    sent, answer = [], threading.Event()

    class Far:
        scores_alone = True

        def submit(self, images, prompts, metadata):
            sent.append(len(images))
            return lambda: answer.wait(10) and images.mean((1, 2, 3))

    scores = Scorers([NamedReward(name="far", reward=Far())], device=CPU).begin()
    hand_over(scores, [1, 0, 2], [3, 4, 5])
    assert sent == [3, 3]
    answer.set()
    (table,), _ = scores.finish(IMAGES, PROMPTS, RECORDS)
    assert torch.allclose(table.values[:, 0], IMAGES.mean((1, 2, 3)).double())


def test_what_is_hidden_is_the_time_that_nobody_waited(monkeypatch):
    now, begun, waits = [0.0], threading.Event(), threading.Event()

    def read():
        told = now[0]
        if told == 6:  # the first look at the clock by whoever waits for the rest
            waits.set()
        return told

    def slow(images):
        if now[0] == 0:
            now[0] = 2.0
        else:
            begun.set()
            assert waits.wait(60)
            now[0] = 9.0
        return [0.0] * len(images)

    monkeypatch.setattr(overlap, "time", SimpleNamespace(perf_counter=read))
    scores = Scorers([alone(slow)], device=CPU).begin()
    hand_over(scores, [0, 1, 2])
    scores._found[0][0].result()
    now[0] = 5.0  # the next part was sampled meanwhile
    hand_over(scores, [3, 4, 5])
    assert begun.wait(60)
    now[0] = 6.0
    _, hidden = scores.finish(IMAGES, PROMPTS, RECORDS)
    assert hidden == (2 - 0) + (6 - 5)  # of the second part, which took from 5 to 9, what was over when waiting for it began
    assert _union([(3, 4), (0, 1), (0.5, 2), (4, 5)]) == [(0, 2), (3, 5)]


def test_a_value_that_is_not_finite_is_named_by_its_place_in_the_step():
    def broken(prompts, images):
        return [float("nan") if prompt == "prompt 1" else 0.0 for prompt in prompts]

    scores = Scorers([alone(broken)], device=CPU).begin()
    hand_over(scores, [4, 1, 5], [0, 2, 3])
    with pytest.raises(ValueError, match=r"reward 'broken': returned nan for sample 1 \(prompt 'prompt 1'\)"):
        scores.finish(IMAGES, PROMPTS, RECORDS)


def test_scoring_takes_one_core_of_those_that_sample_and_leaves_the_others_theirs():
    """Two teams of workers on the same cores put each other to sleep."""
    before = torch.get_num_threads()
    found = {}
    try:
        torch.set_num_threads(2)
        scores = Scorers([alone(lambda prompts, images: images.mean((1, 2, 3)))], device=CPU)
        scores._here.submit(lambda: found.update(scoring=torch.get_num_threads())).result()
        later = threading.Thread(target=lambda: found.update(later=torch.get_num_threads()))
        later.start()
        later.join()
        assert found == {"scoring": 1, "later": 2}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


calls = []


def counted(images):
    calls.append((len(images), threading.current_thread().name, torch.get_num_threads()))
    return images.mean((1, 2, 3))


counted.scores_alone = True


@pytest.mark.parametrize("algorithm", [{"type": "awm", "levels": "uniform"}, {"type": "flow_grpo", "depths": [1, 2]}])
def test_a_run_scores_its_rollout_in_parts_and_finds_what_it_finds_of_all_at_once(write_config, algorithm):
    rewards = [
        {"reward": "tests.train.test_overlap.counted"},
        {"reward": {"type": "shapes", "strict": 0.0}},
        {"reward": "tests.train.brightness"},
    ]
    train = {"groups": 2, "group_size": 4, "rollout_batch_size": 4, "micro_batch_size": 8, "learning_rate": 1e-2}
    path = write_config(rewards=rewards, train=train, algorithm=algorithm)
    trainer = run.build_trainer(load_config(str(path)), Accelerator())
    calls.clear()
    found = trainer.collect(0)
    sizes, threads, nums = zip(*calls, strict=True)
    assert len(sizes) > 1
    assert sum(sizes) == len(found.images)
    assert all(name.startswith("rewards") for name in threads)
    assert set(nums) == {1}
    texts = [prompt.text for prompt in trainer.draw(0) for _ in range(len(found.images) // 2)]
    records = [prompt.metadata for prompt in trainer.draw(0) for _ in range(len(found.images) // 2)]
    expected = score(trainer.rewards, found.images, texts, records)
    assert found.rewards.names == expected.names
    assert torch.equal(found.rewards.values, expected.values)


def test_what_is_only_measured_is_scored_beside_the_rollout_too(write_config):
    """Metrics keep the order of their columns, and a metric's clauses are not the rewards'."""
    calls.clear()
    metrics = ["novelty", {"reward": {"type": "shapes", "strict": 0.0}}, {"reward": "tests.train.test_overlap.counted"}]
    train = {"groups": 2, "group_size": 4, "rollout_batch_size": 4, "micro_batch_size": 8, "learning_rate": 1e-2}
    path = write_config(
        rewards=[{"reward": "tests.train.brightness"}], metrics=metrics, train=train, advantage={"type": "canon", "metric": 1}
    )
    trainer = run.build_trainer(load_config(str(path)), Accelerator())
    found = trainer.collect(0)
    assert [size for size, *_ in calls] == [4, 4]
    assert all(name.startswith("rewards") for _, name, _ in calls)
    assert found.metrics.names[0] == "novelty"
    assert torch.equal(found.metrics.values[:, 2], found.images.mean((1, 2, 3)).double())
    assert found.rewards.clauses is None


def test_what_a_student_makes_is_scored_while_it_makes_more(write_config):
    calls.clear()
    algorithm = {"type": "dmd2", "num_pairs": 16, "critic_updates": 1, "discriminator": {"taps": [0.5], "width": 8}}
    train = {"groups": 2, "group_size": 4, "rollout_batch_size": 4, "micro_batch_size": 8, "learning_rate": 1e-2}
    path = write_config(rewards=[{"reward": "tests.train.test_overlap.counted"}], train=train, algorithm=algorithm)
    trainer = run.build_trainer(load_config(str(path)), Accelerator())
    found = trainer.collect(0)
    assert [size for size, *_ in calls] == [4, 4]
    assert torch.equal(found.rewards.values[:, 0], found.images.mean((1, 2, 3)).double())
    torch.testing.assert_close(found.images, trainer.pipeline.decode(found.latents))


def test_the_hidden_time_is_logged_and_shown(write_config):
    path = write_config(steps=1, rewards=[{"reward": "tests.train.test_overlap.counted"}])
    run.train(str(path))
    (line,) = read_log(load_config(str(path)).output / "log.jsonl")
    assert line["time_s"]["reward_hidden"] >= 0
    line["time_s"] |= {"reward_hidden": 3.0, "reward": 1.0}
    assert "75% of scoring hidden" in status(line)
