"""Speed of rollout and training on one GPU: transformers of the sizes of SD 3.5 Medium and FLUX.1 with random weights, 512 pixels, bfloat16.

Every number is of whole training steps of the real loop. Cells are AWM and Flow-GRPO, eager and with compiled blocks; each prints its row when it is done,
and no cell begins after ``--limit`` seconds, so that the whole takes that long and at most one cell more. A cell that runs out of memory says so, and the
others go on; the file of all numbers is written anew after every cell.

    python -m benchmarks.gpu                       # one GPU with 80 GB: FLUX alone is 24 GB of weights
    python -m benchmarks.gpu --models sd35m        # guided Flow-GRPO recomputes activations; how small a GPU does is unmeasured
    python -m benchmarks.gpu --profile             # and where the time of each cell's last step goes
    python -m benchmarks.gpu --smoke               # the same code on a CPU, tiny
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.random_models import pipeline
from flowalign import run
from flowalign.algorithms import flow_grpo
from flowalign.env import hardware, versions
from flowalign.pipelines import economy
from flowalign.pipelines.base import FlowPipeline
from flowalign.run_config import RewardConfig, RunConfig, load_config
from flowalign.train.journal import read_log

ALGORITHMS = ("awm", "flow_grpo")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much a step does: images, images at a time, rows of a backward pass, pixels."""

    groups: int
    group_size: int
    rollout_batch_size: int
    micro_batch_size: int
    pixels: int = 512


SIZES = {
    "sd35m": Size(groups=2, group_size=8, rollout_batch_size=16, micro_batch_size=16),
    "flux": Size(groups=2, group_size=4, rollout_batch_size=8, micro_batch_size=4),
}
SMOKE = Size(groups=2, group_size=2, rollout_batch_size=4, micro_batch_size=4, pixels=32)


def brightness(prompts: list[str], images: torch.Tensor) -> list[float]:
    """Reward: the mean of all pixels; it costs nothing, so that only the network and the autoencoder are measured."""
    return images.float().mean((1, 2, 3)).tolist()


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
    # Guidance doubles the rows of a backward pass: all their activations of 24 blocks are too much even for 80 GB.
    guided = {"num_steps": 10, "guidance_scale": 4.5, "gradient_checkpointing": True}
    settings = replace(config.pipeline, **(guided if model == "sd35m" else {"num_steps": 6}))
    return replace(config, pipeline=settings, algorithm=flow_grpo.Config(kl_penalty=0.004))


def measure(pipe: Any, config: RunConfig, *, steps: int, profile: bool, warms_up: bool) -> dict[str, Any]:
    """Train some steps, after one that warms up where that is still to do; return means over them."""
    denoiser = pipe.transformer
    if vars(denoiser).get("peft_config"):
        denoiser.unload_lora()
    accelerator = Accelerator(cpu=denoiser.device.type == "cpu")
    flow = FlowPipeline(pipe, config.pipeline.family(pipe), config.pipeline.lora, num_steps=config.pipeline.num_steps)
    trainer = run.build_trainer(config, accelerator, pipeline=flow)
    trainer.folder.mkdir(parents=True)
    on_gpu = denoiser.device.type == "cuda"
    began, before = time.perf_counter(), int(warms_up)
    if warms_up:
        trainer.fit(1)
    warm_up = time.perf_counter() - began
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with _profiled(profile, on_gpu):
        trainer.fit(before + steps)
    lines = read_log(trainer.folder / "log.jsonl")[before:]

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
    parser.add_argument("--steps", type=int, default=2, help="measured steps of a cell")
    parser.add_argument("--limit", type=float, default=360.0, help="seconds after which no cell begins")
    parser.add_argument("--profile", action="store_true", help="print the operations that take most time")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: shows that it runs, measures nothing")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="file for all numbers")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("no GPU here; --smoke runs the same code on the CPU with tiny sizes")
    device, dtype = ("cpu", torch.float32) if options.smoke else ("cuda", torch.bfloat16)
    began = time.perf_counter()
    cells: list[dict[str, Any]] = []

    def write() -> None:
        about = {"smoke": options.smoke, "seconds": time.perf_counter() - began, "hardware": hardware(), "versions": versions()}
        options.output.write_text(json.dumps({**about, "cells": cells}, indent=1))

    print(
        f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU, tiny sizes'}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}\n"
    )
    print(
        "| model | algorithm | blocks | images/s in rollout | rows/s in training | steps/s | peak GiB | use in rollout | in training | in all |"
    )
    print("|---" * 10 + "|", flush=True)
    write()
    # Models take turns, so that each has its figures early.
    for way, model in ((way, model) for way in options.ways for model in options.models):
        pipe: Any = None
        for algorithm in options.algorithms:
            name = {"model": model, "algorithm": algorithm, "blocks": way}
            if time.perf_counter() - began > options.limit:
                print(_unmeasured(name, f"not begun: {options.limit:.0f} s are over"), flush=True)
                continue
            try:
                # Eager blocks are warm after a pipeline's first cell; other shapes are compiled anew.
                warms_up = pipe is None or way == "compiled"
                pipe = pipe or _make(model, device, dtype, smoke=options.smoke)
                found = _cell(pipe, name, options, warms_up=warms_up)
            except torch.OutOfMemoryError as error:
                found = {"failed": f"out of memory: {str(error).partition(chr(10))[0]}"}
                pipe = None  # what the cell left on it is in the way of the next
            cells.append({**name, **found})
            print(_unmeasured(name, found["failed"]) if "failed" in found else row(model, algorithm, way, found), flush=True)
            write()
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
        del pipe
    write()
    print(f"\n{time.perf_counter() - began:.0f} s; all numbers in {options.output}")


def _make(model: str, device: str, dtype: torch.dtype, *, smoke: bool) -> Any:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            pipe = pipeline(model, smoke=smoke)
    finally:
        torch.set_default_dtype(before)
    pipe.vae.enable_slicing()
    return pipe


def _cell(pipe: Any, name: dict[str, str], options: argparse.Namespace, *, warms_up: bool) -> dict[str, Any]:
    is_compiled = economy.blocks(pipe.transformer)[0]._compiled_call_impl is not None
    if name["blocks"] == "compiled" and not is_compiled:
        economy.compile_blocks(pipe.transformer, **({"backend": "eager"} if options.smoke else {}))
    with tempfile.TemporaryDirectory() as place:
        config = configuration(name["model"], name["algorithm"], Path(place), smoke=options.smoke)
        # The pipeline is shared by the algorithms, so that what one switched on must be switched off for the next.
        if config.pipeline.gradient_checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
        else:
            pipe.transformer.disable_gradient_checkpointing()
        return measure(pipe, config, steps=options.steps, profile=options.profile, warms_up=warms_up)


def _unmeasured(name: dict[str, str], reason: str) -> str:
    return f"| {' | '.join(name.values())} | {reason} |" + " |" * 6


if __name__ == "__main__":
    main()
