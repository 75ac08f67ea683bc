"""The detector: post-processing against a literal reference, and colours and channels on a tiny Mask2Former."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import CLIPModel
from transformers import Mask2FormerForUniversalSegmentation as Mask2Former

from flowalign.evaluate.geneval_suite import GenEvalSuite
from flowalign.rewards import geneval, geneval_detector, weights
from flowalign.rewards.geneval_detector import Detection
from flowalign.rewards.geneval_prompts import COLORS, colors, single_object, two_object
from tests.rewards import tiny


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Mask2Former(tiny.detector_config()).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, model):
    detector, clip = tmp_path_factory.mktemp("m2f"), tmp_path_factory.mktemp("clip")
    model.save_pretrained(detector)
    tiny.clip(clip)
    return str(detector), str(clip)


def literal(logits, masks, *, padded, inner, size):
    """Every step for every query and class in plain loops, as the fusion head of mmdet does them."""
    enlarged = functional.interpolate(masks[None], padded, mode="bilinear", align_corners=False)[:, :, : inner[0], : inner[1]]
    full = functional.interpolate(enlarged, size, mode="bilinear", align_corners=False)[0].double().numpy()
    shifted = np.exp(logits.double().numpy() - logits.double().numpy().max(1, keepdims=True))
    share = shifted / shifted.sum(1, keepdims=True)
    ranked = sorted(((share[q, c], q, c) for q in range(len(share)) for c in range(80)), reverse=True)[:100]
    found = []
    for probability, q, c in ranked:
        on = full[q] > 0
        mean = (1 / (1 + np.exp(-full[q])) * on).sum() / (on.sum() + 1e-6)
        ys, xs = np.nonzero(on)
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else (0, 0, 0, 0)
        found.append((c, probability * mean, tuple(map(float, box)), int(on.sum())))
    return sorted(found, key=lambda one: -one[1])


@pytest.mark.parametrize("geometry", [((64, 96), (50, 90), (100, 180)), ((64, 64), (64, 64), (40, 40)), ((96, 64), (77, 64), (96, 80))])
def test_post_processing_is_that_of_mmdet(geometry):
    padded, inner, size = geometry
    draw = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(30, 81, generator=draw)
    masks = functional.interpolate(4 * torch.randn(1, 30, 4, 4, generator=draw), (padded[0] // 4, padded[1] // 4), mode="bilinear")[0] - 1
    sizes = {"padded": padded, "inner": inner, "size": size}
    wanted = literal(logits, masks, **sizes)
    every = geneval_detector.instances(logits, masks, range(80), 0.0, **sizes)
    assert len(every) == sum(score > 0 for _, score, _, _ in wanted) > 50
    for one, (label, score, box, area) in zip(every, wanted, strict=False):
        assert one.score == pytest.approx(score, abs=1e-6)
        assert (one.label, one.box, int(one.mask.sum())) == (label, box, area)
    few = geneval_detector.instances(logits, masks, [3, 17], 0.3, **sizes)
    assert [(one.label, one.box) for one in few] == [(one.label, one.box) for one in every if one.label in (3, 17) and one.score > 0.3]


@pytest.mark.parametrize(
    ("size", "inner"), [((512, 512), (800, 800)), ((512, 768), (800, 1200)), ((300, 900), (444, 1333)), ((1024, 1024), (800, 800))]
)
def test_images_are_scaled_like_mmdets_and_padded_below_and_right(size, inner):
    seen, found = geneval_detector.prepare(torch.full((1, 3, *size), 0.2))
    assert found == inner
    assert seen.shape[2] % 32 == seen.shape[3] % 32 == 0
    assert seen.shape[2] - inner[0] < 32
    assert seen.shape[3] - inner[1] < 32

    def normal(level):
        return torch.tensor([(level - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))])[:, None]

    is_padding = torch.ones(seen.shape[2:], dtype=torch.bool)
    is_padding[: inner[0], : inner[1]] = False
    # Grey 128 is padded before normalisation; the image is another grey.
    torch.testing.assert_close(seen[0][:, is_padding], normal(128 / 255).expand(3, int(is_padding.sum())), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0][:, ~is_padding], normal(51 / 255).expand(3, inner[0] * inner[1]), atol=1e-5, rtol=0)


def test_channels_stay_red_green_blue():
    red = torch.zeros(1, 3, 64, 64)
    red[:, 0] = 1
    seen, _ = geneval_detector.prepare(red)
    assert seen[0, :, 0, 0].tolist() == pytest.approx([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], abs=1e-5)


def test_weights_that_published_files_lack_play_no_part(model):
    pixel = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(pixel_values=pixel)
        moved = Mask2Former(tiny.detector_config()).eval()
        moved.load_state_dict(model.state_dict())
        names = [name for name in moved.state_dict() if name.startswith(geneval_detector.UNNEEDED)]
        assert len(names) == 3
        for name in names:
            moved.state_dict()[name].fill_(7.0)
        after = moved(pixel_values=pixel)
    assert torch.equal(before.class_queries_logits, after.class_queries_logits)
    assert torch.equal(before.masks_queries_logits, after.masks_queries_logits)


def quick(folder):
    """The tiny CLIP with OpenAI's activation."""
    model = CLIPModel.from_pretrained(folder)
    for tower in (model.config.text_config, model.config.vision_config):
        tower.hidden_act = "quick_gelu"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward(folders):
    detector, clip = folders
    return geneval.Config(detector=detector, clip=quick(clip), device="cpu", batch_size=2).build()


def test_a_clip_with_another_activation_is_refused(folders, tmp_path):
    tiny.clip(tmp_path)
    model = CLIPModel.from_pretrained(tmp_path)
    model.config.text_config.hidden_act = model.config.vision_config.hidden_act = "gelu"
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hidden_act 'gelu', needed 'quick_gelu'"):
        geneval.Config(detector=folders[0], clip=str(tmp_path), device="cpu").build()


def test_colours_are_named_by_the_nearest_mean_of_three_phrases(reward):
    namer = reward.color_of
    rows = []
    for color in ("red", "white"):
        texts = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
        rows.append(functional.normalize(namer.clip.texts(texts).mean(0), dim=0))
    classifier = namer.classifier("dog")
    torch.testing.assert_close(classifier[0], rows[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(classifier[9], rows[1], atol=1e-5, rtol=1e-4)


def test_an_object_is_cut_out_on_grey():
    image = torch.rand(3, 20, 30)
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[5:9, 10:16] = True
    mask[5, 10] = False
    cut = geneval.crop(image, Detection(label=0, score=1, box=(10, 5, 16, 9), mask=mask))
    assert cut.shape == (3, 4, 6)
    assert cut[:, 0, 0].tolist() == pytest.approx([0.6] * 3)
    assert torch.equal(cut[:, 1:], image[:, 6:9, 10:16])


def test_verdicts_do_not_depend_on_batch_mates_and_clauses_have_their_columns(reward):
    records = [single_object("dog"), two_object("dog", "cat"), colors("dog", "red")]
    images = tiny.pictures(3, 64, 64)
    texts = [record["prompt"] for record in records]
    whole = reward(images, texts, records)
    for row in range(3):
        one = reward(images[row : row + 1], texts[row : row + 1], records[row : row + 1])
        assert torch.equal(one.values["graded"], whole.values["graded"][row : row + 1])
    assert whole.clauses_valid.sum(1).tolist() == [1, 2, 2]


def test_records_and_images_that_cannot_be_judged_are_named(reward):
    with pytest.raises(ValueError, match=r"sample 0 \(prompt 'x'\): needs GenEval metadata"):
        reward(tiny.pictures(1, 64, 64), ["x"], [{"prompt": "x"}])
    with pytest.raises(ValueError, match=r"needed \[0, 1\]"):
        reward(tiny.pictures(1, 64, 64) * 2, ["x"], [single_object("dog")])


def test_missing_weights_say_what_to_do():
    with pytest.raises(FileNotFoundError, match="hf download facebook/mask2former.*flowalign geneval convert FILE.pth"):
        geneval.Config(device="cpu").build()


def test_a_detector_of_other_classes_is_refused(tmp_path):
    config = tiny.detector_config()
    config.num_labels = 5
    Mask2Former(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="knows 5 classes, needed the 80"):
        geneval.Config(detector=str(tmp_path), device="cpu").build()


def test_the_name_tells_weights_apart(folders, reward, tmp_path):
    one, clip = reward.detector_name, reward.clip_name
    assert one.startswith("m2f")
    assert len(one.rpartition("@")[2]) == 8
    assert one != clip
    shutil.copytree(folders[0], tmp_path / "other")
    assert weights.weights_name(str(tmp_path / "other")) == one.replace(Path(folders[0]).name, "other")
    file = tmp_path / "other" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert weights.weights_name(str(tmp_path / "other")).rpartition("@")[2] != one.rpartition("@")[2]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"other: holds no weights to name it by, needed \*.safetensors or \*.bin"):
        weights.weights_name(str(tmp_path / "other"))
    pickled = set()
    for content in (b"one", b"two"):
        (tmp_path / "other" / "pytorch_model.bin").write_bytes(content)
        pickled.add(weights.weights_name(str(tmp_path / "other")))
    assert len(pickled) == 2
    name = GenEvalSuite(judged_by=reward).name
    assert name == f"geneval, detector {one}, colors {clip}"


def test_a_hub_id_is_named_with_its_revision_where_that_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert weights.weights_name("facebook/mask2former") == "facebook/mask2former"
    revision = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--facebook--mask2former"
    (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "snapshots" / revision / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    assert weights.weights_name("facebook/mask2former") == "facebook/mask2former@01234567"


def test_colours_of_all_objects_share_forwards_and_are_those_of_each_alone(reward):
    sizes = [(9, 30), (40, 12), (16, 16), (3, 5), (20, 20)]
    crops = [torch.rand(3, *size, generator=torch.Generator().manual_seed(row)) for row, size in enumerate(sizes)]
    names = ["dog", "cat", "dog", "bus", "cat"]
    namer = reward.color_of
    for crop, name, color in zip(crops, names, namer(crops, names), strict=True):
        scores = namer.clip.images(crop[None]) @ namer.classifier(name).T
        assert color == COLORS[int(scores.argmax())]
    seen = []
    handle = namer.clip.model.vision_model.register_forward_pre_hook(
        lambda module, args, options: seen.append(len(options["pixel_values"])), with_kwargs=True
    )
    namer(crops * 4, names * 4)
    handle.remove()
    assert seen == [16, 4]


def test_a_red_square_stays_red_from_the_image_to_the_verdict():
    def detect(images, labels, thresholds):
        """Finds whatever is asked for wherever the image is not black."""
        masks = images.amax(1) > 0.1
        return [
            [Detection(label=kinds[0], score=0.95, box=geneval_detector._box(mask), mask=mask)]
            for mask, kinds in zip(masks, labels, strict=True)
        ]

    def name(crops, things):
        assert things == ["dog"] * len(crops)
        return [("red", "green", "blue")[int(crop.mean((1, 2)).argmax())] for crop in crops]

    images = torch.zeros(3, 3, 32, 32)
    for channel in range(3):
        images[channel, channel, 8:20, 4:12] = 1
    judge = geneval.GenEval(geneval.Config(measure="official"), detect, name)
    for wanted, passed in (("red", [1, 0, 0]), ("green", [0, 1, 0]), ("blue", [0, 0, 1])):
        found = judge(images, ["x"] * 3, [colors("dog", wanted)] * 3)
        assert found.values["official"].tolist() == passed
        assert found.clauses[:, :2].tolist() == [[1, bit] for bit in passed]
