"""Fidelity and diversity of an evaluation: the unpaired kernel distance, what is left out and why, extractors and folders of images."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.image.kid import maximum_mean_discrepancy, poly_kernel
from transformers import Dinov2Config, Dinov2Model

from flowalign.config import ConfigError
from flowalign.core.randomness import generator
from flowalign.evaluate import distances
from flowalign.evaluate.distances import manifold, two_sample_distance
from flowalign.evaluate.extractors import Folder, encoder, of_network, random_features
from flowalign.evaluate.quality import COLUMNS, Reference, compare_quality, measure_quality
from flowalign.evaluate.suites import ShapesSuite
from flowalign.fidelity_options import extractor_of, ruler
from flowalign.images import save_png
from tests.evaluate.fakes import RedSuite


def draw(name, *shape):
    return torch.randn(*shape, generator=generator("quality", name), dtype=torch.float64)


def test_with_one_image_of_each_prompt_the_kernel_distance_is_torchmetrics_own():
    x, y = draw("x", 15, 4), draw("y", 15, 4) + 0.3  # theirs wants sets of one size
    expected = maximum_mean_discrepancy(poly_kernel(x, x), poly_kernel(x, y), poly_kernel(y, y))
    assert two_sample_distance(x, y, range(15)).mean == pytest.approx(float(expected), rel=1e-12)


def test_its_interval_is_the_jackknife_over_prompts_and_reference_images_written_out(monkeypatch):
    prompt = [3, 3, 8, 5, 5, 5, 9]
    x, y = draw("x", 7, 3), draw("y", 5, 3)

    def estimate(ids, rows):
        means = {p: [i for i, q in enumerate(prompt) if q == p] for p in ids}
        kernel = lambda a, b: float(((a @ b.T / 3 + 1) ** 3).mean())  # noqa: E731
        pairs = [kernel(x[means[p]], x[means[q]]) for p in ids for q in ids if p != q]
        others = [kernel(y[[i]], y[[j]]) for i in rows for j in rows if i != j]
        crossed = [kernel(x[means[p]], y[[i]]) for p in ids for i in rows]
        return sum(pairs) / len(pairs) + sum(others) / len(others) - 2 * sum(crossed) / len(crossed)

    def spread(values):
        mean = sum(values) / len(values)
        return (len(values) - 1) / len(values) * sum((value - mean) ** 2 for value in values)

    ids, rows = [3, 5, 8, 9], list(range(5))
    wanted = spread([estimate([q for q in ids if q != p], rows) for p in ids]) + spread(
        [estimate(ids, [j for j in rows if j != i]) for i in rows]
    )
    found = two_sample_distance(x, y, prompt)
    assert found.mean == pytest.approx(estimate(ids, rows), rel=1e-10)
    assert (found.high - found.mean) / 1.959964 == pytest.approx(math.sqrt(wanted), rel=1e-6)
    monkeypatch.setattr(distances, "_ROWS", 2)
    assert two_sample_distance(x, y, prompt).high == pytest.approx(found.high, rel=1e-12)


def test_pairs_of_one_prompt_do_not_bias_it():
    means = []
    for seed in range(200):
        centres = draw(f"c{seed}", 8, 2)
        x = (centres[:, None] + 0.1 * draw(f"x{seed}", 8, 4, 2)).flatten(0, 1)
        y = draw(f"y{seed}", 20, 2) + 0.1 * draw(f"z{seed}", 20, 2)
        means.append(two_sample_distance(x, y, torch.arange(8).repeat_interleave(4).tolist()).mean)
    values = torch.tensor(means)
    assert abs(float(values.mean())) < 3 * float(values.std()) / 200**0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: two_sample_distance(draw("x", 4, 2), draw("y", 9, 2), [0, 0, 1, 1]),
            "got 2 prompts and 9 reference images, needed at least 3",
        ),
        (lambda: two_sample_distance(draw("x", 4, 2), draw("y", 2, 2), range(4)), "got 4 prompts and 2 reference images"),
        (lambda: two_sample_distance(draw("x", 4, 2), draw("y", 9, 3), range(4)), r"needed \[image, d\]"),
        (lambda: measure_quality(draw("x", 4, 2), range(3), None), "prompt_id: got 3 for 4 images"),
        (lambda: random_features().features([]), "images: got none"),
    ],
)
def test_too_few_and_unlike_sets_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_cannot_be_measured_is_left_out_with_its_reason_and_the_rest_is_there():
    x, y = draw("x", 12, 20), draw("y", 30, 20)
    found = measure_quality(x, torch.arange(12).div(2, rounding_mode="floor").tolist(), Reference(name="r", features=y))
    assert found.frechet_distance is None
    assert "got 12 images for features of 20 numbers" in found.missing["frechet_distance"]
    assert found.density.mean == manifold(x, y).density
    assert found.recall.mean == manifold(x, y, neighbours=3).recall
    assert set(found.missing) == {"frechet_distance"}
    single = measure_quality(x, range(12), None)
    assert single.diversity is single.vendi is single.kernel_distance is None
    assert "needs at least 2 images" in single.missing["diversity"]


def test_a_collapsed_model_loses_diversity_and_recall_and_real_images_stand_beside_it():
    prompt = torch.arange(60).div(3, rounding_mode="floor").tolist()
    real, control, base = draw("r", 60, 4), draw("c", 60, 4), draw("b", 60, 4)
    collapsed = base[::3].repeat_interleave(3, 0) * 0.1
    reference = Reference(name="real", features=real, is_paired=True, control=control)
    found = compare_quality(collapsed, prompt, other=base, reference=reference, extractor="e", resize="none")
    assert found.relative["diversity"].high == 0
    assert found.relative["vendi"].high < 1
    assert found.model.recall.high < 0.2 < found.real.recall.low
    assert found.model.frechet_distance.low > found.real.frechet_distance.high
    assert found.model.kernel_distance.low > 0
    assert found.real.kernel_distance.low < 0 < found.real.kernel_distance.high
    assert {len(row) for row in found.rows()} == {len(COLUMNS)}
    assert any("60 and 60 images it is biased upwards" in text for text in found.cautions)
    assert any("not the bias of few images" in text for text in found.cautions)
    assert all(str(vars(found.model)[name]) in [row[2] for row in found.rows()] for name in ("frechet_distance", "recall", "coverage"))
    few = compare_quality(
        base[:6], [0, 0, 1, 1, 2, 2], other=None, reference=Reference(name="f", features=real), extractor="e", resize="none"
    )
    assert any("over 3 prompts" in text for text in few.cautions)
    assert any("here 6 and 60" in text for text in few.cautions)
    with pytest.raises(ValueError, match=r"other: got features \(59, 4\)"):
        compare_quality(base, prompt, other=base[1:], reference=None, extractor="e", resize="none")


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56)).save_pretrained(
        folder
    )
    return folder


def test_an_encoder_resizes_and_its_features_are_its_class_token(dino):
    found = encoder(str(dino), device="cpu")
    assert "@" in found.name
    images = [torch.rand(3, *size, generator=generator(1)) for size in ((64, 48), (64, 48), (224, 224))]
    features = found.features(images)
    assert features.shape == (3, 16)
    seen = ((images[2] * 255).round() / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    expected = Dinov2Model.from_pretrained(dino)(pixel_values=seen[None]).last_hidden_state[:, 0]
    assert torch.allclose(features[2].float(), expected[0], atol=1e-4)


def test_what_is_no_image_encoder_is_refused(tmp_path):
    from tests.rewards import tiny

    tiny.clip(tmp_path)
    with pytest.raises(ValueError, match="is a CLIPModel, needed an image encoder"):
        encoder(str(tmp_path), device="cpu")
    with pytest.raises(FileNotFoundError, match="hf download no/such"):
        encoder("no/such")


def mine():
    """An extractor of a user's own."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 5))


def wrong():
    return "not a network"


def test_an_extractor_of_ones_own_is_named_with_its_weights_and_checked():
    found = extractor_of("tests.evaluate.test_quality.mine")
    assert found.name.startswith("tests.evaluate.test_quality.mine@")
    assert found.name == of_network("tests.evaluate.test_quality.mine", mine()).name
    images = torch.rand(4, 3, 8, 8, generator=generator(0))
    assert torch.allclose(found.features(images), mine()(images).double())
    with pytest.raises(ConfigError, match="there is no function 'mien' in a module"):
        extractor_of("tests.evaluate.test_quality.mien")
    with pytest.raises(ConfigError, match="there is no function 'b' in a module 'no_such'"):
        extractor_of("no_such.b")
    with pytest.raises(ConfigError, match="returned str, needed a torch.nn.Module"):
        extractor_of("tests.evaluate.test_quality.wrong")
    with pytest.raises(ValueError, match=r"returned \(4, 3, 8, 8\) for 4 images"):
        of_network("same", torch.nn.Identity()).features(images)
    with pytest.raises(ValueError, match="not finite"):
        of_network("same", torch.nn.Flatten()).features(images * math.nan)


@pytest.fixture
def folder(tmp_path):
    for number in range(8):
        save_png(torch.rand(3, 16, 12, generator=generator("image", number)), tmp_path / "in" / f"{number}.png")
    return tmp_path


def test_a_folders_images_come_as_they_are_and_what_is_transparent_stands_on_white(folder):
    found = Folder.of(folder)
    images = list(found.images())
    assert torch.allclose(images[3], torch.rand(3, 16, 12, generator=generator("image", 3)), atol=0.5 / 255 + 1e-6)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(folder / "a.png")
    assert torch.equal(next(iter(Folder.of(folder).images())), torch.ones(3, 4, 4))


def test_pixels_of_16_bits_are_brought_to_8_and_other_kinds_are_named(tmp_path):
    levels = np.array([[0, 257, 1000], [32896, 65278, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    (image,) = Folder.of(tmp_path).images()
    assert torch.equal((image * 255).round().to(torch.uint8), torch.tensor([[[0, 1, 4], [128, 254, 255]]] * 3, dtype=torch.uint8))
    Image.fromarray(np.ones((2, 3), dtype=np.int32)).convert("F").save(tmp_path / "b.bmp", format="TIFF")
    with pytest.raises(ValueError, match=r"b.bmp: cannot be read \(its pixels are of kind 'F'"):
        list(Folder.of(tmp_path).images())


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_files_that_end_too_early_are_named(folder, kind):
    path = folder / f"a.{kind}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    assert (64, 64) in Folder.of(folder).sizes()
    with pytest.raises(ValueError, match=rf"a.{kind}: cannot be read \(.*truncated"):
        list(Folder.of(folder).images())


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_photographs_are_turned_as_the_camera_was_held(tmp_path, kind):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # the first quarter
    note = Image.Exif()
    for orientation, turned in ((1, upright), (3, upright[::-1, ::-1]), (6, np.rot90(upright)), (8, np.rot90(upright, -1))):
        note[274] = orientation
        Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / f"a.{kind}", exif=note)
        assert list(Folder.of(tmp_path).sizes()) == [(16, 32)]
        (image,) = Folder.of(tmp_path).images()
        assert torch.allclose(image, torch.from_numpy(upright).permute(2, 0, 1) / 255, atol=0.1)


def test_real_images_of_another_size_too_few_or_unreadable_are_refused_before_anything_is_generated(folder, dino):
    suite = RedSuite(["ab", "abc", "abcd"])
    asked = {"folder": folder, "extractor": None, "image_size": (16, 12)}
    assert ruler(suite, **asked).reference.features.shape == (8, 416)
    with pytest.raises(ConfigError, match=r"0.png has 12 x 16 pixels, the model's images have 32 x 32; the extractor .* resizes nothing"):
        ruler(suite, **{**asked, "image_size": (32, 32)})
    assert ruler(suite, **{**asked, "image_size": (32, 32), "extractor": str(dino)}).reference.features.shape == (8, 16)
    with pytest.raises(ConfigError, match="the suite's prompts: got 2, needed at least 3"):
        ruler(RedSuite(["ab", "abc"], images_per_prompt=4), **asked)
    with pytest.raises(ConfigError, match="the suite's images: got 3, needed at least 6"):
        ruler(RedSuite(["ab", "abc", "abcd"], images_per_prompt=1), **asked)
    (folder / "in" / "0.png").write_text("no image")
    with pytest.raises(ValueError, match=r"0.png: is no image that can be read"):
        ruler(suite, **asked)
    for number in range(3):
        (folder / "in" / f"{number}.png").unlink()
    with pytest.raises(ConfigError, match="images: got 5, needed at least 6"):
        ruler(suite, **asked)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        ruler(suite, **{**asked, "folder": folder / "empty"})
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ruler(suite, **{**asked, "folder": folder / "away"})


def test_the_shapes_suite_brings_real_images_and_others_measure_nothing_that_was_not_asked_for():
    suite = ShapesSuite(num_prompts=12, images_per_prompt=2)
    found = ruler(suite, folder=None, extractor=None, image_size=(32, 32))
    assert found.reference.is_paired
    assert found.reference.features.shape == found.reference.control.shape == (24, 416)
    assert ruler(RedSuite(["ab"]), folder=None, extractor=None, image_size=(8, 8)) is None
    assert ruler(RedSuite(["ab"]), folder=None, extractor="random", image_size=(8, 8)).reference is None
