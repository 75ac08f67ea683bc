"""Tiny, randomly initialised flow pipelines that no file names: what `auto` works out, and what it refuses with the reason."""

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLFlux2,
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DPMSolverMultistepScheduler,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    PRXPipeline,
    PRXTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.pipelines.parts import TEXT, qwen_tokenizer, wake
from tests.pipelines.tiny import autoencoder, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer


def padding_tokenizer():
    """One token a byte, with a token for padding."""
    made = qwen_tokenizer()
    made.pad_token = "<|endoftext|>"
    return made


def autoencoder_with_statistics():
    """Of FLUX.2: its latents are patched, and normalised by a batch norm."""
    made = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
    )
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.5, 2.0)
    return made


def chroma():
    t5 = t5_tokenizer()
    denoiser = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=t5_encoder(t5),
        tokenizer=t5,
        transformer=wake(denoiser),
    )


def aura_flow():
    t5 = t5_tokenizer()
    text = UMT5Config(vocab_size=len(t5), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    denoiser = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return AuraFlowPipeline(
        tokenizer=t5,
        text_encoder=UMT5EncoderModel(text),
        vae=autoencoder(),
        transformer=wake(denoiser),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def lumina2():
    tokenizer = qwen_tokenizer()
    tokenizer.pad_token = "<|endoftext|>"
    denoiser = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(300, 64, 64),
        cap_feat_dim=32,
    )
    text = Gemma2Config(vocab_size=len(tokenizer), head_dim=16, **TEXT)
    return Lumina2Pipeline(
        transformer=wake(denoiser),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(4),
        text_encoder=Gemma2Model(text),
        tokenizer=tokenizer,
    )


def flux2_klein():
    tokenizer = padding_tokenizer()
    denoiser = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 32,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder_with_statistics(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), head_dim=16, **TEXT)),
        tokenizer=tokenizer,
        transformer=wake(denoiser),
    )


def cogview4():
    tokenizer = t5_tokenizer()  # ends every text with a token: an empty one is not empty
    denoiser = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    return CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=GlmModel(GlmConfig(vocab_size=len(tokenizer), head_dim=16, pad_token_id=tokenizer.pad_token_id, **TEXT)),
        vae=autoencoder(),
        transformer=wake(denoiser),
        scheduler=FlowMatchEulerDiscreteScheduler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"),
    )


def sana():
    tokenizer = padding_tokenizer()
    denoiser = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        sample_size=8,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41,
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), head_dim=16, **TEXT)),
        vae=vae,
        transformer=wake(denoiser),
        # As published: a solver with a memory, on the schedule of a flow.
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def hidream():
    clip, t5, llama = clip_tokenizer(), t5_tokenizer(), padding_tokenizer()
    denoiser = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[32, 32],
        text_emb_dim=32,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=[0, 1],
        # Else the experts are chosen in another order of sums while they are trained.
        force_inference_output=True,
    )
    made = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=clip_encoder(clip),
        tokenizer=clip,
        text_encoder_2=clip_encoder(clip),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(t5),
        tokenizer_3=t5,
        text_encoder_4=LlamaForCausalLM(LlamaConfig(vocab_size=len(llama), **TEXT)),
        tokenizer_4=llama,
        transformer=wake(denoiser),
    )
    made.default_sample_size = 8  # whatever is asked for, it makes pictures of so many pixels
    return made


def bria():
    t5 = t5_tokenizer()
    denoiser = BriaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return BriaPipeline(
        transformer=wake(denoiser),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(),
        text_encoder=t5_encoder(t5),
        tokenizer=t5,
    )


def ovis():
    tokenizer = padding_tokenizer()
    denoiser = OvisImageTransformer2DModel(
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), head_dim=16, **TEXT)),
        tokenizer=tokenizer,
        transformer=wake(denoiser),
    )


def ernie():
    tokenizer = padding_tokenizer()
    denoiser = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        patch_size=1,
        text_in_dim=32,
        rope_axes_dim=(4, 6, 6),
    )
    return ErnieImagePipeline(
        transformer=wake(denoiser),
        vae=autoencoder_with_statistics(),
        text_encoder=Ministral3Model(Ministral3Config(vocab_size=len(tokenizer), head_dim=16, **TEXT)),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def prx():
    tokenizer = padding_tokenizer()
    denoiser = PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=32, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[8, 8]
    )
    return PRXPipeline(
        transformer=wake(denoiser),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), head_dim=16, **TEXT)),
        tokenizer=tokenizer,
        vae=autoencoder(),
    )


def lumina():
    tokenizer = padding_tokenizer()
    denoiser = LuminaNextDiT2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        norm_eps=1e-5,
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=32,
    )
    return LuminaPipeline(
        transformer=wake(denoiser),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(),
        text_encoder=Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), head_dim=16, **TEXT)),
        tokenizer=tokenizer,
    )


# Refused, with the reason.
REFUSED = {
    "auto lumina": (lumina, {"guidance_scale": 4.0, "lora": None}),
    "auto lumina unguided": (lumina, {"guidance_scale": 1.0, "lora": None}),
    "auto prx": (prx, {"guidance_scale": 4.0, "lora": None, "arguments": {"use_resolution_binning": False, "tokenizer_max_length": 64}}),
}
# Worked out and verified.
WORKING = {
    "auto chroma": (chroma, {"guidance_scale": 4.0, "arguments": {"max_sequence_length": 12}}),
    "auto aura_flow": (aura_flow, {"guidance_scale": 3.0, "arguments": {"max_sequence_length": 12}}),
    "auto lumina2": (lumina2, {"guidance_scale": 4.0, "arguments": {"max_sequence_length": 64}}),
    "auto flux2_klein": (
        flux2_klein,
        {"guidance_scale": 4.0, "arguments": {"max_sequence_length": 64, "text_encoder_out_layers": (0, 1, 2)}},
    ),
    "auto cogview4": (cogview4, {"guidance_scale": 5.0}),
    "auto sana": (
        sana,
        {"guidance_scale": 4.5, "height": 32, "width": 32, "arguments": {"max_sequence_length": 64, "use_resolution_binning": False}},
    ),
    "auto hidream": (hidream, {"guidance_scale": 5.0, "arguments": {"max_sequence_length": 16}}),
    "auto bria": (bria, {"guidance_scale": 5.0, "height": 32, "width": 32, "arguments": {"max_sequence_length": 32}}),
    "auto ovis": (ovis, {"guidance_scale": 5.0, "arguments": {"max_sequence_length": 250}}),
    "auto ernie": (ernie, {"guidance_scale": 4.0}),
}
