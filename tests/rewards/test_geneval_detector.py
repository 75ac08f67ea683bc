"""The detector: post-processing against a literal reference, the converter, and colours and channels on a tiny Mask2Former."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import CLIPModel, Mask2FormerConfig, SwinConfig
from transformers import Mask2FormerForUniversalSegmentation as Mask2Former

from flowalign.evaluate.geneval_suite import GenEvalSuite
from flowalign.rewards import geneval, geneval_convert, geneval_detector, weights
from flowalign.rewards.geneval_detector import Detection
from flowalign.rewards.geneval_prompts import COLORS, colors, single_object, two_object
from tests.rewards import tiny

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def tiny_config():
    swin = SwinConfig(image_size=64, patch_size=4, embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 2, 4], window_size=4, out_features=STAGES)
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 64, "encoder_layers": 1}
    return Mask2FormerConfig(
        backbone_config=swin, **sizes, decoder_layers=2, num_attention_heads=4, dim_feedforward=64, num_queries=10, num_labels=80
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Mask2Former(tiny_config()).eval()


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
    seen, found = geneval_detector.prepare(torch.full((1, 3, *size), 0.5))
    assert found == inner
    assert seen.shape[2] % 32 == seen.shape[3] % 32 == 0
    assert seen.shape[2] - inner[0] < 32
    assert float(seen[:, :, inner[0] :].abs().sum() + seen[:, :, :, inner[1] :].abs().sum()) == 0
    wanted = [(128 / 255 - mean) / std for mean, std in zip(geneval_detector.MEAN, geneval_detector.STD, strict=True)]
    assert seen[0, :, 0, 0].tolist() == pytest.approx(wanted, abs=1e-5)


def test_channels_stay_red_green_blue():
    red = torch.zeros(1, 3, 64, 64)
    red[:, 0] = 1
    seen, _ = geneval_detector.prepare(red)
    assert seen[0, :, 0, 0].tolist() == pytest.approx([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], abs=1e-5)


def test_weights_that_published_files_lack_play_no_part(model):
    pixel = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(pixel_values=pixel)
        moved = Mask2Former(tiny_config()).eval()
        moved.load_state_dict(model.state_dict())
        names = [name for name in moved.state_dict() if name.startswith(geneval_detector.UNNEEDED)]
        assert len(names) == 3
        for name in names:
            moved.state_dict()[name].fill_(7.0)
        after = moved(pixel_values=pixel)
    assert torch.equal(before.class_queries_logits, after.class_queries_logits)
    assert torch.equal(before.masks_queries_logits, after.masks_queries_logits)


# -- converter ------------------------------------------------------------------------------------------------------------------------


def mmdet_names(swin_depths, encoder_layers, decoder_layers):
    """The names of mmdet's checkpoint, written down from its modules, each with the number of values of its last axes left open."""
    both = ("weight", "bias")
    names = [f"backbone.patch_embed.{part}.{kind}" for part in ("projection", "norm") for kind in both]
    names += [f"backbone.norm{i}.{kind}" for i in range(4) for kind in both]
    for i, depth in enumerate(swin_depths):
        for j in range(depth):
            block = f"backbone.stages.{i}.blocks.{j}"
            names += [f"{block}.attn.w_msa.relative_position_bias_table", f"{block}.attn.w_msa.relative_position_index"]
            parts = ("norm1", "norm2", "attn.w_msa.qkv", "attn.w_msa.proj", "ffn.layers.0.0", "ffn.layers.1")
            names += [f"{block}.{part}.{kind}" for part in parts for kind in both]
        if i < 3:
            names += [f"backbone.stages.{i}.downsample.{part}" for part in ("norm.weight", "norm.bias", "reduction.weight")]
    head = "panoptic_head"
    names += [f"{head}.pixel_decoder.input_convs.{i}.{part}.{kind}" for i in range(3) for part in ("conv", "gn") for kind in both]
    for i in range(encoder_layers):
        layer = f"{head}.pixel_decoder.encoder.layers.{i}"
        parts = [f"attentions.0.{part}" for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")]
        parts += ["ffns.0.layers.0.0", "ffns.0.layers.1", "norms.0", "norms.1"]
        names += [f"{layer}.{part}.{kind}" for part in parts for kind in both]
    for conv in ("lateral_convs", "output_convs"):
        names += [f"{head}.pixel_decoder.{conv}.0.{part}" for part in ("conv.weight", "gn.weight", "gn.bias")]
    names += [f"{head}.pixel_decoder.{part}" for part in ("level_encoding.weight", "mask_feature.weight", "mask_feature.bias")]
    for i in range(decoder_layers):
        layer = f"{head}.transformer_decoder.layers.{i}"
        for number in (0, 1):
            attention = f"{layer}.attentions.{number}.attn"
            names += [f"{attention}.{part}" for part in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")]
        names += [
            f"{layer}.{part}.{kind}" for part in ("ffns.0.layers.0.0", "ffns.0.layers.1", "norms.0", "norms.1", "norms.2") for kind in both
        ]
    names += [f"{head}.transformer_decoder.post_norm.{kind}" for kind in both]
    names += [f"{head}.{part}.weight" for part in ("query_embed", "query_feat", "level_embed")]
    return names + [f"{head}.{part}.{kind}" for part in ("cls_embed", "mask_embed.0", "mask_embed.2", "mask_embed.4") for kind in both]


def checkpoint_like(model, names):
    """Random values under mmdet's names, in the shapes that this model's own weights call for."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    state = {}
    for name in names:
        if name.endswith("relative_position_index"):
            state[name] = torch.zeros(4, 4, dtype=torch.int64)
            continue
        # One row or three fused ones: the names that a probe converts to say the shape.
        targets = list(geneval_convert._converted(name, torch.zeros(3, 8)))
        shape = shapes[targets[0]]
        state[name] = torch.randn(len(targets) * shape[0], *shape[1:], generator=torch.Generator().manual_seed(len(state)))
    return state


def test_every_weight_of_the_checkpoint_finds_its_place(model):
    state = checkpoint_like(model, mmdet_names([1] * 4, 1, 1))
    found = geneval_convert.convert(state, model)
    assert len(found) == len([name for name in model.state_dict() if not name.startswith(geneval_detector.UNNEEDED)])
    assert torch.equal(found["class_predictor.weight"], state["panoptic_head.cls_embed.weight"])
    prefix = "backbone.stages.1.blocks.0.attn.w_msa"
    query = "model.pixel_level_module.encoder.swin.encoder.layers.1.blocks.0.attention.q_proj.weight"
    assert torch.equal(found[query], state[f"{prefix}.qkv.weight"][:32])
    cross = "model.transformer_module.decoder.layers.0.cross_attn.in_proj_weight"
    assert torch.equal(found[cross], state["panoptic_head.transformer_decoder.layers.0.attentions.0.attn.in_proj_weight"])


def test_names_fit_the_detector_in_its_full_size():
    with torch.device("meta"):
        full = Mask2Former(geneval_convert.config())
        state = checkpoint_like_shapes(full, mmdet_names([2, 2, 18, 2], 6, 9))
        assert geneval_convert.convert(state, full)


def checkpoint_like_shapes(model, names):
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    state = {}
    for name in names:
        targets = list(geneval_convert._converted(name, torch.zeros(3, 8)))
        shape = shapes.get(targets[0], torch.Size([4, 4]))
        state[name] = torch.empty(len(targets) * shape[0], *shape[1:])
    return state


def test_patch_merging_computes_what_mmdets_does(model):
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(1, 16, 8, 8, generator=draw)
    norm, bias, weight = (torch.randn(*shape, generator=draw) for shape in ((64,), (64,), (32, 64)))
    columns = functional.unfold(image, 2, stride=2).transpose(1, 2)  # mmdet: nn.Unfold, channel by channel
    wanted = functional.linear(functional.layer_norm(columns, (64,), norm, bias), weight)
    merging = model.model.pixel_level_module.encoder.swin.encoder.layers[0].downsample
    kept = {name: value.clone() for name, value in merging.state_dict().items()}
    merging.load_state_dict(
        {
            name: geneval_convert.unmerge_order(value)
            for name, value in (("reduction.weight", weight), ("norm.weight", norm), ("norm.bias", bias))
        }
    )
    with torch.no_grad():
        found = merging(image.flatten(2).transpose(1, 2), (8, 8))
    merging.load_state_dict(kept)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_other_checkpoints_are_refused(model, tmp_path):
    state = checkpoint_like(model, mmdet_names([1] * 4, 1, 1))
    with pytest.raises(ValueError, match="no Mask2Former with Swin-S of mmdet.*has no place for 'roi_head"):
        geneval_convert.convert(state | {"roi_head.weight": torch.zeros(1)}, model)
    with pytest.raises(ValueError, match="needs 'class_predictor.bias'"):
        geneval_convert.convert({name: value for name, value in state.items() if "cls_embed.bias" not in name}, model)
    with pytest.raises(FileNotFoundError, match="model zoo of mmdetection"):
        geneval_convert.convert_file(tmp_path / "no.pth", tmp_path / "out")


# -- the reward -----------------------------------------------------------------------------------------------------------------------


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
    config = tiny_config()
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
