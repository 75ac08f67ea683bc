"""Tiny random models of the published architectures, written to folders as ``from_pretrained`` reads them."""

import gzip
from pathlib import Path

import open_clip
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Mask2FormerConfig, SwinConfig


def words():
    """CLIP's own vocabulary, from the file that open_clip ships."""
    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    tokenizer = open_clip.SimpleTokenizer()
    rename = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {rename.get(word, word): number for word, number in tokenizer.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges], model_max_length=77)


def clip(folder, *, seed=0, image_size=32):
    torch.manual_seed(seed)
    tower = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407},
        vision_config={**tower, "image_size": image_size, "patch_size": 8},
        projection_dim=16,
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0)
    model.save_pretrained(folder)
    words().save_pretrained(folder)
    return model


def pictures(num=3, height=48, width=40, seed=0):
    smooth = torch.rand(num, 3, 6, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(smooth, (height, width), mode="bilinear")


def detector_config():
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(image_size=64, patch_size=4, embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 2, 4], window_size=4, out_features=stages)
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 64, "encoder_layers": 1}
    return Mask2FormerConfig(
        backbone_config=swin, **sizes, decoder_layers=2, num_attention_heads=4, dim_feedforward=64, num_queries=10, num_labels=80
    )
