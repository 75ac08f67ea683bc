"""The converter of GenEval's detector: every weight of an mmdet checkpoint, by value, against a map that is written down here."""

import pytest
import torch
from torch.nn import functional
from transformers import Mask2FormerForUniversalSegmentation as Mask2Former

from flowalign.rewards import geneval_convert, geneval_detector
from tests.rewards import tiny

PIXEL, QUERY = "model.pixel_level_module.", "model.transformer_module."
SWIN, DECODER = f"{PIXEL}encoder.", f"{PIXEL}decoder."
BOTH = ("weight", "bias")
# Of a module of mmdet, which module of transformers is it. Each stands for the weights behind it, mostly weight and bias.
BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.w_msa.proj": "attention.o_proj",
    "ffn.layers.0.0": "mlp.fc1",
    "ffn.layers.1": "mlp.fc2",
}
ENCODER_LAYER = {
    "attentions.0.sampling_offsets": "self_attn.sampling_offsets",
    "attentions.0.attention_weights": "self_attn.attention_weights",
    "attentions.0.value_proj": "self_attn.value_proj",
    "attentions.0.output_proj": "self_attn.output_proj",
    "norms.0": "self_attn_layer_norm",
    "ffns.0.layers.0.0": "fc1",
    "ffns.0.layers.1": "fc2",
    "norms.1": "final_layer_norm",
}
# A layer attends to the image, then among queries, then comes the network: three norms in this order.
DECODER_LAYER = {
    "attentions.0.attn.out_proj": "cross_attn.out_proj",
    "norms.0": "cross_attn_layer_norm",
    "attentions.1.attn.out_proj": "self_attn.out_proj",
    "norms.1": "self_attn_layer_norm",
    "ffns.0.layers.0.0": "fc1",
    "ffns.0.layers.1": "fc2",
    "norms.2": "final_layer_norm",
}


def places(swin_depths, encoder_layers, decoder_layers):
    """Of each weight of mmdet's checkpoint, the names of transformers; several share its rows in this order."""
    head = "panoptic_head"
    both = {
        "backbone.patch_embed.projection": f"{SWIN}swin.embeddings.patch_embeddings.projection",
        "backbone.patch_embed.norm": f"{SWIN}swin.embeddings.norm",
        f"{head}.pixel_decoder.mask_feature": f"{DECODER}mask_projection",
        f"{head}.transformer_decoder.post_norm": f"{QUERY}decoder.layernorm",
        f"{head}.cls_embed": "class_predictor",
        **{f"{head}.mask_embed.{2 * number}": f"{QUERY}decoder.mask_predictor.mask_embedder.{number}.0" for number in range(3)},
        **{f"backbone.norm{stage}": f"{SWIN}hidden_states_norms.stage{stage + 1}" for stage in range(4)},
    }
    found = {f"{head}.pixel_decoder.level_encoding.weight": [f"{DECODER}level_embed"]}
    for name, place in (("query_embed", "queries_embedder"), ("query_feat", "queries_features"), ("level_embed", "level_embed")):
        found[f"{head}.{name}.weight"] = [f"{QUERY}{place}.weight"]
    for stage, depth in enumerate(swin_depths):
        source, target = f"backbone.stages.{stage}", f"{SWIN}swin.encoder.layers.{stage}"
        for number in range(depth):
            block, place = f"{source}.blocks.{number}", f"{target}.blocks.{number}"
            both |= {f"{block}.{name}": f"{place}.{new}" for name, new in BLOCK.items()}
            for kind in BOTH:
                found[f"{block}.attn.w_msa.qkv.{kind}"] = [f"{place}.attention.{part}_proj.{kind}" for part in "qkv"]
            table = "relative_position_bias_table"
            found[f"{block}.attn.w_msa.{table}"] = [f"{place}.attention.relative_position_bias.{table}"]
        if stage < 3:
            for name in ("norm.weight", "norm.bias", "reduction.weight"):
                found[f"{source}.downsample.{name}"] = [f"{target}.downsample.{name}"]
    for level in range(3):
        source = f"{head}.pixel_decoder.input_convs.{level}"
        both |= {f"{source}.conv": f"{DECODER}input_projections.{level}.0", f"{source}.gn": f"{DECODER}input_projections.{level}.1"}
    for name, place in (("lateral_convs", "adapter_1"), ("output_convs", "layer_1")):
        found[f"{head}.pixel_decoder.{name}.0.conv.weight"] = [f"{DECODER}{place}.0.weight"]
        both[f"{head}.pixel_decoder.{name}.0.gn"] = f"{DECODER}{place}.1"
    for number in range(encoder_layers):
        source, place = f"{head}.pixel_decoder.encoder.layers.{number}", f"{DECODER}encoder.layers.{number}"
        both |= {f"{source}.{name}": f"{place}.{new}" for name, new in ENCODER_LAYER.items()}
    for number in range(decoder_layers):
        source, place = f"{head}.transformer_decoder.layers.{number}", f"{QUERY}decoder.layers.{number}"
        both |= {f"{source}.{name}": f"{place}.{new}" for name, new in DECODER_LAYER.items()}
        for kind in BOTH:
            found[f"{source}.attentions.0.attn.in_proj_{kind}"] = [f"{place}.cross_attn.in_proj_{kind}"]
            found[f"{source}.attentions.1.attn.in_proj_{kind}"] = [f"{place}.self_attn.{part}_proj.{kind}" for part in "qkv"]
    return found | {f"{name}.{kind}": [f"{place}.{kind}"] for name, place in both.items() for kind in BOTH}


TINY, FULL = places([1] * 4, 1, 1), places([2, 2, 18, 2], 6, 9)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Mask2Former(tiny.detector_config()).eval()


def checkpoint(model, every):
    """Random values, all different, under mmdet's names, and the numbers that only mmdet stores."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    state = {"backbone.stages.0.blocks.0.attn.w_msa.relative_position_index": torch.zeros(4, 4, dtype=torch.int64)}
    for name, targets in every.items():
        shape = shapes[targets[0]]
        state[name] = torch.randn(len(targets) * shape[0], *shape[1:])
    return state


def neighbours(value):
    """Reorder a patch merging, entry by entry: mmdet counts (channel, row, column), transformers (column, row, channel)."""
    channels = value.shape[-1] // 4
    found = torch.empty_like(value)
    for channel in range(channels):
        for row in range(2):
            for column in range(2):
                found[..., (2 * column + row) * channels + channel] = value[..., 4 * channel + 2 * row + column]
    return found


def test_every_weight_of_the_checkpoint_finds_its_place(model):
    state = checkpoint(model, TINY)
    found = geneval_convert.convert(state, model)
    wanted = {}
    for name, targets in TINY.items():
        value = neighbours(state[name]) if ".downsample." in name else state[name]
        wanted |= dict(zip(targets, value.chunk(len(targets)), strict=True))
    assert sorted(found) == sorted(wanted) == sorted(name for name in model.state_dict() if not name.startswith(geneval_detector.UNNEEDED))
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


def test_names_fit_the_detector_in_its_full_size():
    with torch.device("meta"):
        full = Mask2Former(geneval_convert.config())
        assert geneval_convert.convert(checkpoint(full, FULL), full)


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
    state = checkpoint(model, TINY)
    with pytest.raises(ValueError, match="no Mask2Former with Swin-S of mmdet.*has no place for 'roi_head"):
        geneval_convert.convert(state | {"roi_head.weight": torch.zeros(1)}, model)
    with pytest.raises(ValueError, match="needs 'class_predictor.bias'"):
        geneval_convert.convert({name: value for name, value in state.items() if "cls_embed.bias" not in name}, model)
    with pytest.raises(FileNotFoundError, match="model zoo of mmdetection"):
        geneval_convert.convert_file(tmp_path / "no.pth", tmp_path / "out")
