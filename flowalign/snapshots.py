"""Pictures of a run over time: the same prompts from the same noise, so that nothing but the weights differs."""

from __future__ import annotations

from pathlib import Path

from flowalign import images
from flowalign.core.algorithm import REFERENCE
from flowalign.generate import generator_of, student_steps
from flowalign.pipelines.base import FlowPipeline
from flowalign.run_config import RunConfig
from flowalign.train.fit import Trainer

FOLDER, BASE = "samples", "base.png"
_PROMPTS, _IMAGES = 4, 4


def take(trainer: Trainer, config: RunConfig, step: int) -> None:
    """Write a grid of what the run has made of the model after a step, and once one of the base: four prompts, four images each, by the ODE."""
    pipeline, folder = trainer.pipeline, config.output / FOLDER
    assert isinstance(pipeline, FlowPipeline)
    base = folder / BASE
    needed = REFERENCE in pipeline.roles.names and not base.is_file()
    if trainer.cast.is_sharded:  # all processes make the pictures, and have looked before the first one writes
        trainer.accelerator.wait_for_everyone()
    if needed:
        _write(trainer, pipeline.num_steps, REFERENCE, base)
    _write(trainer, student_steps(config) or pipeline.num_steps, trainer.result, folder / f"step_{step:06d}.png")


def _write(trainer: Trainer, num_steps: int, role: str, path: Path) -> None:
    assert isinstance(trainer.pipeline, FlowPipeline)
    prompts = list(dict.fromkeys(prompt.text for prompt in trainer.draw(0)))[:_PROMPTS]
    texts = [text for text in prompts for _ in range(_IMAGES)]
    seeds = [(row, k) for row in range(len(prompts)) for k in range(_IMAGES)]
    made = generator_of(trainer.pipeline, num_steps, role)(texts, seeds)
    if trainer.accelerator.is_main_process:
        images.save_png(images.grid(made, _IMAGES, captions=texts, scale=max(1, 128 // made.shape[-1])), path)
