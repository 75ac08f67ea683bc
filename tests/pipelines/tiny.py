"""A tiny, randomly initialised `StableDiffusion3Pipeline`, built in code: no file, no download; and what tests do with it."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from flowalign.pipelines.loading import quiet

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT_LENGTH = 16
CLIP_WIDTH = 16
JOINT_WIDTH = 32


def clip_tokenizer():
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=TEXT_LENGTH)


def t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0), *((letter, -8.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64)


def clip_encoder(tokenizer):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=CLIP_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModelWithProjection(config)


def t5_encoder(tokenizer):
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=JOINT_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config)


def transformer():
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=JOINT_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def autoencoder(num_levels=2):
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        block_out_channels=(8,) * num_levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def tiny_pipeline(*, with_t5=True, seed=0, kind=StableDiffusion3Pipeline, **scheduler):
    """A pipeline for 16 x 16 images whose text, latents and noise level all matter to its output."""
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = transformer()
        # The default start leaves the adaptive norms and the output near 0: nothing would depend on anything.
        for parameter in denoiser.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.8 * parameter[0].numel() ** -0.5)
        return kind(
            transformer=denoiser,
            scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
            vae=autoencoder(),
            text_encoder=clip_encoder(clip),
            tokenizer=clip,
            text_encoder_2=clip_encoder(clip),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_encoder(t5) if with_t5 else None,
            tokenizer_3=t5 if with_t5 else None,
        )


def build(folder, seed=0):
    """Write a pipeline of the shapes world's sizes, with two layers and random weights, for tests that score its images."""
    from flowalign.shapes import models

    pipe = models.new_pipeline(seed)
    config = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")} | {"num_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe.register_modules(transformer=SD3Transformer2DModel(**config))
    pipe.save_pretrained(folder)
    return folder


EVENT = (4, 8, 8)
PROMPTS = ["a red dog", "bb", "a red dog"]


def untouched(folder, **absent):
    """What a stranger loads."""
    with quiet():
        pipe = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def initial(num=3, seed=0):
    return torch.randn(num, *EVENT, generator=torch.Generator().manual_seed(seed))


def noise(step, num=3):
    return torch.randn(num, *EVENT, generator=torch.Generator().manual_seed(100 + step))


def rows_of(transitions, step):
    return transitions.take((transitions.step == step).nonzero().squeeze(1))


def nudge(flow, rate=1e-2, num=2):
    """Train ``current`` a little on an arbitrary loss; returns the conditioning that was used."""
    cond = flow.encode(PROMPTS)
    for _ in range(num):
        flow.velocity(initial(), torch.tensor(0.5), cond).square().mean().backward()
        with torch.no_grad():
            for parameter in flow.roles.trainable_parameters():
                parameter -= rate * parameter.grad.sign()
                parameter.grad = None
    return cond


@torch.no_grad()
def probe(flow, cond, role="current"):
    return flow.velocity(initial(), torch.tensor(0.5), cond, role)
