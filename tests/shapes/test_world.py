import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

import flowalign.shapes as shapes
from flowalign.shapes.prompts import all_prompts, held_out_meanings, meaning
from flowalign.shapes.world import COLORS, SHAPES, TAGS, draw


def of_tag(tag, num, split="train"):
    records = [record for record in all_prompts(split) if record["tag"] == tag]
    return [records[i % len(records)] for i in range(num)]


@pytest.mark.parametrize("tag", TAGS)
def test_clean_renders_pass(tag):
    records = of_tag(tag, 600)
    verdict = shapes.verify(shapes.render(records, seed=1), records)
    assert verdict.strict.double().mean() >= 0.995
    assert (verdict.graded[verdict.strict] == 1).all()


@pytest.mark.parametrize("tag", TAGS)
def test_slight_blur_and_noise_are_forgiven_and_strong_ones_are_not(tag):
    records = of_tag(tag, 200)
    images = shapes.render(records, seed=2)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))

    def passed(changed):
        return float(shapes.verify(changed.clamp(0, 1), records).strict.double().mean())

    assert passed(gaussian_blur(images, 7, 0.4)) > 0.98
    assert passed(images + 0.03 * noise) > 0.98
    assert passed(images + 0.2 * noise) < 0.02
    assert passed(0.25 * images + 0.75) < 0.05  # everything is there, but as a faint ghost
    if tag in ("colors", "color_attr"):
        assert passed(0.5 * images + 0.5) < 0.05  # half faded; where no colour is asked for, a half-faded red is a pink


@pytest.mark.parametrize("tag", TAGS)
def test_the_obvious_cheats_get_nothing(tag):
    records = of_tag(tag, 16)
    num = len(records)
    generator = torch.Generator().manual_seed(0)

    def fill(shape, color):
        image = torch.arange(num).repeat_interleave(16)
        cell = torch.arange(16).repeat(num)
        return draw(image, cell, shape.expand(num * 16), color.expand(num * 16), torch.zeros(num * 16, 2), num)

    blank = torch.ones(num, 3, 32, 32)
    blob = blank.clone()
    blob[:, :, 4:28, 4:28] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    cheats = {
        "blank": blank,
        "noise": torch.rand(blank.shape, generator=generator),
        "grey": torch.full_like(blank, 0.5),
        "blob": blob,
        "tiling": fill(torch.tensor([SHAPES.index(records[0]["include"][0]["class"])]), torch.tensor([0])),
        "all colours": fill(torch.arange(16).repeat(num) % len(SHAPES), torch.arange(16).repeat(num) % len(COLORS)),
    }
    for name, images in cheats.items():
        verdict = shapes.verify(images, records)
        assert not verdict.strict.any(), name
        assert verdict.graded.max() == 0, name


def test_an_image_of_another_prompt_fails():
    records = [record for tag in TAGS for record in of_tag(tag, 60)]
    images = shapes.render(records, seed=3)
    moved = records[1:] + records[:1]
    wrong = [meaning(a) != meaning(b) for a, b in zip(records, moved, strict=True)]
    verdict = shapes.verify(images, moved)
    assert verdict.strict[torch.tensor(wrong)].double().mean() < 0.05


@pytest.mark.parametrize(
    ("found", "wanted", "graded"),
    [(2, 3, 2 / 3), (3, 3, 1.0), (4, 3, 3 / 4 * (1 - 1 / 5)), (4, 2, 2 / 4 * (1 - 2 / 4))],
)
def test_counts_get_partial_credit_and_excess_costs(found, wanted, graded):
    zero = torch.zeros(found, dtype=torch.long)
    images = draw(zero, torch.arange(found), zero, zero, torch.zeros(found, 2), 1)
    record = {"tag": "counting", "include": [{"class": "circle", "count": wanted}]}
    verdict = shapes.verify(images, [record])
    assert verdict.graded.item() == pytest.approx(graded)
    assert verdict.strict.item() == (found == wanted)


def test_a_wrong_relation_loses_the_position_clause_alone():
    record = {"tag": "position", "include": [{"class": "ring", "count": 1}, {"class": "bar", "count": 1, "position": ["left of", 0]}]}
    ring, bar = SHAPES.index("ring"), SHAPES.index("bar")
    zero = torch.zeros(2, dtype=torch.long)
    right = draw(zero, torch.tensor([6, 4]), torch.tensor([ring, bar]), zero, torch.zeros(2, 2), 1)
    wrong = draw(zero, torch.tensor([4, 6]), torch.tensor([ring, bar]), zero, torch.zeros(2, 2), 1)
    assert shapes.verify(right, [record]).strict.item()
    verdict = shapes.verify(wrong, [record])
    assert verdict.clauses[0, verdict.clauses_valid[0]].tolist() == [True, True, False, True]
    assert verdict.graded.item() == pytest.approx(2 / 3)


def test_no_meaning_is_in_both_splits_in_any_wording():
    train, held = ({meaning(record) for record in all_prompts(split)} for split in ("train", "heldout"))
    assert not train & held
    assert held == held_out_meanings()
    mirrored = {"tag": "position", "include": [{"class": "bar", "count": 1}, {"class": "moon", "count": 1, "position": ["above", 0]}]}
    inverse = {"tag": "position", "include": [{"class": "moon", "count": 1}, {"class": "bar", "count": 1, "position": ["below", 0]}]}
    assert meaning(mirrored) == meaning(inverse)


def test_every_tag_has_held_out_prompts_and_the_schema_of_geneval():
    records = shapes.prompts("heldout", seed=0, num=120)
    assert {record["tag"] for record in records} == set(TAGS)
    assert len({record["prompt"] for record in records}) == 120
    for record in records:
        assert set(record) <= {"tag", "include", "exclude", "prompt"}
        assert all({"class", "count"} <= set(clause) <= {"class", "count", "color", "position"} for clause in record["include"])
    counting = next(record for record in records if record["tag"] == "counting")
    assert counting["exclude"] == [{"class": counting["include"][0]["class"], "count": counting["include"][0]["count"] + 1}]


def test_prompts_and_renders_depend_on_the_seed_alone():
    assert shapes.prompts("train", seed=1, num=50) == shapes.prompts("train", seed=1, num=50)
    assert shapes.prompts("train", seed=1, num=50) != shapes.prompts("train", seed=2, num=50)
    records = shapes.prompts("train", seed=1, num=10)
    assert torch.equal(shapes.render(records, seed=5), shapes.render(records, seed=5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shapes.prompts("test"), "needed 'train' or 'heldout'"),
        (lambda: shapes.prompts("heldout", num=10_000), "needed 1 to"),
        (lambda: shapes.render([{"tag": "x", "include": [{"class": "dog", "count": 1}]}], 0), "class 'dog' is not in"),
        (lambda: shapes.verify(torch.ones(1, 3, 64, 64), [{}]), "needed \\(batch, 3, 32, 32\\)"),
        (lambda: shapes.verify(torch.full((1, 3, 32, 32), float("nan")), [{}]), "not finite"),
        (lambda: shapes.verify(torch.ones(2, 3, 32, 32), [{}]), "got 1 records for 2 images"),
    ],
)
def test_bad_input_is_refused_with_what_is_needed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_both_tokenizers_are_written_down_and_know_every_word():
    from flowalign.shapes import models

    clip, t5 = models.clip_tokenizer(), models.t5_tokenizer()
    assert all(len(clip(word).input_ids) == 3 for word in models.words())
    assert all(len(t5(word).input_ids) == 2 for word in models.words())
    assert clip("a photo of a purple triangle and a yellow circle").input_ids == [161, 26, 120, 160, 26, 89, 60, 152, 26, 95, 79, 162]


def test_pretraining_draws_no_held_out_prompt():
    from flowalign.shapes.pretrain import draw_records

    drawn = draw_records(3000, torch.Generator().manual_seed(0))
    assert not {meaning(record) for record in drawn} & held_out_meanings()
