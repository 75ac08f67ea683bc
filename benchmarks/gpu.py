"""Speed of rollout and training on one GPU: transformers of the sizes of SD 3.5 Medium and FLUX.1 with random weights, 512 pixels, bfloat16.

Every number is of whole training steps of the real loop. Cells are AWM and Flow-GRPO, eager and with compiled blocks; each prints its row when it is done,
and no cell begins after ``--limit`` seconds.

    python -m benchmarks.gpu                       # one GPU with 80 GB, under eight minutes
    python -m benchmarks.gpu --models sd35m        # 24 GB
    python -m benchmarks.gpu --profile             # and where the time of each cell's last step goes
    python -m benchmarks.gpu --smoke               # the same code on a CPU, tiny
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from flowalign import run
from flowalign.algorithms import flow_grpo
from flowalign.env import hardware, versions
from flowalign.pipelines import economy
from flowalign.pipelines.base import FlowPipeline
from flowalign.run_config import RewardConfig, RunConfig, load_config
from flowalign.train.journal import read_log

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ALGORITHMS = ("awm", "flow_grpo")
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


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much a step does: images, images at a time, rows of a backward pass, pixels."""

    groups: int
    group_size: int
    rollout_batch_size: int
    micro_batch_size: int
    pixels: int = 512


SIZES = {
    "sd35m": Size(groups=4, group_size=16, rollout_batch_size=16, micro_batch_size=16),
    "flux": Size(groups=2, group_size=8, rollout_batch_size=8, micro_batch_size=4),
}
SMOKE = Size(groups=2, group_size=2, rollout_batch_size=4, micro_batch_size=4, pixels=32)


def brightness(prompts: list[str], images: torch.Tensor) -> list[float]:
    """Reward: the mean of all pixels; it costs nothing, so that only the network and the autoencoder are measured."""
    return images.float().mean((1, 2, 3)).tolist()


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


def configuration(model: str, algorithm: str, folder: Path, *, smoke: bool) -> RunConfig:
    """Take the shipped recipe of a model, with fewer images a step."""
    (folder / "prompts.txt").write_text("a b c\nd e f\ng h i\nj k l\n")
    size = SMOKE if smoke else SIZES[model]
    flags = {
        "prompts.source": folder / "prompts.txt",
        "output": folder / "run",
        "pipeline.height": size.pixels,
        "pipeline.width": size.pixels,
        "pipeline.offload": "false",
        "pipeline.vae_slicing": "true",
        "train.groups": size.groups,
        "train.group_size": size.group_size,
        "train.rollout_batch_size": size.rollout_batch_size,
        "train.micro_batch_size": size.micro_batch_size,
        "train.sample_every": 0,
        "train.checkpoint_every": 1000,
        "train.peak_tflops": "measured",
    }
    if smoke:
        flags |= {"pipeline.dtype": "float32", "pipeline.gradient_checkpointing": "false", "pipeline.lora.rank": 4}
    recipe = load_config(f"{model}_awm_pickscore", [part for key, value in flags.items() for part in (f"--{key}", str(value))])
    config = replace(recipe, rewards=(RewardConfig(reward=brightness),))
    if algorithm == "awm":
        return config
    # Flow-GRPO's own: 10 guided steps of SD 3.5, 6 of FLUX with its embedded guidance.
    settings = replace(config.pipeline, **({"num_steps": 10, "guidance_scale": 4.5} if model == "sd35m" else {"num_steps": 6}))
    return replace(config, pipeline=settings, algorithm=flow_grpo.Config(kl_penalty=0.004))


def measure(pipe: Any, config: RunConfig, *, steps: int, profile: bool) -> dict[str, Any]:
    """Train a warm-up step and some more; return means over the latter."""
    denoiser = pipe.transformer
    if vars(denoiser).get("peft_config"):
        denoiser.unload_lora()
    accelerator = Accelerator(cpu=denoiser.device.type == "cpu")
    flow = FlowPipeline(pipe, config.pipeline.family(pipe), config.pipeline.lora, num_steps=config.pipeline.num_steps)
    trainer = run.build_trainer(config, accelerator, pipeline=flow)
    trainer.folder.mkdir(parents=True)
    on_gpu = denoiser.device.type == "cuda"
    began = time.perf_counter()
    trainer.fit(1)
    warm_up = time.perf_counter() - began
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with _profiled(profile, on_gpu):
        trainer.fit(1 + steps)
    lines = read_log(trainer.folder / "log.jsonl")[1:]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "images_per_s": mean([line["images"] / line["time_s"]["rollout"] for line in lines]),
        "rows_per_s": mean([line["evaluations"]["train"] / line["time_s"]["train"] for line in lines]),
        "step_s": mean([line["time_s"]["total"] for line in lines]),
        "warm_up_s": warm_up,
        "peak_gb": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "tflops": {name: mean([line["tflops"][name] for line in lines]) for name in ("rollout", "train", "total")},
        "utilisation": {name: mean([line["utilisation"][name] for line in lines]) for name in ("rollout", "train", "total")},
    }


@contextlib.contextmanager
def _profiled(wanted: bool, on_gpu: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    print(profiler.key_averages().table(sort_by="self_cuda_time_total" if on_gpu else "self_cpu_time_total", row_limit=25))


def row(model: str, algorithm: str, way: str, found: dict[str, Any]) -> str:
    """Lay a cell out."""
    shares = " | ".join(f"{100 * found['utilisation'][name]:.0f} %" for name in ("rollout", "train", "total"))
    memory = "" if found["peak_gb"] is None else f"{found['peak_gb']:.1f}"
    speeds = f"{found['images_per_s']:.2f} | {found['rows_per_s']:.2f} | {1 / found['step_s']:.3f}"
    return f"| {model} | {algorithm} | {way} | {speeds} | {memory} | {shares} |"


def main() -> None:
    """Measure every cell that there is time for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--ways", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--steps", type=int, default=2, help="measured steps of a cell, after one that warms up")
    parser.add_argument("--limit", type=float, default=420.0, help="seconds after which no cell begins")
    parser.add_argument("--profile", action="store_true", help="print the operations that take most time")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: shows that it runs, measures nothing")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="file for all numbers")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("no GPU here; --smoke runs the same code on the CPU with tiny sizes")
    device, dtype = ("cpu", torch.float32) if options.smoke else ("cuda", torch.bfloat16)
    began, cells = time.perf_counter(), []
    print(
        f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU, tiny sizes'}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}\n"
    )
    print(
        "| model | algorithm | blocks | images/s in rollout | rows/s in training | steps/s | peak GiB | use in rollout | in training | in all |"
    )
    print("|---" * 10 + "|", flush=True)
    for model in options.models:
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                pipe = pipeline(model, smoke=options.smoke)
        finally:
            torch.set_default_dtype(before)
        pipe.vae.enable_slicing()
        for way in options.ways:
            if way == "compiled":
                economy.compile_blocks(pipe.transformer, **({"backend": "eager"} if options.smoke else {}))
            for algorithm in options.algorithms:
                if time.perf_counter() - began > options.limit:
                    print(f"| {model} | {algorithm} | {way} | not begun: {options.limit:.0f} s are over |" + " |" * 6, flush=True)
                    continue
                with tempfile.TemporaryDirectory() as place:
                    config = configuration(model, algorithm, Path(place), smoke=options.smoke)
                    if config.pipeline.gradient_checkpointing:
                        pipe.transformer.enable_gradient_checkpointing()
                    found = measure(pipe, config, steps=options.steps, profile=options.profile)
                cells.append({"model": model, "algorithm": algorithm, "blocks": way, **found})
                print(row(model, algorithm, way, found), flush=True)
        del pipe
        if device == "cuda":
            torch.cuda.empty_cache()
    about = {"smoke": options.smoke, "seconds": time.perf_counter() - began, "hardware": hardware(), "versions": versions()}
    options.output.write_text(json.dumps({**about, "cells": cells}, indent=1))
    print(f"\n{time.perf_counter() - began:.0f} s; all numbers in {options.output}")


if __name__ == "__main__":
    main()
