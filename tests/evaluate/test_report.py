"""The HTML report and its charts."""

import base64
import io
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign.evaluate.charts import Chart, Curve, curve_from_log, draw, ticks
from flowalign.evaluate.report import (
    Comparison,
    Headline,
    Report,
    ScoreRow,
    Share,
    Table,
    comparisons,
    headline,
    render,
    score_rows,
    write_report,
)
from flowalign.evaluate.scores import Interval
from flowalign.evaluate.suites import ShapesSuite, run_suite
from flowalign.images import to_pil
from tests.evaluate.fakes import renderer

EVIL = "<script>alert('1')</script>\"' & <b>"
VOID = {"meta", "link", "img"}


class _Page(HTMLParser):
    """All elements and the text, and a check that elements close in order."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.text = [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def _report(text="text"):
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    half = Interval(mean=0.5, low=0.4, high=0.6)
    return Report(
        title=text,
        subtitle=text,
        headline=Headline(name=text, base=half, tuned=half, difference=Interval(mean=-0.125), p_value=0.0001, note=text),
        comparisons=[Comparison(prompt=text, base=images, tuned=images.flip(0), base_passed=[True, False], tuned_passed=[True] * 2)],
        scores=[ScoreRow(name=text, note=text, base=half, tuned=half, difference=half)],
        charts=[Chart(title=text, curves=[Curve(name=text, x=[0, 1], y=[0, 1])], x_label=text, caption=text)],
        shares=[Share(name=text, seconds=30), Share(name="rest", seconds=90)],
        tables=[Table(title=text, columns=[text, text], rows=[[text, text]], caption=text)],
        command=text,
        configuration=text,
        versions={text: text},
        hardware={text: text},
        notes=[text],
    )


def test_whatever_comes_from_outside_is_text_and_never_markup():
    plain, evil = _Page(render(_report())), _Page(render(_report(EVIL)))
    assert [tag for tag, _ in evil.elements] == [tag for tag, _ in plain.elements]
    assert not evil.all("script")
    assert evil.text == plain.text.replace("text", EVIL)


def test_the_report_asks_no_network_for_anything():
    html = render(_report())
    page = _Page(html)
    sources = [attributes.get("src") or attributes.get("href") for _, attributes in page.elements]
    assert all(source.startswith("data:") for source in sources if source)
    assert "url(" not in html
    assert "@import" not in html
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_every_image_is_in_the_file_with_its_prompt_and_its_verdict():
    report = _report("a photo of a ring")
    found = _Page(render(report)).all("img")
    assert [image["class"] for image in found] == ["passes", "fails", "passes", "passes"]
    assert all(image["alt"].startswith("a photo of a ring (") for image in found)
    expected = [*report.comparisons[0].base, *report.comparisons[0].tuned]
    for image, tensor in zip(found, expected, strict=True):
        data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(to_pil(tensor)))


def test_numbers_are_shown_with_sign_interval_and_share():
    text = _Page(render(_report())).text
    assert "\N{MINUS SIGN}0.125" in text
    assert "no interval \N{MIDDLE DOT} p < 0.001" in text
    assert "0.400 to 0.600" in text
    assert "30.0 s, 25.0 %" in text
    assert "2 min 00 s in all" in text


def test_table_headers_say_what_they_head():
    for header in _Page(render(_report())).all("th"):
        assert header["scope"] in ("col", "row")


def test_a_report_with_nothing_but_a_title_has_no_empty_parts():
    page = _Page(render(Report(title="only this")))
    assert page.text.split() == ["only", "this", "only", "this"]
    assert not page.all("section")


def test_the_same_run_gives_the_same_file_and_leaves_nothing_else_behind(tmp_path):
    first = write_report(tmp_path / "run" / "report.html", _report()).read_bytes()
    assert write_report(tmp_path / "run" / "report.html", _report()).read_bytes() == first
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["report.html"]


def test_two_evaluations_fill_headline_rows_and_pictures_in_the_suites_order():
    suite = ShapesSuite(num_prompts=18, images_per_prompt=2)
    base = run_suite(suite, renderer(suite, accuracy=0.0), keep_images=True)
    tuned = run_suite(suite, renderer(suite, accuracy=1.0), keep_images=True)
    assert headline(base, tuned, name="strict").difference.mean == 1
    rows = score_rows(base, tuned)
    assert [row.name for row in rows][:3] == ["single object", "two object", "counting"]
    assert rows[0].note == "2 prompts, 2 meanings"
    assert rows[-1].name == "overall"
    cards = comparisons(base, tuned, prompts_per_tag=1)
    assert [card.prompt for card in cards] == [prompt.text for prompt in suite.prompts()[:6]]
    assert cards[2].base_passed == [False, False]
    assert torch.equal(cards[2].tuned, tuned.images[4:6])


def test_comparisons_without_kept_images_are_refused_with_the_way_out():
    suite = ShapesSuite(num_prompts=6, images_per_prompt=1)
    evaluation = run_suite(suite, renderer(suite, accuracy=1.0))
    with pytest.raises(ValueError, match="keep_images=True"):
        comparisons(evaluation, evaluation)


def test_a_table_with_a_short_row_is_refused():
    with pytest.raises(ValueError, match="needs 2 cells"):
        Table(title="t", columns=["a", "b"], rows=[["only one"]])


def test_curves_run_from_corner_to_corner_and_break_where_a_value_is_missing():
    drawing = draw(Chart(title="t", curves=[Curve(name="a", x=[0, 1, 2, 3, 4], y=[0, 1, math.nan, 3, 4])]))
    x = [44 + 95.5 * i for i in range(5)]
    y = [192 - 45.5 * i for i in range(5)]
    assert drawing.lines[0].path == f"M{x[0]} {y[0]}L{x[1]} {y[1]}M{x[3]} {y[3]}L{x[4]} {y[4]}"
    assert [point.title for point in drawing.lines[0].points][-1] == "a: 4 at step 4"
    assert [tick.label for tick in drawing.y_ticks] == ["0", "1", "2", "3", "4"]


def test_a_band_goes_along_the_top_and_back_along_the_bottom():
    curve = Curve(name="a", x=[0, 1], y=[1, 1], low=[0, 0], high=[2, 2])
    assert draw(Chart(title="t", curves=[curve])).lines[0].band == "M44.0 10.0L426.0 10.0L426.0 192.0L44.0 192.0Z"


def test_a_band_that_is_far_wider_than_all_curves_is_cut_and_flattens_none():
    wild = Curve(name="a", x=[0, 1], y=[0.0, 1.0], low=[-100.0, -100.0], high=[100.0, 100.0])
    drawing = draw(Chart(title="t", curves=[wild]))
    assert [tick.label for tick in drawing.y_ticks] == ["-0.5", "0", "0.5", "1", "1.5"]
    assert drawing.lines[0].band == "M44.0 10.0L426.0 10.0L426.0 192.0L44.0 192.0Z"


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.5, 0.5], [math.nan, math.inf], [1e-9, 2e-9], [-5e7, 3e7]])
def test_every_curve_can_be_drawn_inside_its_frame(values):
    drawing = draw(Chart(title="t", curves=[Curve(name="a", x=list(range(len(values))), y=values)]))
    for point in drawing.lines[0].points:
        assert drawing.left <= point.x <= drawing.right
        assert drawing.top <= point.y <= drawing.bottom
    assert len(drawing.y_ticks) >= 2


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 17.0), (1e-6, 9e-6), (1234.0, 99999.0), (0.13, 0.14)])
def test_ticks_are_evenly_spaced_and_enclose_the_data(low, high):
    places = ticks(low, high)
    assert places[0] <= low
    assert places[-1] >= high
    assert 3 <= len(places) <= 8
    steps = np.diff(places)
    assert steps == pytest.approx(np.full(len(steps), steps[0]), rel=1e-5)


def test_curves_with_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="one length"):
        Curve(name="a", x=[0, 1], y=[0])
    with pytest.raises(ValueError, match="both or neither"):
        Curve(name="a", x=[0], y=[0], low=[0])


def test_a_long_curve_keeps_its_line_and_thins_only_its_hover_points():
    curve = Curve(name="a", x=list(range(1000)), y=list(range(1000)))
    line = draw(Chart(title="t", curves=[curve])).lines[0]
    assert line.path.count("L") == 999
    assert len(line.points) <= 120


def test_a_series_of_the_log_skips_rows_that_lack_it():
    rows = [{"step": 0, "a": 1}, {"step": 1}, {"step": 2, "a": None}, {"step": 3, "a": 4}]
    curve = curve_from_log(rows, "a", name="A")
    assert (curve.name, curve.x, curve.y) == ("A", [0, 3], [1, 4])
