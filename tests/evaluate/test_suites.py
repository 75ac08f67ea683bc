"""Running a suite, its records, and the comparison of two models."""

import dataclasses
import json

import pytest
import torch

import flowalign.shapes as shapes
from flowalign.evaluate.prompt_suite import PromptSuite
from flowalign.evaluate.records import Evaluation, Record, compare, read_evaluation, table
from flowalign.evaluate.suites import ShapesSuite, prompt_id, run_suite, suite
from flowalign.rewards import diversity
from flowalign.suite_options import Scorer
from flowalign.train.scoring import NamedReward, score
from tests.evaluate.fakes import RedSuite, random_images, renderer

TEXTS = ("a", "bb", "bbb", "aaaa", "aaaaa")
HELD_OUT = ShapesSuite(num_prompts=24, images_per_prompt=2)


def test_the_batch_size_changes_neither_records_nor_images():
    small = run_suite(RedSuite(TEXTS), random_images, batch_size=3, keep_images=True)
    large = run_suite(RedSuite(TEXTS), random_images, batch_size=64, keep_images=True)
    assert small.records == large.records
    assert torch.equal(small.images, large.images)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_images_of_a_prompt_are_scored_together_whatever_the_batch_size(batch_size):
    """A text that stands twice, under two records, is one prompt to a reward."""
    records = [{"prompt": text, "number": number} for number, text in enumerate(("a", "b", "a", "c"))]
    reward = NamedReward(name="diversity", reward=diversity.Config().build())
    sizes = []

    def generate(prompts, seeds):
        sizes.append(len(prompts))
        return random_images(prompts, seeds)

    chosen = PromptSuite(title="mine", records=records, score=Scorer([reward]), images_per_prompt=3)
    found = run_suite(chosen, generate, batch_size=batch_size, keep_images=True)
    assert max(sizes) <= batch_size
    assert [(record.prompt, record.k) for record in found.records] == [(text, k) for text in "abac" for k in range(3)]
    texts = [record.prompt for record in found.records]
    whole = score([reward], found.images.float() / 255, texts, [{}] * len(texts)).values[:, 0]
    # Scored before they are rounded to bytes.
    assert [record.scores["diversity"] for record in found.records] == pytest.approx(whole.tolist(), abs=2e-3)
    again = run_suite(chosen, random_images, batch_size=12)
    assert [record.scores["diversity"] for record in again.records] == pytest.approx(
        [record.scores["diversity"] for record in found.records]
    )


def test_noise_belongs_to_the_prompt_and_not_to_its_place_or_its_neighbours():
    def by_sample(evaluation):
        return {(record.id, record.k): record for record in evaluation.records}

    all_of_them = by_sample(run_suite(RedSuite(TEXTS), random_images))
    fewer = by_sample(run_suite(RedSuite(TEXTS[::-2]), random_images))
    assert fewer.items() <= all_of_them.items()


def test_every_sample_has_noise_of_its_own_and_another_seed_changes_all_of_it():
    seen: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    for seed, seeds in seen.items():

        def generate(prompts, pairs, seeds=seeds):
            seeds.extend(pairs)
            return random_images(prompts, pairs)

        run_suite(RedSuite(TEXTS, images_per_prompt=3), generate, batch_size=4, seed=seed)
    assert [k for _, k in seen[0]] == [0, 1, 2] * 5
    assert len(set(seen[0])) == 15
    assert not {noise for noise, _ in seen[0]} & {noise for noise, _ in seen[1]}


def test_progress_counts_images_to_the_last_one():
    calls = []
    run_suite(RedSuite(TEXTS), random_images, batch_size=4, progress=lambda done, all_: calls.append((done, all_)))
    assert calls == [(4, 10), (8, 10), (10, 10)]


def test_a_prompt_that_occurs_twice_is_refused():
    with pytest.raises(ValueError, match="occurs twice"):
        run_suite(RedSuite(["a", "a"]), random_images)


def test_a_suite_without_prompts_is_refused():
    with pytest.raises(ValueError, match="no prompts"):
        run_suite(RedSuite([]), random_images)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda images: images * float("nan"), "image of 'a' holds values that are not finite"),
        (lambda images: images * 3 - 1, r"needed \[0, 1\]"),
        (lambda images: images[:1], r"needed \(10, 3, height, width\)"),
        (lambda images: images[:, :1], r"needed \(10, 3, height, width\)"),
    ],
)
def test_images_that_cannot_be_judged_are_refused(spoil, message):
    with pytest.raises(ValueError, match=message):
        run_suite(RedSuite(TEXTS), lambda prompts, seeds: spoil(random_images(prompts, seeds) * 0.5 + 0.5))


def test_a_model_that_draws_every_prompt_scores_one_on_held_out_shapes():
    evaluation = run_suite(HELD_OUT, renderer(HELD_OUT, accuracy=1.0))
    assert evaluation.scores("strict").overall.mean == 1
    assert evaluation.scores("graded").overall.mean == 1
    assert {record.reason for record in evaluation.records} == {""}


def test_a_failed_image_says_which_clauses_are_wrong():
    evaluation = run_suite(HELD_OUT, renderer(HELD_OUT, accuracy=0.0))
    single = next(record for record in evaluation.records if record.tag == "single_object")
    assert not single.strict
    assert single.clauses == {"count of the first": False, "nothing else": False}
    assert single.reason == "count of the first: wrong; nothing else: wrong"


def test_prompt_ids_depend_on_what_the_prompt_says_and_fit_into_a_double():
    assert prompt_id({"tag": "a", "prompt": "b"}) == prompt_id({"prompt": "b", "tag": "a"})
    assert prompt_id({"tag": "a", "prompt": "b"}) != prompt_id({"tag": "a", "prompt": "c"})
    ids = {prompt.text: prompt.id for prompt in ShapesSuite().prompts()}
    assert all(ids[prompt.text] == prompt.id for prompt in HELD_OUT.prompts())
    assert len(set(ids.values())) == len(ids)
    assert all(float(number) == number for number in ids.values())


def test_reference_images_stand_in_the_order_of_the_records_and_are_right():
    evaluation = run_suite(HELD_OUT, renderer(HELD_OUT, accuracy=0.5))
    metadata = {prompt.id: dict(prompt.metadata) for prompt in HELD_OUT.prompts()}
    reference = HELD_OUT.reference(seed=7)
    assert shapes.verify(reference, [metadata[record.id] for record in evaluation.records]).strict.all()
    assert not torch.equal(reference, HELD_OUT.reference(seed=8))


def test_meanings_are_counted_once_for_all_their_wordings():
    evaluation = run_suite(ShapesSuite(num_prompts=120, images_per_prompt=1), lambda p, s: torch.ones(len(p), 3, 32, 32), batch_size=120)
    scores = evaluation.scores()
    assert scores.num_prompts["two_object"] == 2 * evaluation.num_meanings()["two_object"]
    assert scores.num_prompts["counting"] == evaluation.num_meanings()["counting"]


def test_records_survive_writing_and_reading_to_the_last_bit(tmp_path):
    evaluation = run_suite(HELD_OUT, renderer(HELD_OUT, accuracy=0.5), seed=3)
    evaluation.write(tmp_path / "records.jsonl")
    assert read_evaluation(tmp_path / "records.jsonl") == evaluation
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == len(evaluation.records)


def test_a_broken_line_of_records_is_named_by_its_number(tmp_path):
    path = tmp_path / "records.jsonl"
    run_suite(RedSuite(TEXTS), random_images).write(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:-5], *lines[3:]]))
    with pytest.raises(ValueError, match="line 3: not a record"):
        read_evaluation(path)


def test_an_empty_file_of_records_is_refused(tmp_path):
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(ValueError, match="no records"):
        read_evaluation(tmp_path / "records.jsonl")


def test_the_summary_is_json_with_means_and_intervals_overall_and_per_tag():
    evaluation = run_suite(HELD_OUT, renderer(HELD_OUT, accuracy=0.5))
    summary = json.loads(json.dumps(evaluation.summary()))
    strict = [record.strict for record in evaluation.records if record.tag == "colors"]
    for measure in ("strict", "graded"):
        assert set(summary[measure]["overall"]) == {"mean", "low", "high"}
        assert set(summary[measure]["per_tag"]) == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    assert summary["strict"]["per_tag"]["colors"]["mean"] == sum(strict) / len(strict)


def _evaluation(strict, *, seed=0, first_id=0):
    records = [
        Record(id=first_id + i // 2, prompt=f"prompt {first_id + i // 2}", tag="ab"[i // 8], k=i % 2, strict=s, graded=s / 2)
        for i, s in enumerate(strict)
    ]
    return Evaluation(suite="test", seed=seed, records=tuple(records))


def test_models_are_paired_by_prompt_and_noise_not_by_line():
    base, tuned = _evaluation([False] * 16), _evaluation([True, False] * 8)
    turned = dataclasses.replace(tuned, records=tuned.records[::-1])
    assert compare(base, tuned) == compare(base, turned)
    assert compare(base, tuned)["strict"].overall.mean == 0.5
    assert compare(base, tuned)["graded"].overall.mean == 0.25


def test_models_of_other_prompts_or_other_noise_are_not_compared():
    base = _evaluation([True] * 16)
    with pytest.raises(ValueError, match="the same seed"):
        compare(base, _evaluation([True] * 16, seed=1))
    with pytest.raises(ValueError, match="4 images have no partner, for example 'prompt 0'"):
        compare(base, _evaluation([True] * 16, first_id=1))


def test_the_table_shows_base_tuned_difference_and_corrected_p_values_for_each_tag():
    base, tuned = _evaluation([False] * 16), _evaluation([True] * 8 + [True, False] * 4)
    found = compare(base, tuned)["strict"].p_value_per_tag
    # Four differences of one sign: 2 of 16 flips are as extreme. Two tests, so Holm doubles the smaller.
    assert [found["a"], found["b"]] == pytest.approx([1 / 8, 1 / 8], abs=0.01)
    p = f"{2 * min(found.values()):.4f}"
    assert table(base, tuned).splitlines() == [
        "tag             prompts  images  base                  tuned                 difference            p, Holm over tags",
        f"a                     4       8  0.000 [0.000, 0.000]  1.000 [1.000, 1.000]  1.000 [1.000, 1.000]  {p}",
        f"b                     4       8  0.000 [0.000, 0.000]  0.500 [0.500, 0.500]  0.500 [0.500, 0.500]  {p}",
        "macro mean            8      16  0.000 [0.000, 0.000]  0.750 [0.750, 0.750]  0.750 [0.750, 0.750]",
        "mean of images        8      16  0.000 [0.000, 0.000]  0.750 [0.750, 0.750]  0.750 [0.750, 0.750]",
    ]


def test_an_unknown_suite_is_answered_with_the_nearest_name():
    assert suite("shapes", split="train").name == "shapes/train"
    with pytest.raises(ValueError, match="did you mean 'shapes'"):
        suite("shaeps")
