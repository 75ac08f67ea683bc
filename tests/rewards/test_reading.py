"""OCR and diversity."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import Dinov2Config, Dinov2Model

from flowalign.rewards import diversity, letters, ocr

RULE = [
    ("Hello World", 1.0),
    ("Helo World", 0.9),
    ("Hell0 W0rld", 0.8),
    ("xxHello Worldyy", 1.0),
    ("", 0.0),
    ("dlroW olleH", 0.4),
    ("HelloWorldHelloWorld", 1.0),
]


@pytest.mark.parametrize(("read", "score"), RULE)
def test_the_published_rule(read, score):
    assert ocr.agreement(read, "Hello World", "flow_grpo") == pytest.approx(score)


def test_further_text_costs_unless_the_published_rule_is_asked_for():
    assert ocr.agreement("Hello World", "Hello World", "edit") == 1
    assert ocr.agreement("HelloWorldHelloWorld", "Hello World", "edit") == 0.5
    assert ocr.agreement("hello world", "Hello World", "exact") == 1
    assert ocr.agreement("hello worlds", "Hello World", "exact") == 0


def slow_distance(one, two):
    if not one or not two:
        return len(one) + len(two)
    return min(slow_distance(one[1:], two) + 1, slow_distance(one, two[1:]) + 1, slow_distance(one[1:], two[1:]) + (one[0] != two[0]))


def test_the_edit_distance_is_the_least_number_of_edits():
    draw = np.random.default_rng(0)
    for _ in range(30):
        one, two = ("".join(draw.choice(list("abc"), draw.integers(0, 6))) for _ in range(2))
        assert ocr.edit_distance(one, two) == slow_distance(one, two)


def test_the_wanted_text_comes_from_the_record_or_the_first_quotes():
    assert ocr.target_of('says "Open" and "Shut"', {}) == "Open"
    assert ocr.target_of("says \u201cOpen\u201d", {}) == "Open"
    assert ocr.target_of('says "Open"', {"target_text": "Closed"}) == "Closed"
    for prompt, record in (("a sign", {}), ('says " "', {}), ("a sign", {"target_text": ""}), ('says ""', {})):
        with pytest.raises(ValueError, match="wants no text; quote it"):
            ocr.target_of(prompt, record)


def test_boxes_are_read_row_by_row():
    def box(left, top, right, bottom):
        return [[left, top], [right, top], [right, bottom], [left, bottom]]

    boxes = np.array([box(50, 12, 90, 30), box(0, 40, 50, 60), box(0, 10, 40, 30), box(60, 38, 90, 58)], dtype=float)
    assert ocr.reading_order(boxes) == [2, 0, 1, 3]


def sign(lines, size=128, color=(20, 20, 60)):
    picture = Image.new("RGB", (size, size), color)
    for row, line in enumerate(lines):
        ImageDraw.Draw(picture).text((8, 10 + 45 * row), line, font=ImageFont.load_default(size=28), fill="white")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="module")
def rapid():
    pytest.importorskip("rapidocr")
    return ocr.Config().build()


def test_rapidocr_reads_what_is_written(rapid):
    images = torch.stack([sign(["Hello", "World"]), sign(["Closed"], color=(10, 60, 10)), sign([])])
    scores = rapid(images, ['a sign "Hello World"', 'a sign "Closed"', 'a sign "Closed"'], [{}] * 3)
    assert scores.tolist() == [1, 1, 0]


# The lines of two characters on a grid of 10 x 10: together "exit". No font with Chinese letters comes with what is installed.
EXIT = {
    "\u51fa": [(5, 0, 5, 9), (1, 1, 1, 4), (9, 1, 9, 4), (1, 4, 9, 4), (0, 6, 0, 9), (10, 6, 10, 9), (0, 9, 10, 9)],
    "\u53e3": [(1, 1, 9, 1), (1, 9, 9, 9), (1, 1, 1, 9), (9, 1, 9, 9)],
}


def test_rapidocr_reads_chinese(rapid):
    picture = Image.new("RGB", (128, 128), (20, 20, 60))
    for place, lines in enumerate(EXIT.values()):
        for line in lines:
            left, top, right, bottom = (4 * number for number in line)
            shift = 16 + 51 * place
            ImageDraw.Draw(picture).line((left + shift, top + 40, right + shift, bottom + 40), fill="white", width=4)
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    prompt = f'a sign that says "{"".join(EXIT)}"'
    rapid.check({"prompt": prompt})
    assert rapid(image, [prompt], [{}]).tolist() == [1]
    assert rapid(image, ['"\u5165\u53e3"'], [{}]).tolist() == [0.5]  # "entrance" shares a character


def test_full_width_letters_are_letters():
    assert ocr.normal("\uff2f\uff50\uff45\uff4e") == "open"


@pytest.mark.parametrize(
    "text",
    [
        "\u0412\u044b\u0445\u043e\u0434",
        "\u0645\u0631\u062d\u0628\u0627",
        "\u0e2d\u0e2d\u0e01",
        "\u0928\u092e",
        "\ucd9c\uad6c",
        "Vi\u1ec7t",
        "\u05d9\u05e6",
    ],
    ids=["cyrillic", "arabic", "thai", "hindi", "korean", "vietnamese", "hebrew"],
)
def test_letters_that_rapidocr_does_not_know_are_refused_before_anything_is_sampled(rapid, text):
    with pytest.raises(ValueError, match=r"wanted text '.*' holds '.*', which RapidOCR's model does not know; take engine: tesseract"):
        rapid.check({"prompt": f'says "{text}"'})


@pytest.mark.parametrize(
    "text", ["Caf\u00e9 24/7!", "Gr\u00f6\u00dfe", "\u0141\u00f3d\u017a", "\u51fa\u53e3", "\u3072\u3089", "\u03b1\u03b2", "\uff2f\uff50"]
)
def test_letters_that_rapidocr_knows_are_taken(rapid, text):
    rapid.check({"prompt": f'says "{text}"'})


def test_foreign_letters_are_those_that_are_not_latin():
    assert letters.foreign("Caf\u00e9 Vi\u1ec7t Th\u01b0\u01a1ng \uff2f\uff50 5 \u00b5m, 24/7!") == []
    assert letters.foreign("open \u5f00\u0412\u5f00") == ["\u5f00", "\u0412"]


def test_a_prompt_without_text_is_refused_before_anything_is_sampled(rapid):
    with pytest.raises(ValueError, match="wants no text"):
        rapid.check({"prompt": "a dog"})


def test_tesseract_says_what_is_missing():
    pytesseract = pytest.importorskip("pytesseract")
    try:
        pytesseract.get_tesseract_version()
    except pytesseract.TesseractNotFoundError:
        with pytest.raises(FileNotFoundError, match="apt install tesseract-ocr"):
            ocr.Config(engine="tesseract").build()
        return
    reward = ocr.Config(engine="tesseract").build()
    assert float(reward(sign(["Closed"])[None], ['a sign "Closed"'], [{}])) == 1
    with pytest.raises(ValueError, match="does not read"):
        reward.check({"prompt": 'says "\u5f00\u95e8"'})


def test_diversity_is_the_mean_distance_within_a_prompt():
    images = torch.tensor([0.0, 0.5, 1.0, 0.3, 0.3])[:, None, None, None].expand(5, 3, 16, 16)
    found = diversity.Config().build()(images, ["a", "a", "a", "b", "b"], [{}] * 5)
    assert found.tolist() == pytest.approx([0.75, 0.5, 0.75, 0, 0])
    with pytest.raises(ValueError, match="one image of 'b'"):
        diversity.Config().build()(images[:4], ["a", "a", "a", "b"], [{}] * 4)


def test_diversity_with_an_encoder_is_one_minus_the_cosine(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14, "mlp_ratio": 2}
    model = Dinov2Model(Dinov2Config(**sizes)).eval()
    model.save_pretrained(tmp_path)
    reward = diversity.Config(model=str(tmp_path), size=28, device="cpu", batch_size=2).build()
    images = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = reward(images, ["a"] * 3, [{}] * 3)
    mean, std = (torch.tensor(x)[:, None, None] for x in (diversity.IMAGENET_MEAN, diversity.IMAGENET_STD))
    rows = model(pixel_values=(images - mean) / std).last_hidden_state[:, 0]
    cosine = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    torch.testing.assert_close(found, (3 - cosine.sum(1)) / 2, atol=1e-5, rtol=1e-4)
    found.sum().backward()
    assert float(images.grad.norm()) > 0
