"""What comes out of a model, trained or not: images, and their scores on a suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from flowalign import images
from flowalign.config import ConfigError
from flowalign.core.algorithm import CURRENT, REFERENCE
from flowalign.core.distillation import Settings
from flowalign.core.paths import interpolate
from flowalign.core.penalties import velocity_mse
from flowalign.core.plans import ode
from flowalign.core.randomness import normal
from flowalign.evaluate.records import Evaluation
from flowalign.evaluate.suites import run_suite
from flowalign.model_settings import override
from flowalign.pipelines.base import FlowPipeline
from flowalign.run_config import RunConfig, find_config, load_config

# What the commands that load a model say otherwise than by --pipeline.KEY.
_SAID_BY = {"model": "MODEL", "lora": "--lora RUN, which brings its own rank, alpha and targets", "num_steps": "--num-steps"}


def generator_of(
    pipeline: FlowPipeline, num_steps: int, role: str = CURRENT, *, seed: int = 0
) -> Callable[[list[str], list[tuple[int, int]]], Tensor]:
    """Return what a suite calls for images: the ODE of a role of the pipeline from noise keyed by (seed, noise id, k)."""

    def generate(prompts: list[str], seeds: list[tuple[int, int]]) -> Tensor:
        ids, numbers = (torch.tensor(column) for column in zip(*seeds, strict=True))
        x_init = normal(pipeline.event_shape, seed=seed, purpose="evaluate", step=0, prompts=ids, samples=numbers).to(pipeline.device)
        cond = pipeline.encode(prompts)
        done = pipeline.rollout(cond, ode(num_steps), x_init=x_init, noise=lambda step: x_init, role=role)
        return images.finite(pipeline.decode(done.x0))

    return generate


def score_model(
    pipeline: FlowPipeline, chosen: Any, *, num_steps: int, seed: int, title: str, role: str = CURRENT, batch_size: int = 128
) -> Evaluation:
    """Run a suite on a role of a pipeline, with a progress bar."""
    with tqdm(desc=f"evaluate {title}", leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        generate = generator_of(pipeline, num_steps, role)
        return run_suite(chosen, generate, batch_size=batch_size, seed=seed, keep_images=True, progress=progress)


def velocity_distance(pipeline: FlowPipeline, prompts: Sequence[str], role: str, *, levels: Sequence[float] = (0.3, 0.6, 0.9)) -> float:
    """Measure how far a role has moved from the base: mean squared difference of their velocities, a mean over elements.

    Both see the base's own images of the prompts, noised to the same levels with the same noise; nothing else than the weights differs.

    Args:
        pipeline: Has the role and the reference.
        prompts: Fixed prompts, one image of each.
        role: The version that is measured.
        levels: Noise levels, averaged over.
    """
    ids, zeros = torch.arange(len(prompts)), torch.zeros(len(prompts), dtype=torch.int64)

    def draw(purpose: str) -> Tensor:
        return normal(pipeline.event_shape, seed=0, purpose=purpose, step=0, prompts=ids, samples=zeros).to(pipeline.device)

    with torch.no_grad():
        cond = pipeline.encode(list(prompts))
        x_init = draw("evaluate")
        x0 = pipeline.rollout(cond, ode(pipeline.num_steps), x_init=x_init, noise=lambda step: x_init, role=REFERENCE).x0
        found = []
        for level in levels:
            sigma = torch.full((len(prompts),), level, device=pipeline.device)
            x = interpolate(x0, draw(f"drift {level}"), sigma)
            found.append(velocity_mse(pipeline.velocity(x, sigma, cond, role), pipeline.velocity(x, sigma, cond, REFERENCE)).mean())
    return float(torch.stack(found).mean())


def open_model(model: str, lora: Path | None, *, num_steps: int | None = None, fields: Sequence[str] = ()) -> tuple[Any, FlowPipeline]:
    """Load a model as the run did that trained it or its LoRA, else with the family's defaults.

    Args:
        model: Folder, hub id or "shapes"; the ``weights`` of a run that trained all weights bring the run's settings.
        lora: A run folder, its ``weights`` folder, or a LoRA file.
        num_steps: Denoising steps; None for those of the settings, or the few of a student that was distilled.
        fields: ``--pipeline.KEY VALUE`` arguments, which change the settings last.

    Returns:
        The settings, and what they build, the LoRA loaded as its current role.
    """
    from flowalign.pipelines import lora_files
    from flowalign.pipelines.choose import settings_of
    from flowalign.pipelines.roles import LoRA

    if lora is None and (Path(model) / "weights").is_dir() and (Path(model) / "config.yaml").is_file():
        raise ConfigError(
            f"{model}: is a run; name the model that it trained and the run as --lora {model}, or the full model {model}/weights"
        )
    run = run_of(Path(model) if lora is None else lora)
    # The shipped pipeline is evaluated as its own configuration runs it.
    run = find_config("shapes_awm") if run is None and model == "shapes" else run
    config = None if run is None else load_config(str(run))
    settings = settings_of(model) if config is None else config.pipeline
    own = settings.num_steps if config is None else student_steps(config) or settings.num_steps
    if lora is None and run is not None:
        settings = replace(settings, variant=None)  # the base's; a run writes plain files
    settings = replace(override(settings, fields, said_by=_SAID_BY), model=model, lora=None, num_steps=num_steps or own)
    if lora is None:
        return settings, settings.build(device=Accelerator().device)
    weights = lora_files.weights_of(lora)
    rank, alpha, targets = lora_files.settings(weights)
    settings = replace(settings, lora=LoRA(rank=rank, alpha=alpha, targets=targets))
    built = settings.build(device=Accelerator().device)
    built.load_lora(weights)
    return settings, built


def student_steps(config: RunConfig) -> int | None:
    """Return the steps of the student that a run distils; None for other runs."""
    return config.algorithm.student_steps if isinstance(config.algorithm, Settings) else None


def run_of(weights: Path) -> Path | None:
    """Find the configuration of the run that weights come from: a run folder, its ``weights``, or a file in there."""
    folder = weights.parent if weights.is_file() else weights
    run = folder.resolve().parent if folder.name in ("weights", "best_weights") else folder
    return run / "config.yaml" if folder.is_dir() and (run / "config.yaml").is_file() else None


def sample(
    model: str,
    prompts: Sequence[str],
    *,
    lora: Path | None = None,
    output: Path = Path("samples.png"),
    seed: int = 0,
    num_images: int = 4,
    num_steps: int | None = None,
    batch_size: int | None = None,
    fields: Sequence[str] = (),
) -> Path:
    """Write a labelled grid, a row for each prompt; the command ``flowalign sample``."""
    if not prompts:
        raise ConfigError("sample: give at least one prompt")
    _, pipeline = open_model(model, lora, num_steps=num_steps, fields=fields)
    texts = [text for text in prompts for _ in range(num_images)]
    seeds = [(row, k) for row in range(len(prompts)) for k in range(num_images)]
    generate, size = generator_of(pipeline, pipeline.num_steps, seed=seed), batch_size or len(texts)
    made = torch.cat([generate(texts[i : i + size], seeds[i : i + size]).cpu() for i in range(0, len(texts), size)])
    scale = max(1, 256 // made.shape[-1])
    output.parent.mkdir(parents=True, exist_ok=True)
    images.save_png(images.grid(made, num_images, captions=texts, scale=scale), output)
    print(f"written: {output}")
    return output


def merge(model: str, *, lora: Path, output: Path, fields: Sequence[str] = ()) -> Path:
    """Add a LoRA to its base and write the whole pipeline; the command ``flowalign merge``."""
    from flowalign.pipelines import lora_files, merging

    _, pipeline = open_model(model, lora, fields=fields)
    merging.merge(pipeline, output, notes=lora_files.notes_of(lora_files.weights_of(lora)))
    print(f"written: {output}")
    return output
