"""The page of an evaluation: what it shows is what the records say."""

import re
from dataclasses import replace

import pytest
import torch

from flowalign.evaluate.records import Evaluation, Record, read_evaluation
from flowalign.evaluation_report import extremes, write_evaluation
from flowalign.evaluation_result import Result


def evaluation(shift=0.0, size=8):
    records = tuple(
        Record(
            id=prompt,
            prompt=f"prompt {prompt} <b>",
            tag="colors" if prompt < 4 else "position",
            k=k,
            strict=prompt % 2 == 0,
            graded=min(1.0, 0.1 * prompt + 0.01 * k + shift),
            scores={"sharpness": 3.0 * prompt + shift},
            clauses={"colour": prompt % 2 == 0, "count": True},
        )
        for prompt in range(8)
        for k in range(2)
    )
    images = torch.rand(len(records), 3, size, size, generator=torch.Generator().manual_seed(0))
    return Evaluation(suite="some/suite", seed=0, records=records, images=images)


def test_the_best_and_worst_are_by_partial_credit_and_one_of_each_prompt():
    worst, best = extremes(evaluation(), "strict")
    assert [picture.text for picture in worst.pictures] == [f"prompt {number} <b>" for number in range(6)]
    assert [picture.text for picture in best.pictures] == [f"prompt {number} <b>" for number in range(7, 1, -1)]
    assert best.pictures[0].note == "graded 0.71"
    assert worst.pictures[0].note == "graded 0"
    assert [picture.passed for picture in worst.pictures] == [True, False] * 3
    assert worst.pictures[1].clauses == [("colour", False), ("count", True)]


def test_the_page_of_two_models_has_scores_images_distributions_and_verdicts(tmp_path):
    path = write_evaluation(
        tmp_path / "report.html", evaluation(0.1), evaluation(), names=("old", "new"), notes=["strict: no difference"], settings="a: 1"
    )
    page = path.read_text()
    for told in (
        "new on some/suite",
        "Worst images",
        "Distribution of graded",
        "Distribution of sharpness",
    ):
        assert told in page
    assert "prompt 0 &lt;b&gt;" in page
    assert "<b>New</b>" in page
    assert "strict: no difference" in page
    assert "Distribution of strict" not in page
    assert "✗ colour" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_the_page_of_one_model_has_a_table_for_each_measure(tmp_path):
    page = write_evaluation(tmp_path / "report.html", evaluation(), None, names=("", "new"), notes=[], settings="").read_text()
    for told in (">Strict<", ">Graded<", ">Sharpness<", "macro mean"):
        assert told in page
    assert "Before and after" not in page


@pytest.mark.parametrize(("size", "kind"), [(8, "png"), (300, "jpeg")])
def test_large_images_do_not_make_a_page_heavy(tmp_path, size, kind):
    page = write_evaluation(tmp_path / "report.html", evaluation(size=size), None, names=("", "new"), notes=[], settings="").read_text()
    assert f"data:image/{kind};base64" in page
    assert len(page) < 5e6


def test_scores_of_any_range_have_an_axis_of_their_own(tmp_path):
    records = [replace(record, strict=None, graded=None, scores={"pick": 20.0 + record.id}) for record in evaluation().records]
    base = replace(evaluation(), records=tuple(records), headline="pick")
    better = [replace(record, scores={"pick": record.scores["pick"] + 2.5}) for record in records]
    tuned = replace(base, records=tuple(better))
    page = write_evaluation(tmp_path / "report.html", tuned, base, names=("old", "new"), notes=[], settings="").read_text()
    places = [float(place) for place in re.findall(r'class="dot" style="left:(-?[0-9.]+)%', page)]
    assert len(places) == 2
    assert 0 < places[0] < places[1] < 100
    marks = [float(mark) for mark in re.findall(r'<span style="left:[0-9.]+%">(-?[0-9.]+)</span>', page)]
    low, high = marks[0], marks[-1]
    assert low + (high - low) * places[0] / 100 == pytest.approx(base.scores("pick").overall.mean, abs=0.01)
    assert low + (high - low) * places[1] / 100 == pytest.approx(tuned.scores("pick").overall.mean, abs=0.01)
    assert 'class="bars"' not in page
    shares = write_evaluation(
        tmp_path / "shares.html", evaluation(0.1), evaluation(), names=("old", "new"), notes=[], settings=""
    ).read_text()
    assert 'class="bars"' in shares
    assert '<span style="left:25.00%">0.25</span>' in shares


def test_a_kind_without_any_score_leaves_the_others_theirs_and_is_named(tmp_path, capsys):
    records = [
        replace(record, scores={"judge": None if record.tag == "position" else 0.5 + 0.01 * record.id}) for record in evaluation().records
    ]
    base = replace(evaluation(), records=tuple(replace(record, strict=None, graded=None) for record in records), headline="judge")
    result = Result(
        runs=[base], bases=[base], names=("old", "new"), num_steps=(1, 1), fidelity=(), resolution=0.02, settings={"suite": "some"}
    )
    result.show()
    said = capsys.readouterr().out
    assert re.search(r"position +4 +8 +no score", said) or re.search(r"position +0 +0 +no score", said)
    assert "macro means leave out position, of which none has a score" in said
    result.write(tmp_path)
    assert "macro means leave out position" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("text", ["a\u2028b", "a\u0085b", "a\u2029b", "a\x0bb"])
def test_records_with_any_separator_in_a_prompt_are_read_back(tmp_path, text):
    found = evaluation()
    records = tuple(replace(record, prompt=text) for record in found.records)
    replace(found, records=records).write(tmp_path / "records.jsonl")
    assert read_evaluation(tmp_path / "records.jsonl").records == records
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]
