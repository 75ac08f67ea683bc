"""Pipelines of the published sizes with random weights: they cost what the real ones cost, and need no download."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# The published configurations (transformer/config.json of stabilityai/stable-diffusion-3.5-medium and black-forest-labs/FLUX.1-dev).
SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
FLUX_DEV = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
# What --smoke makes of them.
TINY_SD3 = {
    "num_layers": 2,
    "num_attention_heads": 1,
    "caption_projection_dim": 64,
    "dual_attention_layers": (0,),
    "pos_embed_max_size": 16,
}
TINY_FLUX = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
TINY_VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}


def pipeline(model: str, *, smoke: bool) -> Any:
    """Build a pipeline of random weights; text encoders have one layer, but the sizes that the transformer reads."""
    clip = CLIPTokenizer(
        vocab={
            token: i for i, token in enumerate([*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"])
        },
        merges=[],
        model_max_length=77,
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0), *((letter, -8.0) for letter in LETTERS)]
    t5 = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    long = T5EncoderModel(T5Config(vocab_size=len(t5), d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=1, dropout_rate=0.0))

    def short(width: int) -> CLIPTextConfig:
        sizes = {"hidden_size": width, "projection_dim": width, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        return CLIPTextConfig(vocab_size=len(clip), max_position_embeddings=77, bos_token_id=52, eos_token_id=53, pad_token_id=53, **sizes)

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        **(TINY_VAE if smoke else VAE),
    )
    if model == "flux":
        return FluxPipeline(
            transformer=FluxTransformer2DModel(**FLUX_DEV | (TINY_FLUX if smoke else {})),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            vae=vae,
            text_encoder=CLIPTextModel(short(768)),
            tokenizer=clip,
            text_encoder_2=long,
            tokenizer_2=t5,
        )
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**SD35_MEDIUM | (TINY_SD3 if smoke else {})),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(short(768)),
        tokenizer=clip,
        text_encoder_2=CLIPTextModelWithProjection(short(1280)),
        tokenizer_2=clip,
        text_encoder_3=long,
        tokenizer_3=t5,
    )
