"""Several tests, and several training seeds."""

import math

import pytest
import torch

from flowalign.core.randomness import generator
from flowalign.evaluate.records import Evaluation, Record
from flowalign.evaluate.scores import Interval
from flowalign.evaluate.statistics import holm, paired_difference, seed_difference_interval, seed_interval
from flowalign.evaluate.verdicts import seed_gains, verdict, verdict_over_seeds


def test_holm_is_the_published_procedure():
    assert holm({"a": 0.005, "b": 0.03, "c": 0.04, "d": 0.01}) == pytest.approx({"a": 0.02, "b": 0.06, "c": 0.06, "d": 0.03})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}
    with pytest.raises(ValueError, match="p_values: b: got 1.2"):
        holm({"a": 0.1, "b": 1.2})


def test_holm_holds_the_chance_of_any_false_finding():
    p = torch.rand(4000, 5, generator=generator(0), dtype=torch.float64)
    false = [min(holm(dict(enumerate(row))).values()) < 0.05 for row in p.tolist()]
    plain = float((p.amin(1) < 0.05).double().mean())
    assert sum(false) / 4000 == pytest.approx(0.049, abs=0.012)
    assert plain > 0.2


def test_what_one_test_shows_many_need_not():
    noise = torch.randn(2, 30, dtype=torch.float64, generator=generator(3))
    found = paired_difference(noise[0], noise[0] + 0.25 + noise[1], range(30), ["a"] * 30)
    assert found.overall.low > 0
    assert 0.005 < found.p_value < 0.05
    assert verdict(found, resolution=0.1).startswith("better")
    said = verdict(found, resolution=0.1, p_value=10 * found.p_value, num_tests=10)
    assert said.startswith("undecided")
    assert "by Holm over 10 tests) (too many tests for it)" in said


def world(num_prompts, images, gains, *, noise, name):
    """A base and runs with given true gains: prompts differ, and each image of each run has noise of its own."""
    level = torch.randn(num_prompts, generator=generator(name), dtype=torch.float64)

    def evaluation(gain, key):
        own = noise * torch.randn(num_prompts, images, generator=generator(name, key), dtype=torch.float64)
        rows = (level[:, None] + gain + own).tolist()
        records = [
            Record(id=i, prompt=f"p{i}", tag="ab"[i % 2], k=k, graded=value) for i, row in enumerate(rows) for k, value in enumerate(row)
        ]
        return Evaluation(suite="s", seed=0, records=tuple(records))

    return evaluation(0.0, "base"), [evaluation(gain, f"run {number}") for number, gain in enumerate(gains)]


def test_the_noise_of_evaluation_is_told_apart_from_the_spread_of_training():
    # A run's mean over 100 prompts of 4 images has a noise of 0.2 / sqrt(400) = 0.01.
    base, runs = world(100, 4, [0.3] * 4, noise=0.2, name="equal")
    equal = seed_gains([base], runs, measure="graded")
    assert equal.noise == pytest.approx(0.01, rel=0.15)
    assert equal.spread < 0.03
    base, runs = world(100, 4, [0.1, 0.2, 0.3, 0.4], noise=0.2, name="apart")
    apart = seed_gains([base], runs, measure="graded")
    assert apart.noise == pytest.approx(0.01, rel=0.15)
    assert apart.training == pytest.approx(math.sqrt(1 / 60), rel=0.25)
    assert apart.over_seeds == seed_interval(apart.gains)
    assert apart.over_prompts.overall.mean == pytest.approx(sum(apart.gains) / 4)
    # Prompts say little of training seeds: their interval is far narrower.
    assert apart.over_seeds.high - apart.over_seeds.low > 3 * (apart.over_prompts.overall.high - apart.over_prompts.overall.low)


def test_a_gain_that_not_all_seeds_have_is_undecided_however_many_images_there_are():
    base, runs = world(200, 4, [0.3, -0.05, 0.1], noise=0.1, name="unsure")
    found = seed_gains([base], runs, measure="graded")
    assert found.over_prompts.overall.low > 0
    assert found.over_prompts.p_value < 0.01
    said = verdict_over_seeds(found, resolution=0.1)
    assert said.startswith("undecided")
    half = (found.over_seeds.high - found.over_seeds.low) / 2
    assert f"+-0.1 needs at most about {math.ceil(3 * (half / 0.1) ** 2)}; apart from seeds 2400 images resolve" in said
    base, runs = world(200, 4, [0.3, 0.31, 0.29], noise=0.1, name="sure")
    found = seed_gains([base], runs, measure="graded")
    assert verdict_over_seeds(found, resolution=0.1).startswith("better: +0.295")
    assert verdict_over_seeds(found, resolution=0.1, p_value=0.06, num_tests=9).startswith("undecided")
    with pytest.raises(ValueError, match="resolution: got 0"):
        verdict_over_seeds(found, resolution=0)
    with pytest.raises(ValueError, match="got 1, needed models from at least 2 training seeds"):
        seed_gains([base], runs[:1], measure="graded")


def test_two_recipes_are_compared_over_the_seeds_of_both():
    _, first = world(200, 4, [0.1, 0.2, 0.15], noise=0.1, name="two")
    _, second = world(200, 4, [0.4, 0.45], noise=0.1, name="two")
    found = seed_gains(first, second, measure="graded")
    means = [[run.scores("graded").overall.mean for run in runs] for runs in (first, second)]
    expected = seed_difference_interval(*means)
    assert [found.over_seeds.mean, found.over_seeds.low, found.over_seeds.high] == pytest.approx(
        [expected.mean, expected.low, expected.high]
    )
    assert list(found.gains) == pytest.approx([mean - sum(means[0]) / 3 for mean in means[1]])
    assert found.over_prompts.overall.mean == pytest.approx(sum(found.gains) / 2)
    assert "over 2 against 3 training seeds" in verdict_over_seeds(found, resolution=0.1)
    with pytest.raises(ValueError, match="bases: got none"):
        seed_gains([], second, measure="graded")


def test_the_interval_of_two_recipes_is_welchs():
    # scipy.stats.ttest_ind(..., equal_var=False).confidence_interval()
    for base, tuned, low, high in (
        ([0.5, 0.6, 0.7], [0.7, 0.9, 1.1], -0.11553995031825048, 0.7155399503182506),
        ([0.5, 3.0], [1.0, 2.0, 4.0, 8.0], -3.7760155988257953, 7.776015598825795),
    ):
        found = seed_difference_interval(base, tuned)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-4)
    assert seed_difference_interval([1.0, 1.0], [2.0, 2.0]) == Interval(mean=1.0, low=1.0, high=1.0)
    with pytest.raises(ValueError, match="needed at least two of each"):
        seed_difference_interval([1.0], [2.0, 3.0])
