"""Tiny, randomly initialised pipelines of every family, built in code: no file, no download."""

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
)

from flowalign.pipelines import auto as auto_family
from flowalign.pipelines import flux as flux_family
from flowalign.pipelines import qwen_image as qwen_image_family
from flowalign.pipelines import sd3 as sd3_family
from flowalign.pipelines import sdxl as sdxl_family
from flowalign.pipelines import stable_diffusion as stable_diffusion_family
from flowalign.pipelines import z_image as z_image_family
from flowalign.pipelines.base import FlowPipeline
from flowalign.pipelines.roles import LoRA
from tests.pipelines.flow_families import REFUSED, WORKING
from tests.pipelines.parts import TEXT, qwen_tokenizer, wake
from tests.pipelines.tiny import autoencoder, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer, tiny_pipeline


def flux(*, embedded=True):
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    denoiser = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=embedded,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        transformer=wake(denoiser),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=autoencoder(),
        text_encoder=CLIPTextModel(clip_encoder(clip).config),
        tokenizer=clip,
        text_encoder_2=t5_encoder(t5),
        tokenizer_2=t5,
    )


# As in the files of the published models, where set_alpha_to_one is written out: each scheduler class has another default.
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1}


def unet(**options):
    return wake(
        UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=4,
            **({"attention_head_dim": 4, "cross_attention_dim": 16} | options),
        )
    )


def stable_diffusion(prediction="epsilon"):
    """1.5 with its PNDM scheduler, or 2.1 with zero terminal signal and v-prediction."""
    clip = clip_tokenizer()
    if prediction == "epsilon":
        scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False)
    else:
        zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False, "prediction_type": prediction}
        scheduler = DDIMScheduler(**(SCHEDULE | zero))
    return StableDiffusionPipeline(
        unet=unet(),
        scheduler=scheduler,
        vae=autoencoder(),
        text_encoder=CLIPTextModel(clip_encoder(clip).config),
        tokenizer=clip,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl():
    clip = clip_tokenizer()
    denoiser = unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=16 + 6 * 8,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        unet=denoiser,
        scheduler=EulerDiscreteScheduler(**SCHEDULE),
        vae=autoencoder(),
        text_encoder=CLIPTextModel(clip_encoder(clip).config),
        tokenizer=clip,
        text_encoder_2=clip_encoder(clip),
        tokenizer_2=clip_tokenizer(),
        add_watermarker=False,
    )


def z_image():
    denoiser = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32, axes_dims=[4, 4, 8]
    )
    tokenizer = qwen_tokenizer()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), head_dim=16, **TEXT)),
        tokenizer=tokenizer,
        transformer=wake(denoiser),
    )


def qwen_image():
    tokenizer = qwen_tokenizer()
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    text = {
        "vocab_size": len(tokenizer),
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        **TEXT,
    }
    denoiser = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02)
    return QwenImagePipeline(
        scheduler=scheduler,
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1] * 4,
            latents_std=[1.5] * 4,
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
        transformer=wake(denoiser),
    )


# Name of the case: the pipeline, its family, and settings.
CASES = {
    "sd3": (tiny_pipeline, sd3_family, {"max_sequence_length": 12}),
    "sd3 guided": (tiny_pipeline, sd3_family, {"max_sequence_length": 12, "guidance_scale": 4.5}),
    "flux dev": (flux, flux_family, {"max_sequence_length": 12}),
    "flux schnell": (lambda: flux(embedded=False), flux_family, {"max_sequence_length": 12}),
    "flux true guidance": (flux, flux_family, {"max_sequence_length": 12, "true_cfg_scale": 4.0}),
    "sd 1.5": (stable_diffusion, stable_diffusion_family, {"guidance_scale": 1.0}),
    "sd 1.5 guided": (stable_diffusion, stable_diffusion_family, {}),
    "sd 2.1 v rescaled": (lambda: stable_diffusion("v_prediction"), stable_diffusion_family, {"guidance_rescale": 0.7}),
    "sdxl guided": (sdxl, sdxl_family, {}),
    "z_image turbo": (z_image, z_image_family, {"max_sequence_length": 32}),
    "z_image guided": (z_image, z_image_family, {"max_sequence_length": 32, "guidance_scale": 4.0}),
    "z_image limited": (z_image, z_image_family, {"max_sequence_length": 32, "guidance_scale": 4.0, "cfg_normalization": 1.0}),
    "qwen_image": (qwen_image, qwen_image_family, {"max_sequence_length": 250, "guidance_scale": 1.0}),
    "qwen_image guided": (qwen_image, qwen_image_family, {"max_sequence_length": 250}),
}


def pipeline(case, seed=0):
    """The bare diffusers pipeline of a case; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = (CASES | FAILING)[case][0]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def settings(case, **options):
    """The family's settings of a case, for 16 x 16 images."""
    _, family, own = (CASES | FAILING)[case]
    return family.Config(**({"height": 16, "width": 16, "num_steps": 5, "lora": LoRA(rank=4, alpha=8)} | own | options))


def build(case, *, pipe=None, **options):
    """A case behind the protocol."""
    config, pipe = settings(case, **options), pipe or pipeline(case)
    return FlowPipeline(pipe, config.family(pipe), config.lora, num_steps=config.num_steps)


# For `auto`: pipelines that no file names, and some that files name.
AUTO = WORKING | {
    "auto flux": (flux, {"guidance_scale": 3.5, "arguments": {"max_sequence_length": 12}}),
    "auto sdxl": (sdxl, {"guidance_scale": 5.0, "arguments": {"guidance_rescale": 0.7}}),
    "auto z_image": (z_image, {"guidance_scale": 4.0, "arguments": {"cfg_normalization": 1.0, "max_sequence_length": 32}}),
}
CASES |= {name: (make, auto_family, {"model": "", **options}) for name, (make, options) in AUTO.items()}
# Not of the cases that work.
FAILING = {name: (make, auto_family, {"model": "", **options}) for name, (make, options) in REFUSED.items()}
