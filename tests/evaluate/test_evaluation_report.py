"""The page of an evaluation: what it shows is what the records say."""

import pytest
import torch

from flowalign.evaluate.records import Evaluation, Record
from flowalign.evaluation_report import extremes, write_evaluation


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
    assert "<b>new</b>" in page
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
