"""From the detector of the original GenEval, an mmdet checkpoint, to a folder that transformers loads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.rewards import weights
from flowalign.rewards.geneval_detector import NUM_CLASSES, UNNEEDED

_PIXEL = "model.pixel_level_module.decoder."
_SWIN = "model.pixel_level_module.encoder."
_QUERY = "model.transformer_module."
# Names of mmdet to names of transformers; fused and reordered weights are treated in `_converted`.
_RENAMED = (
    (r"^backbone\.patch_embed\.projection\.", rf"{_SWIN}swin.embeddings.patch_embeddings.projection."),
    (r"^backbone\.patch_embed\.norm\.", rf"{_SWIN}swin.embeddings.norm."),
    (r"^backbone\.stages\.(\d+)\.downsample\.", rf"{_SWIN}swin.encoder.layers.\1.downsample."),
    (r"^backbone\.stages\.(\d+)\.blocks\.(\d+)\.", rf"{_SWIN}swin.encoder.layers.\1.blocks.\2."),
    (r"\.attn\.w_msa\.proj\.", ".attention.o_proj."),
    (r"\.attn\.w_msa\.relative_position_bias_table$", ".attention.relative_position_bias.relative_position_bias_table"),
    (r"(blocks\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(blocks\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"(blocks\.\d+)\.ffn\.layers\.0\.0\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.ffn\.layers\.1\.", r"\1.mlp.fc2."),
    (r"^panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.conv\.", rf"{_PIXEL}input_projections.\1.0."),
    (r"^panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.gn\.", rf"{_PIXEL}input_projections.\1.1."),
    (r"^panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.attentions\.0\.", rf"{_PIXEL}encoder.layers.\1.self_attn."),
    (r"^panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.0\.", rf"{_PIXEL}encoder.layers.\1.self_attn_layer_norm."),
    (r"^panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.1\.", rf"{_PIXEL}encoder.layers.\1.final_layer_norm."),
    (r"^panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0\.", rf"{_PIXEL}encoder.layers.\1.fc1."),
    (r"^panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.1\.", rf"{_PIXEL}encoder.layers.\1.fc2."),
    (r"^panoptic_head\.pixel_decoder\.level_encoding\.weight$", f"{_PIXEL}level_embed"),
    (r"^panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv\.", f"{_PIXEL}adapter_1.0."),
    (r"^panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn\.", f"{_PIXEL}adapter_1.1."),
    (r"^panoptic_head\.pixel_decoder\.output_convs\.0\.conv\.", f"{_PIXEL}layer_1.0."),
    (r"^panoptic_head\.pixel_decoder\.output_convs\.0\.gn\.", f"{_PIXEL}layer_1.1."),
    (r"^panoptic_head\.pixel_decoder\.mask_feature\.", f"{_PIXEL}mask_projection."),
    (r"^panoptic_head\.query_embed\.", f"{_QUERY}queries_embedder."),
    (r"^panoptic_head\.query_feat\.", f"{_QUERY}queries_features."),
    (r"^panoptic_head\.level_embed\.", f"{_QUERY}level_embed."),
    (r"^panoptic_head\.transformer_decoder\.post_norm\.", f"{_QUERY}decoder.layernorm."),
    (r"^panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.0\.attn\.", rf"{_QUERY}decoder.layers.\1.cross_attn."),
    (r"^panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.1\.attn\.", rf"{_QUERY}decoder.layers.\1.self_attn."),
    (r"^panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.0\.", rf"{_QUERY}decoder.layers.\1.cross_attn_layer_norm."),
    (r"^panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.1\.", rf"{_QUERY}decoder.layers.\1.self_attn_layer_norm."),
    (r"^panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.2\.", rf"{_QUERY}decoder.layers.\1.final_layer_norm."),
    (r"^panoptic_head\.transformer_decoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0\.", rf"{_QUERY}decoder.layers.\1.fc1."),
    (r"^panoptic_head\.transformer_decoder\.layers\.(\d+)\.ffns\.0\.layers\.1\.", rf"{_QUERY}decoder.layers.\1.fc2."),
    (r"^panoptic_head\.cls_embed\.", "class_predictor."),
)


def config() -> Any:
    """Return the configuration of GenEval's detector: Mask2Former with Swin-S, 100 queries, 80 classes."""
    from transformers import Mask2FormerConfig, SwinConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(
        image_size=224, embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7, drop_path_rate=0.3, out_features=stages
    )
    return Mask2FormerConfig(backbone_config=swin, num_labels=NUM_CLASSES, num_queries=100)


def convert(state: Mapping[str, Tensor], into: Any) -> dict[str, Tensor]:
    """Give mmdet's weights the names and layouts of transformers.

    Swin's patch merging gathers its four neighbours channel by channel in mmdet (``nn.Unfold``) and neighbour by neighbour in transformers;
    queries, keys and values of Swin and of the decoder's self-attention are one matrix in mmdet and three here.

    Args:
        state: mmdet's state dict.
        into: A ``Mask2FormerForUniversalSegmentation`` of the same sizes.

    Raises:
        ValueError: If a weight is left over, missing, or of another size.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if not name.endswith("relative_position_index"):
            found |= _converted(name, value)
    needed = {name: value.shape for name, value in into.state_dict().items() if not name.startswith(UNNEEDED)}
    odd = sorted(found.keys() ^ needed.keys())
    if odd:
        side = "has no place for" if odd[0] in found else "needs"
        raise ValueError(
            f"the checkpoint is no Mask2Former with Swin-S of mmdet: transformers' model {side} {odd[0]!r} ({len(odd)} such names)"
        )
    wrong = next((name for name, value in found.items() if value.shape != needed[name]), None)
    if wrong is not None:
        raise ValueError(f"{wrong}: got shape {tuple(found[wrong].shape)}, needed {tuple(needed[wrong])}")
    return found


def _converted(name: str, value: Tensor) -> dict[str, Tensor]:
    norm = re.fullmatch(r"backbone\.norm(\d)\.(weight|bias)", name)
    if norm:
        return {f"{_SWIN}hidden_states_norms.stage{int(norm[1]) + 1}.{norm[2]}": value}
    mask = re.fullmatch(r"panoptic_head\.mask_embed\.(\d)\.(weight|bias)", name)
    if mask:
        return {f"{_QUERY}decoder.mask_predictor.mask_embedder.{int(mask[1]) // 2}.0.{mask[2]}": value}
    new = name
    for pattern, replacement in _RENAMED:
        new = re.sub(pattern, replacement, new)
    fused = re.fullmatch(r"(.*)\.attn\.w_msa\.qkv\.(weight|bias)", new)
    if fused:
        return {f"{fused[1]}.attention.{part}_proj.{fused[2]}": rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
    fused = re.fullmatch(r"(.*\.self_attn)\.in_proj_(weight|bias)", new)
    if fused:
        return {f"{fused[1]}.{part}_proj.{fused[2]}": rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
    if ".downsample." in new:
        return {new: unmerge_order(value)}
    return {new: value}


def unmerge_order(value: Tensor) -> Tensor:
    """Reorder the last axis of a patch-merging weight from (channel, row, column) to transformers' (column, row, channel)."""
    channels = value.shape[-1] // 4
    grid = value.reshape(*value.shape[:-1], channels, 2, 2)
    # Neighbours are listed (0,0), (1,0), (0,1), (1,1) in transformers: the row runs fastest.
    return grid.movedim(-3, -1).transpose(-3, -2).reshape(value.shape).contiguous()


def convert_file(checkpoint: Path, output: Path) -> Path:
    """Convert a checkpoint of mmdet into a folder for ``detector``; the command ``flowalign geneval convert``.

    Raises:
        FileNotFoundError: If the checkpoint is not there, with where it comes from.
        ValueError: If it is another model.
    """
    from transformers import Mask2FormerForUniversalSegmentation as Mask2Former

    if not checkpoint.is_file():
        raise FileNotFoundError(
            f"{checkpoint}: no such file; the original is mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth "
            "from the model zoo of mmdetection 2"
        )
    model = Mask2Former(config()).eval()
    try:
        state = convert(weights.read(checkpoint), model)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error
    with torch.no_grad():
        model.load_state_dict(state, strict=False)  # names were compared above
    model.save_pretrained(output)
    print(f"written: {output}")
    return output
