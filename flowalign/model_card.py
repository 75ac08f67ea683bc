"""The card that goes with a run's weights: ``README.md`` as the hub shows it, with scores over the run, settings and pictures."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from diffusers import DDIMScheduler

from flowalign import config as configuration
from flowalign import snapshots
from flowalign.files import write_atomically
from flowalign.generate import student_steps
from flowalign.pipelines.base import FlowPipeline
from flowalign.pipelines.schedulers import drivable
from flowalign.run_config import RunConfig
from flowalign.train.journal import read_log

CARD, PICTURE, BASE_PICTURE = "README.md", "samples.png", "samples_base.png"
_ROWS = 10  # of the table, spread over the run


def write(config: RunConfig, folder: Path, *, step: int, pipeline: FlowPipeline) -> Path:
    """Write the card beside weights, and the run's pictures with it.

    Args:
        config: The run's.
        folder: Where the weights are.
        step: Finished steps that the weights have.
        pipeline: The run's; the card says how to call it so.

    Returns:
        The card.
    """
    lines = [line for line in read_log(config.output / "log.jsonl") if line["step"] < step]
    pictures = _copy_pictures(config, folder, step)
    base = base_model(config)
    settings = configuration.encode(config)
    settings["pipeline"] = {**settings["pipeline"], "model": base}
    del settings["output"]  # a place on this machine
    is_lora = vars(config.pipeline).get("lora") is not None
    head = {"base_model": base, "library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["lora"] if is_lora else []}
    head["tags"] = [*head["tags"], "flowalign"]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {config.output.name}",
        f"{'A LoRA of' if is_lora else 'All weights of'} `{base}` after {step} steps of {type(config.algorithm).__module__.rpartition('.')[2]}, seed {config.seed}.",
        f"```python\n{_usage(config, base, pipeline, is_lora=is_lora)}\n```",
        "## Scores over the run",
        _table(lines, config),
        *(["## Samples", *(f"{caption}\n\n![{caption}]({name})" for name, caption in pictures.items())] if pictures else []),
        "## Settings",
        f"```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```",
    ]
    path = folder / CARD
    write_atomically(path, "\n\n".join(parts) + "\n")
    return path


def base_model(config: RunConfig) -> str:
    """Return the hub id of a run's model; of a folder only its name, not where it is on this machine."""
    model = str(vars(config.pipeline).get("model", ""))
    return Path(model).resolve().name if Path(model).expanduser().is_dir() else model


def _usage(config: RunConfig, base: str, pipeline: FlowPipeline, *, is_lora: bool) -> str:
    """Say how the weights are loaded, and how images like the run's are made; a distilled student has its own number of steps."""
    family, scheduler = pipeline.family, _scheduler(config, pipeline)
    told = {"num_inference_steps": student_steps(config) or config.pipeline.num_steps, **family.arguments}
    told |= {} if family.negative_prompt is None else {"negative_prompt": family.negative_prompt}
    words = ", ".join(f"{name}={value!r}" for name, value in told.items() if isinstance(value, int | float | str | tuple | list))
    names = ["DiffusionPipeline", *([] if scheduler is None else [scheduler.partition("(")[0].partition(".")[0]])]
    lines = [
        f"from diffusers import {', '.join(sorted(names))}",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{base if is_lora else "this folder"}")',
        *(['pipe.load_lora_weights("this folder")'] if is_lora else []),
        *([] if scheduler is None else [f"pipe.scheduler = {scheduler}"]),
        f'image = pipe("a prompt", {words}).images[0]',
    ]
    return "\n".join(lines)


def _scheduler(config: RunConfig, pipeline: FlowPipeline) -> str | None:
    """Write down the scheduler that the run sampled by, where the pipeline may come with another."""
    kind, settings = drivable(pipeline.pipe.scheduler)
    if issubclass(kind, DDIMScheduler):
        spacing = vars(config.pipeline).get("timestep_spacing")
        spaced = "" if spacing is None else f', timestep_spacing="{spacing}"'
        return f"DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False{spaced})"
    if isinstance(pipeline.pipe.scheduler, kind):
        return None
    return f"{kind.__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"


def _table(lines: Sequence[Mapping[str, Any]], config: RunConfig) -> str:
    """Lay the mean scores of training images out by step; what was not trained on is marked."""
    if not lines:
        return "No step was logged."
    chosen = sorted({round(i * (len(lines) - 1) / max(1, _ROWS - 1)) for i in range(_ROWS)})
    columns = {f"reward/{name}": name for name in lines[0]["reward"]} | {
        f"metric/{name}": f"{name} (measured)" for name in lines[0].get("metric", {})
    }
    rows = [f"| step | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for line in (lines[i] for i in chosen):
        values = [line.get(kind, {}).get(name) for kind, name in (column.split("/", 1) for column in columns)]
        rows.append(f"| {line['step'] + 1} | {' | '.join('' if value is None else f'{value:.4f}' for value in values)} |")
    aside = [f"rewards[{i}]" for i, entry in enumerate(config.rewards) if entry.weight == 0]
    note = f" Not trained on, only watched: {', '.join(aside)} of the settings below." if aside else ""
    return "\n".join(rows) + f"\n\nMeans over each step's own training images, of the policy as it was then; they are no benchmark.{note}"


def _copy_pictures(config: RunConfig, folder: Path, step: int) -> dict[str, str]:
    """Copy the newest grid up to a step, and the base's; returns their captions by file name."""
    place = config.output / snapshots.FOLDER
    grids = [path for path in sorted(place.glob("step_*.png")) if int(path.stem.removeprefix("step_")) <= step]
    found = {}
    if grids:
        shutil.copyfile(grids[-1], folder / PICTURE)
        found[PICTURE] = f"After {int(grids[-1].stem.removeprefix('step_'))} steps"
        if (place / snapshots.BASE).is_file():
            shutil.copyfile(place / snapshots.BASE, folder / BASE_PICTURE)
            found[BASE_PICTURE] = "The base, same prompts and noise"
    return found
