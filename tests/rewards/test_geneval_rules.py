"""GenEval's prompts and rules, against the official file and worked examples."""

import hashlib
import json
from pathlib import Path

import pytest

from flowalign.rewards import geneval_prompts as prompts
from flowalign.rewards.geneval_rules import CLAUSES, Found, clause_rows, judge, kept, relations
from flowalign.shapes.prompts import meaning

OFFICIAL = Path(__file__).parents[3] / "shared" / "data" / "geneval_metadata.jsonl"


def test_the_official_prompts_are_made_again_bit_for_bit():
    text = "".join(json.dumps(record) + "\n" for record in prompts.official())
    assert hashlib.sha256(text.encode()).hexdigest() == prompts.OFFICIAL_SHA256
    if OFFICIAL.is_file():
        assert text == OFFICIAL.read_text()


def test_the_official_prompts_have_the_published_numbers_of_each_kind():
    tags = [record["tag"] for record in prompts.official()]
    assert [tags.count(tag) for tag in prompts.TAGS] == [80, 99, 80, 94, 100, 100]
    assert len({record["prompt"] for record in prompts.official()}) == 553
    assert len(prompts.official(seed=44)) > 500
    for record in prompts.official():
        prompts.check_record(record)


def classes_of(records):
    return {clause["class"] for record in records for clause in record["include"]}


@pytest.mark.parametrize("split", ["train", "unseen", "all"])
def test_splits_of_any_size_are_distinct_reproducible_and_well_formed(split):
    records = prompts.generate(split, seed=3, num=1500)
    assert records == prompts.generate(split, seed=3, num=1500)
    assert records[:100] == prompts.generate(split, seed=3, num=100)
    assert records != prompts.generate(split, seed=4, num=1500)
    assert len({record["prompt"] for record in records}) == 1500
    for record in records:
        prompts.check_record(record)
        assert not (record["include"][0]["class"] == "person" and "color" in record["include"][0])


def test_training_never_names_an_unseen_object_nor_asks_an_official_question():
    train, unseen = prompts.generate("train", num=4000), prompts.generate("unseen", num=2000)
    assert not classes_of(train) & classes_of(unseen)
    assert classes_of(unseen) == set(prompts.unseen_classes())
    assert len(prompts.unseen_classes()) == 20
    asked = {meaning(record) for record in prompts.official()}
    assert not asked & {meaning(record) for record in train}


def test_tags_come_in_their_proportions_until_one_has_no_more():
    records = prompts.generate("train", num=60, weights={"position": 2, "counting": 1}, max_count=6)
    tags = [record["tag"] for record in records]
    assert (tags.count("position"), tags.count("counting")) == (40, 20)
    assert max(record["include"][0]["count"] for record in records) == 6
    with pytest.raises(ValueError, match="num: got 1000, needed 1 to 60"):
        prompts.generate("unseen", num=1000, weights={"counting": 1})
    for options, message in (
        ({"split": "test"}, "split: got 'test'"),
        ({"weights": {"shape": 1}}, "weights: got"),
        ({"max_count": 1}, "max_count: got 1"),
        ({"num": 0}, "num: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            prompts.generate(**options)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "x"}, "needs GenEval metadata"),
        ({"tag": "colours", "include": [{}]}, "got tag 'colours'"),
        ({"tag": "colors", "include": [{"class": "mouse", "count": 1}]}, "class 'mouse' is not one of the 80"),
        ({"tag": "colors", "include": [{"class": "dog", "count": 0}]}, "count 0"),
        ({"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "grey"}]}, "color 'grey'"),
        ({"tag": "position", "include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "number of an earlier clause"),
        *(
            (
                {"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": place}]},
                "number of an earlier",
            )
            for place in (5, True, "ab", {"above": 0, "below": 0}, ["above"], ["above", "0"])
        ),
        ({"tag": "counting", "include": [{"class": "dog", "count": 1}], "exclude": None}, "exclude: got None, needed a list"),
        ({"tag": "counting", "include": [{"class": "dog", "count": 1}], "exclude": {"class": "dog"}}, "exclude: got .*, needed a list"),
    ],
)
def test_records_that_cannot_be_judged_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        prompts.check_record(record)


# -- relations: worked examples of the specification ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "holds"),
    [
        ((0, 0, 10, 10), (50, 0, 60, 10), {"left of"}),
        ((0, 0, 10, 10), (50, 50, 60, 60), {"left of", "above"}),
        ((0, 0, 10, 10), (1, 0, 11, 10), set()),
        ((0, 0, 100, 100), (40, 0, 140, 100), set()),
        ((0, 0, 100, 100), (41, 0, 141, 100), {"left of"}),
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
    ],
)
def test_relations_are_those_of_the_worked_examples(one, other, holds):
    assert relations(one, other) == holds
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(other, one) == {opposite[name] for name in holds}
    for scale, shift in ((3, 0), (1, 17), (0.5, -4)):
        moved = [tuple(scale * side + shift for side in box) for box in (one, other)]
        assert relations(*moved) == holds


def test_the_direction_decides_between_one_relation_and_two():
    import math

    for degrees, holds in ((25, {"left of"}), (35, {"left of", "above"})):
        x, y = 1000 * math.cos(math.radians(degrees)), 1000 * math.sin(math.radians(degrees))
        assert relations((0, 0, 1, 1), (x, y, x + 1, y + 1)) == holds


# -- verdicts: the table of the specification ------------------------------------------------------------------------------------------


def objects(**numbers):
    return {name: [Found(box=(0, 0, 10, 10))] * num for name, num in numbers.items() if num}


BENCH = prompts.single_object("bench")
CLOCKS = prompts.counting("clock", 3)
BESIDE = prompts.position("dog", "left of", "cat")
BOTH = prompts.color_attr("dog", "red", "cat", "blue")
LEFT, RIGHT = (0, 0, 10, 10), (50, 0, 60, 10)


def at(*boxes):
    return [Found(box=box) for box in boxes]


def painted(*names):
    return [Found(box=LEFT, color=name) for name in names]


CASES = [
    (BENCH, objects(bench=0), False, False, 0, 0),
    (BENCH, objects(bench=1), True, True, 1, 1),
    (BENCH, objects(bench=2), True, False, 0.5, 0),
    (BENCH, objects(bench=16), True, False, 0.0625, -14),
    (CLOCKS, objects(clock=2), False, False, 2 / 3, 2 / 3),
    (CLOCKS, objects(clock=3), True, True, 1, 1),
    (CLOCKS, objects(clock=4), False, False, 0.75, 2 / 3),
    (CLOCKS, objects(clock=7), False, False, 3 / 7, -1 / 3),
    (BESIDE, {"dog": at(LEFT), "cat": at(RIGHT)}, True, True, 1, 1),
    (BESIDE, {"dog": at(RIGHT), "cat": at(LEFT)}, False, False, 2 / 3, 0.75),
    (BESIDE, {"dog": at(LEFT)}, False, False, 1 / 3, 1 / 3),
    (BESIDE, {"cat": at(LEFT)}, False, False, 1 / 3, 1 / 3),
    (BESIDE, {"dog": at(LEFT, LEFT), "cat": at(RIGHT)}, True, False, 2.5 / 3, 1 / 3),
    (BESIDE, {"dog": at(RIGHT, LEFT), "cat": at(LEFT)}, False, False, 0.5, 1 / 3),
    (BOTH, {"dog": painted("red"), "cat": painted("blue")}, True, True, 1, 1),
    (BOTH, {"dog": painted("red"), "cat": painted("red")}, False, False, 0.75, 0.75),
    (BOTH, {"dog": painted("red")}, False, False, 0.5, 0.5),
    (BOTH, {"dog": painted("red", "red"), "cat": painted("blue")}, True, False, 0.875, 0.5),
    (BOTH, {"dog": painted("pink", "red"), "cat": painted("blue")}, False, False, 0.625, 0.5),
]


@pytest.mark.parametrize(("record", "found", "official", "strict", "graded", "flow_grpo"), CASES)
def test_all_four_verdicts_are_those_of_the_worked_examples(record, found, official, strict, graded, flow_grpo):
    verdict = judge(record, found)
    assert (verdict.official, verdict.strict) == (official, strict)
    assert verdict.graded == pytest.approx(graded)
    assert verdict.graded_flow_grpo == pytest.approx(flow_grpo)
    assert bool(verdict.reason) == (not official)
    assert all(verdict.clauses.values()) == official
    assert set(verdict.clauses) <= set(CLAUSES)


def test_strict_is_stricter_than_official_and_graded_stays_in_its_range():
    import itertools

    for record in (BENCH, CLOCKS, BESIDE, BOTH):
        for numbers in itertools.product(range(5), repeat=4):
            boxes, names = itertools.cycle([LEFT, RIGHT, (0, 50, 10, 60)]), itertools.cycle(["red", "blue", None])
            found = {
                name: [Found(box=next(boxes), color=next(names)) for _ in range(num)]
                for name, num in zip(("bench", "clock", "dog", "cat"), numbers, strict=True)
            }
            verdict = judge(record, found)
            assert verdict.official or not verdict.strict
            assert 0 <= verdict.graded <= 1
            assert verdict.graded == pytest.approx(1) or not verdict.strict


def test_only_sure_detections_count_and_at_most_sixteen():
    found = [Found(box=LEFT, score=score) for score in (0.3, 0.95, 0.31, 0.9, 0.91)]
    assert [one.score for one in kept(found, "two_object")] == [0.95, 0.91, 0.9, 0.31]
    assert [one.score for one in kept(found, "counting")] == [0.95, 0.91]
    assert len(kept(found * 9, "colors")) == 16


def test_the_reason_says_what_is_wrong():
    assert judge(BESIDE, {"dog": at(RIGHT), "cat": at(LEFT)}).reason == "expected dog left of cat, found right of"
    assert judge(BESIDE, {"dog": at(RIGHT)}).reason == "expected cat>=1, found 0; expected dog left of cat, found no target"
    assert judge(CLOCKS, objects(clock=4)).reason == "expected clock<4, found 4"
    holds, asked = clause_rows([judge(CLOCKS, objects(clock=4))])
    assert {name: hold for name, hold, is_asked in zip(CLAUSES, holds[0], asked[0], strict=True) if is_asked} == {
        "count 1": 1,
        "not too many": 0,
    }
