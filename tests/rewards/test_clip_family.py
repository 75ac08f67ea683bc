"""PickScore and CLIPScore against the published formula, processor and model."""

import math
import re
import warnings

import pytest
import torch
from transformers import CLIPImageProcessor, CLIPModel

from flowalign.rewards import clip, clip_score, pickscore, pixels
from tests.rewards import tiny

PROMPTS = ["a photo of a red ring", "two dogs", "a photo of a red ring"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny.clip(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reward(folder):
    return pickscore.Config(model=folder, tokenizer=None, device="cpu", batch_size=2).build()


def published(folder, images, prompts):
    """The model's own logits on what the published processor and tokenizer make of Pillow pictures."""
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokens = tiny.words()(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    seen = processor(images=pixels.pictures(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=seen).logits_per_image
    return logits.diagonal(), model.logit_scale.exp().item()


def test_pickscore_is_the_published_models_logit(reward, folder):
    images = tiny.pictures()
    logits, _ = published(folder, images, PROMPTS)
    torch.testing.assert_close(reward(images, PROMPTS, [{}] * 3), logits, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("form", "factor"), [("cosine", 1.0), ("percent", 100.0)])
def test_clip_score_is_the_cosine(folder, form, factor):
    images = tiny.pictures()
    logits, scale = published(folder, images, PROMPTS)
    found = clip_score.Config(model=folder, form=form, device="cpu").build()(images, PROMPTS, [{}] * 3)
    torch.testing.assert_close(found, factor * logits / scale, atol=1e-5 * factor, rtol=1e-5)


def test_fixed_embeddings_give_the_published_units():
    cosine = (clip.unit(torch.tensor([[3.0, 4.0]])) * clip.unit(torch.tensor([[40.0, 30.0]]))).sum(-1)
    assert [round(float(clip_score.formed(cosine, form)), 5) for form in ("cosine", "percent", "hessel")] == [0.96, 96.0, 2.4]
    assert float(clip_score.formed(-cosine, "hessel")) == 0


def test_scores_do_not_depend_on_batch_mates(reward):
    images = tiny.pictures()
    whole = reward(images, PROMPTS, [{}] * 3)
    single = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1], [{}]) for i in range(3)])
    torch.testing.assert_close(whole, single, atol=1e-4, rtol=1e-5)


def test_the_gradient_is_that_of_the_score(reward):
    images = tiny.pictures(1, 32, 32).requires_grad_()
    reward(images, PROMPTS[:1], [{}]).sum().backward()
    direction = images.grad / images.grad.norm()
    assert math.isfinite(float(images.grad.norm()))
    step = 0.01

    def at(shift):
        with torch.enable_grad():
            moved = (images.detach() + shift * direction).clamp(0, 1).requires_grad_()
            return float(reward(moved, PROMPTS[:1], [{}]).detach())

    assert (at(step) - at(-step)) / (2 * step) == pytest.approx(float((images.grad * direction).sum()), rel=0.05)


def test_images_that_carry_no_gradient_build_no_graph(reward):
    assert not reward(tiny.pictures(), PROMPTS, [{}] * 3).requires_grad


def test_the_differentiable_path_differs_by_rounding_only(reward):
    images = tiny.pictures()
    exact = reward(images, PROMPTS, [{}] * 3)
    smooth = reward(images.clone().requires_grad_(), PROMPTS, [{}] * 3).detach()
    assert float((exact - smooth).abs().max()) < 0.01 * float(exact.abs().max())


def test_half_precision_stays_near(folder, reward):
    images = tiny.pictures()
    half = pickscore.Config(model=folder, tokenizer=None, device="cpu", dtype="bfloat16").build()(images, PROMPTS, [{}] * 3)
    assert float((half - reward(images, PROMPTS, [{}] * 3)).abs().max()) < 0.5  # of a scale of 14


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x * 255, r"image values from .* needed \[0, 1\]"),
        (lambda x: x * 2 - 1, r"image values from .* needed \[0, 1\]"),
        (lambda x: (x * 255).to(torch.uint8), "dtype torch.uint8, needed floats"),
        (lambda x: x[0], "needed floats"),
        (lambda x: x[:, :1], "needed floats"),
        (lambda x: x[:2], "got 2 images for 3 prompts"),
        (lambda x: x / 0, "not finite"),
    ],
)
def test_images_of_wrong_size_or_range_are_refused(reward, spoil, message):
    with pytest.raises(ValueError, match=message):
        reward(spoil(tiny.pictures()), PROMPTS, [{}] * 3)


def test_an_empty_prompt_is_refused_and_a_foreign_script_is_warned_of(reward):
    with pytest.raises(ValueError, match="pickscore: the prompt of sample 1 is empty"):
        reward(tiny.pictures(2), ["a", "  "], [{}] * 2)
    with pytest.warns(UserWarning, match="not in Latin script"):
        scores = reward(tiny.pictures(1), ["\u7ea2\u8272\u7684\u5706"], [{}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip.check_prompts(["ti\u1ebfng Vi\u1ec7t, caf\u00e9"], "here")  # Latin, with accents
    assert bool(torch.isfinite(scores).all())


def test_long_prompts_are_cut_with_a_warning(reward):
    with pytest.warns(UserWarning, match=r"'dog dog .*has (\d+) tokens; the model reads the first 77") as told:
        long = reward(tiny.pictures(1), ["dog " * 100], [{}])
    number = int(re.search(r"has (\d+) tokens", str(told[0].message))[1])
    assert number == len(reward.clip.tokenizer("dog " * 100)["input_ids"]) > 77
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert torch.equal(long, reward(tiny.pictures(1), ["dog " * 200], [{}]))


def test_missing_weights_say_how_to_get_them():
    with pytest.raises(FileNotFoundError, match="run: hf download no/such-model"):
        pickscore.Config(model="no/such-model", device="cpu").build()


def test_weights_of_another_model_are_refused_and_not_filled_with_noise(tmp_path, folder):
    model = CLIPModel.from_pretrained(folder)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("visual_projection")}
    model.save_pretrained(tmp_path, state_dict=state)
    tiny.words().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 1 weights of a CLIPModel, such as 'visual_projection.weight'"):
        clip_score.Config(model=str(tmp_path), device="cpu").build()


@pytest.mark.parametrize("size", [(48, 40), (32, 64), (33, 77), (20, 20)])
def test_preparation_equals_the_published_processor(size):
    images = tiny.pictures(2, *size)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    seen = processor(images=pixels.pictures(images), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels.prepare(images, size=32), seen, atol=1e-5, rtol=0)


def test_rounding_to_bytes_rounds_and_does_not_truncate():
    values = torch.tensor([0.0, 0.5, 0.999, 1.0, 127.6 / 255]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert pixels.to_bytes(values)[0, 0, 0].tolist() == [0, 128, 255, 255, 128]
