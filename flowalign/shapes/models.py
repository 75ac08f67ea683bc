"""The networks of the shapes pipeline: an ordinary ``StableDiffusion3Pipeline``, only small.

Both tokenizers are written down, not trained: the trainer of byte-pair vocabularies breaks ties differently from process to process, and a
permuted vocabulary costs a trained model its text.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from flowalign.shapes.prompts import all_prompts
from flowalign.shapes.world import CELL_SIZE, IMAGE_SIZE

LATENT_CHANNELS = 16
LATENT_FACTOR = 4
TEXT_LENGTH = 16  # tokens; the longest prompt of the world has 11 words
CLIP_WIDTH = 64
WIDTH = 128
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def words() -> list[str]:
    """List the words of the world's prompts, longest first (the order in which the merges below cannot break a word apart)."""
    found = {word for split in ("train", "heldout") for record in all_prompts(split) for word in record["prompt"].split()}
    return sorted(found, key=lambda word: (-len(word), word))


def clip_tokenizer() -> CLIPTokenizer:
    """Build a CLIP tokenizer with one token for each word of the world and letters for all others."""
    vocabulary = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    merges = []
    for word in words():
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
                vocabulary.append("".join(pair))
            pieces = ["".join(pair), *pieces[2:]]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    table = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(vocab=table, merges=merges, model_max_length=TEXT_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """Build a T5 tokenizer with one token for each word of the world and letters for all others."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    pieces += [(f"\u2581{word}", -1.0) for word in words()]
    known = {piece for piece, _ in pieces}
    pieces += [(f"\u2581{letter}", -8.0) for letter in _LETTERS if f"\u2581{letter}" not in known]
    pieces += [(letter, -8.0) for letter in _LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _clip_text_encoder(vocabulary: int, end: int, start: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=CLIP_WIDTH,
        hidden_act="gelu",
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = CLIPTextModelWithProjection(config)
    # CLIP's own 0.02 leaves the words indistinguishable beside the positions for thousands of steps.
    torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.7)
    return model


def _t5_encoder(vocabulary: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary,
        d_model=2 * CLIP_WIDTH,
        d_kv=32,
        d_ff=2 * CLIP_WIDTH,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5EncoderModel(config)
    torch.nn.init.normal_(model.shared.weight, std=0.7)
    return model


def autoencoder() -> AutoencoderKL:
    """Build the autoencoder, 32 x 32 pixels to 8 x 8 latents of 16 channels, with random weights."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def transformer() -> SD3Transformer2DModel:
    """Build the denoiser with random weights."""
    size = IMAGE_SIZE // LATENT_FACTOR
    return SD3Transformer2DModel(
        sample_size=size,
        patch_size=CELL_SIZE // LATENT_FACTOR,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=WIDTH // 4,
        num_attention_heads=4,
        joint_attention_dim=2 * CLIP_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=size // 2,
        qk_norm="rms_norm",
    )


def new_pipeline(seed: int) -> StableDiffusion3Pipeline:
    """Build the whole pipeline with random weights that depend on the seed alone."""
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = [_clip_text_encoder(len(clip), clip.eos_token_id, clip.bos_token_id) for _ in range(2)]
        return StableDiffusion3Pipeline(
            transformer=transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(),
            text_encoder=encoders[0],
            tokenizer=clip,
            text_encoder_2=encoders[1],
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=_t5_encoder(len(t5)),
            tokenizer_3=t5,
        )


def load_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """Load a shapes pipeline in float32.

    Raises:
        FileNotFoundError: If the folder holds no pipeline.
    """
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder}: no diffusers pipeline there (model_index.json is missing); "
            f"make one with `flowalign shapes pretrain --output {folder}`"
        )
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
