import math

import pytest
import torch

from flowalign.core.combinations import combine, search, starts


def tables(num=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [{"a": torch.randn(3, 2, generator=draw), "b": torch.randn(5, generator=draw)} for _ in range(num)]


def test_one_checkpoint_alone_comes_back_to_the_last_bit():
    made = tables()
    for place, coefficients in enumerate(torch.eye(4).tolist()):
        found = combine(made, coefficients)
        assert all(torch.equal(found[name], made[place][name]) for name in ("a", "b"))


def test_combining_is_linear_also_with_negative_coefficients():
    made, coefficients = tables(3), (-0.5, 0.2, 1.3)
    found = combine(made, coefficients)
    for name in found:
        plain = sum(value * table[name].double() for value, table in zip(coefficients, made, strict=True))
        assert torch.equal(found[name], plain.float())


def test_half_precision_is_added_in_full_and_comes_back_as_it_was():
    made = [{"a": torch.tensor([1.0], dtype=torch.bfloat16)}, {"a": torch.tensor([1.0078125], dtype=torch.bfloat16)}]
    found = combine(made, (-127.0, 128.0))["a"]
    assert found.dtype == torch.bfloat16
    assert found.item() == 2


def test_a_search_begins_with_the_newest_checkpoint_and_averages():
    found = list(starts(3))
    assert found[0] == (0, 0, 1)
    assert found[1] == pytest.approx((1 / 3,) * 3)
    assert found[2] == pytest.approx((1 / 7, 2 / 7, 4 / 7))
    assert found[-2:] == [(0, 1, 0), (1, 0, 0)]
    assert len(set(found)) == len(found) == 6
    assert list(starts(1)) == [(1,)]


def test_of_many_checkpoints_six_older_ones_are_tried_alone():
    alone = [candidate.index(1) for candidate in starts(50) if sorted(candidate) == [0] * 49 + [1]]
    assert alone == [49, 48, 40, 32, 24, 16, 8]


def test_the_search_finds_a_hidden_combination_with_negative_coefficients():
    """Weights scatter around a target that only a combination with a negative part reaches; the score is minus the squared distance to it."""
    made, hidden = tables(5), (-0.6, 0.3, 0.1, 0.4, 0.8)
    target = combine(made, hidden)

    def score(coefficients):
        found = combine(made, coefficients)
        return -sum((found[name] - target[name]).square().sum().item() for name in target)

    found = list(search(score, 5, budget=250, seed=1))
    first, best = found[:8], max(found, key=lambda entry: entry.score)
    assert best.score > 0.02 * max(entry.score for entry in first)  # scores are negative: fifty times nearer than any average
    assert best.coefficients == pytest.approx(hidden, abs=0.2)
    assert all(math.fsum(entry.coefficients) == pytest.approx(1, abs=1e-12) for entry in found)


def test_the_same_seed_gives_the_same_search_and_another_one_another():
    def score(coefficients):
        return -sum((value - 0.3) ** 2 for value in coefficients)

    first, second, other = (list(search(score, 4, budget=20, seed=seed)) for seed in (0, 0, 1))
    assert first == second
    assert first[:7] == other[:7]
    assert first[7:] != other[7:]
    assert list(search(score, 4, budget=12, seed=0)) == first[:12]


def test_scores_that_are_not_finite_have_no_children():
    def score(coefficients):
        return math.nan if coefficients[0] > 0.9 else coefficients[-1] if coefficients[-1] <= 1 else -math.inf

    found = list(search(score, 2, budget=60))
    assert max(entry.score for entry in found if math.isfinite(entry.score)) == 1
    assert sum(math.isfinite(entry.score) for entry in found) > 20


def test_what_cannot_be_combined_is_refused():
    made = tables(2)
    with pytest.raises(ValueError, match="2 tables and 3 coefficients"):
        combine(made, (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="not finite"):
        combine(made, (math.nan, 1.0))
    with pytest.raises(ValueError, match="table 1 does not have the tensors of the first one, for example b"):
        combine([made[0], {"a": made[1]["a"]}], (0.5, 0.5))
    with pytest.raises(ValueError, match="for example a"):
        combine([made[0], {**made[1], "a": torch.zeros(2)}], (0.5, 0.5))
    with pytest.raises(ValueError, match="needed at least 1"):
        list(search(lambda c: 0.0, 3, budget=0))
