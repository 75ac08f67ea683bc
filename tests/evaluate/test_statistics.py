"""Scores, intervals and the permutation test."""

import numpy as np
import pytest

from flowalign.evaluate.statistics import bootstrap, images_needed, paired_difference, seed_spread


def _table(generator, *, num_prompts=12, num_images=2, tags=("a", "b", "c")):
    """Binary scores with prompts of different difficulty: scores, prompt ids, tags."""
    difficulty = generator.beta(1.0, 1.0, size=(len(tags), num_prompts, 1))
    values = (generator.random((len(tags), num_prompts, num_images)) < difficulty).astype(float).ravel()
    prompt = np.arange(len(tags) * num_prompts).repeat(num_images)
    tag = np.repeat(list(tags), num_prompts * num_images).tolist()
    return values, prompt, tag


def test_the_score_is_the_unweighted_mean_of_the_tags_and_micro_that_of_the_images():
    scores = bootstrap([1, 1, 1, 1, 0, 0.5], [0, 0, 1, 2, 3, 4], ["a"] * 4 + ["b"] * 2)
    assert scores.overall.mean == (1 + 0.25) / 2
    assert scores.micro.mean == 4.5 / 6
    assert scores.per_tag["a"].mean == 1
    assert scores.per_tag["b"].mean == 0.25
    assert scores.num_prompts == {"a": 3, "b": 2}
    assert scores.num_images == {"a": 4, "b": 2}


def test_macro_and_micro_reproduce_the_published_geneval_scores_of_sd35_medium():
    # Task sizes of GenEval and the published accuracies of SD3.5-Medium: the paper's overall score is the macro mean.
    means = {"single_object": 0.98, "two_object": 0.78, "counting": 0.50, "colors": 0.81, "position": 0.24, "color_attr": 0.52}
    sizes = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    values = [means[tag] for tag in sizes for _ in range(sizes[tag])]
    tags = [tag for tag in sizes for _ in range(sizes[tag])]
    scores = bootstrap(values, range(553), tags, draws=10)
    assert scores.overall.mean == pytest.approx(0.6383, abs=5e-5)
    assert scores.micro.mean == pytest.approx(0.6289, abs=5e-5)


def test_the_order_of_the_rows_changes_no_bit():
    generator = np.random.default_rng(0)
    values, prompt, tag = _table(generator)
    values = values * 0.1 + generator.random(len(values))
    order = generator.permutation(len(values))
    shuffled = [tag[i] for i in order]
    assert bootstrap(values, prompt, tag) == bootstrap(values[order], prompt[order], shuffled)
    other = generator.random(len(values))
    assert paired_difference(values, other, prompt, tag) == paired_difference(values[order], other[order], prompt[order], shuffled)


def test_the_interval_of_a_tag_does_not_depend_on_the_other_tags():
    values, prompt, tag = _table(np.random.default_rng(1))
    alone = [i for i, name in enumerate(tag) if name == "b"]
    only = bootstrap(values[alone], prompt[alone], ["b"] * len(alone))
    assert only.per_tag["b"] == bootstrap(values, prompt, tag).per_tag["b"]


def test_the_nominal_interval_covers_the_true_score_of_new_prompts_and_seeds():
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        overall = bootstrap(*_table(generator), draws=200).overall
        covered += overall.low <= 0.5 <= overall.high
    assert 0.90 <= covered / 200 <= 0.98


def test_coverage_holds_for_six_tags_of_three_prompts_each():
    # Measured over 1000 runs: 94 %; the usual bootstrap, which draws n of n, covers 87 % (with two prompts 92 % and 81 %).
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        overall = bootstrap(*_table(generator, num_prompts=3, tags="abcdef"), draws=200).overall
        covered += overall.low <= 0.5 <= overall.high
    assert 0.90 <= covered / 200 <= 0.98


def test_two_prompts_give_exactly_their_range():
    interval = bootstrap([0.2, 0.2, 0.8], [5, 5, 9], ["a"] * 3).per_tag["a"]
    assert interval.mean == pytest.approx(0.4)
    assert (interval.low, interval.high) == pytest.approx((0.2, 0.8))


def test_the_interval_has_the_width_of_the_normal_one_where_there_are_many_prompts():
    values = np.random.default_rng(4).normal(size=400)
    interval = bootstrap(values, range(400), ["a"] * 400).overall
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std(ddof=1) / 20, rel=0.03)


def test_more_images_of_the_same_prompts_do_not_narrow_the_interval():
    values, prompt, tag = _table(np.random.default_rng(5), num_images=1)
    once, often = bootstrap(values, prompt, tag), bootstrap(values.repeat(9), prompt.repeat(9), np.repeat(tag, 9).tolist())
    assert often.overall.low == pytest.approx(once.overall.low)
    assert often.overall.high == pytest.approx(once.overall.high)


def test_a_tag_with_one_prompt_has_no_interval_and_takes_that_of_the_overall_score_with_it():
    scores = bootstrap([0, 1, 1, 0], [0, 0, 1, 2], ["a", "a", "b", "b"])
    assert (scores.per_tag["a"].low, scores.per_tag["a"].high) == (None, None)
    assert scores.per_tag["b"].low is not None
    assert (scores.overall.low, scores.micro.low) == (None, None)
    assert str(scores.overall) == "0.500 [no interval]"


def test_the_difference_is_tuned_minus_base_with_the_interval_of_the_paired_rows():
    values, prompt, tag = _table(np.random.default_rng(6))
    difference = paired_difference(values, values + 0.25, prompt, tag)
    for part in (difference.overall, difference.micro, difference.per_tag["a"]):
        assert (part.mean, part.low, part.high) == pytest.approx((0.25, 0.25, 0.25))
    assert difference.p_value == 1 / 10_001


def test_equal_models_have_a_p_value_of_one():
    values, prompt, tag = _table(np.random.default_rng(7))
    assert paired_difference(values, values, prompt, tag).p_value == 1


def test_the_sign_flip_test_agrees_with_counting_all_flips():
    base, tuned = np.zeros(8), np.array([0.4, 0.1, 0.3, -0.2, 0.5, 0.2, 0.6, 0.1])
    flips = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1)
    exact = (np.abs(tuned @ flips) >= abs(tuned.sum()) - 1e-12).mean()
    assert paired_difference(base, tuned, range(8), ["a"] * 8).p_value == pytest.approx(exact, abs=0.01)


def test_p_values_are_uniform_where_the_models_do_not_differ():
    generator = np.random.default_rng(8)
    p_values = []
    for _ in range(150):
        values, prompt, tag = _table(generator, num_prompts=10)
        noise = generator.normal(size=len(values))
        p_values.append(paired_difference(values, values + noise, prompt, tag, draws=200).p_value)
    ranks = (np.arange(150) + 0.5) / 150
    assert np.abs(np.sort(p_values) - ranks).max() < 0.111  # Kolmogorov-Smirnov at 5 %
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.09


def test_images_of_one_prompt_that_err_together_are_not_counted_as_independent_evidence():
    # One prompt of four flipped, with 50 images: a test on pooled images would call this significant.
    base, tuned = np.zeros(200), np.repeat([1.0, 0.0, 0.0, 0.0], 50)
    assert paired_difference(base, tuned, np.arange(4).repeat(50), ["a"] * 200).p_value == 1


@pytest.mark.parametrize(
    ("values", "prompt", "tag", "message"),
    [
        ([], [], [], "at least one image"),
        ([1.0, float("nan")], [0, 1], ["a", "a"], "not finite"),
        ([1.0, 0.0], [0], ["a", "a"], "as many of each"),
        ([1.0, 0.0], [0, 0], ["a", "b"], "two tags"),
    ],
)
def test_wrong_input_is_refused_with_the_reason(values, prompt, tag, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(values, prompt, tag)


def test_models_with_different_numbers_of_images_cannot_be_compared():
    with pytest.raises(ValueError, match="same prompts and seeds"):
        paired_difference([1.0, 0.0], [1.0], [0, 1], ["a", "a"])


def test_seed_spread_is_mean_and_range_and_needs_two_seeds():
    spread = seed_spread([0.5, 0.75, 0.25])
    assert (spread.mean, spread.low, spread.high, spread.num_seeds) == (0.5, 0.25, 0.75, 3)
    with pytest.raises(ValueError, match="at least 2"):
        seed_spread([0.5])


def test_the_images_needed_give_the_half_width_that_the_bootstrap_then_finds():
    num = images_needed(0.05, score=0.5, images_per_prompt=2, correlation=1 / 3)
    generator = np.random.default_rng(9)
    difficulty = generator.beta(1.0, 1.0, size=(num // 2, 1))  # correlation 1/3 between two images of a prompt
    values = (generator.random((num // 2, 2)) < difficulty).astype(float).ravel()
    overall = bootstrap(values, np.arange(num // 2).repeat(2), ["a"] * num, draws=2000).overall
    assert (overall.high - overall.low) / 2 == pytest.approx(0.05, rel=0.05)


def test_images_needed_refuses_what_it_cannot_answer():
    with pytest.raises(ValueError, match="half_width"):
        images_needed(0.0)
