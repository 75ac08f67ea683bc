"""What comes out of a model, trained or not: images, and their scores on a suite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from flowalign import config as configuration
from flowalign import images
from flowalign.config import ConfigError
from flowalign.core.algorithm import CURRENT, REFERENCE
from flowalign.core.distillation import Settings
from flowalign.core.paths import interpolate
from flowalign.core.penalties import velocity_mse
from flowalign.core.plans import ode
from flowalign.core.randomness import normal
from flowalign.evaluate.records import Evaluation
from flowalign.evaluate.suites import run_suite, suite
from flowalign.evaluation_result import Result
from flowalign.fidelity_options import ruler
from flowalign.pipelines.base import FlowPipeline
from flowalign.run_config import RunConfig, find_config, load_config
from flowalign.suite_options import suite_options


def generator_of(
    pipeline: FlowPipeline, num_steps: int, role: str = CURRENT, *, seed: int = 0
) -> Callable[[list[str], list[tuple[int, int]]], Tensor]:
    """Return what a suite calls for images: the ODE of a role of the pipeline from noise keyed by (seed, noise id, k)."""

    def generate(prompts: list[str], seeds: list[tuple[int, int]]) -> Tensor:
        ids, numbers = (torch.tensor(column) for column in zip(*seeds, strict=True))
        x_init = normal(pipeline.event_shape, seed=seed, purpose="evaluate", step=0, prompts=ids, samples=numbers).to(pipeline.device)
        cond = pipeline.encode(prompts)
        done = pipeline.rollout(cond, ode(num_steps), x_init=x_init, noise=lambda step: x_init, role=role)
        return pipeline.decode(done.x0)

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


def open_model(model: str, lora: Path | None, *, num_steps: int | None = None) -> tuple[Any, FlowPipeline]:
    """Load a model as the run did that trained it or its LoRA, else with the family's defaults.

    Args:
        model: Folder, hub id or "shapes"; the ``weights`` of a run that trained all weights bring the run's settings.
        lora: A run folder, its ``weights`` folder, or a LoRA file.
        num_steps: Denoising steps; None for those of the settings, or the few of a student that was distilled.

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
    run = _run_of(Path(model) if lora is None else lora)
    # The shipped pipeline is evaluated as its own configuration runs it.
    run = find_config("shapes_awm") if run is None and model == "shapes" else run
    config = None if run is None else load_config(str(run))
    settings = settings_of(model) if config is None else config.pipeline
    own = settings.num_steps if config is None else student_steps(config) or settings.num_steps
    settings = replace(settings, model=model, lora=None, num_steps=num_steps or own)
    if lora is None:
        return settings, settings.build(device=Accelerator().device)
    weights = lora / "weights" if (lora / "weights").is_dir() else lora
    rank, alpha, targets = lora_files.settings(weights)
    settings = replace(settings, lora=LoRA(rank=rank, alpha=alpha, targets=targets))
    built = settings.build(device=Accelerator().device)
    built.load_lora(weights)
    return settings, built


def student_steps(config: RunConfig) -> int | None:
    """Return the steps of the student that a run distils; None for other runs."""
    return config.algorithm.student_steps if isinstance(config.algorithm, Settings) else None


def _steps_of_other(mine: Path, other: str | None, num_steps: int) -> int:
    """Return the steps of what a model is compared with: its own where it is a student, the teacher's where the model is one, else the same."""
    runs = [_run_of(mine), None if other is None else _run_of(Path(other))]
    own, theirs = (None if run is None else load_config(str(run)) for run in runs)
    few = None if theirs is None else student_steps(theirs)
    return few or (num_steps if own is None or student_steps(own) is None else own.pipeline.num_steps)


def _run_of(weights: Path) -> Path | None:
    """Find the configuration of the run that weights come from: a run folder, its ``weights``, or a file in there."""
    folder = weights.parent if weights.is_file() else weights
    run = folder.resolve().parent if folder.name == "weights" else folder
    return run / "config.yaml" if folder.is_dir() and (run / "config.yaml").is_file() else None


def evaluate(
    model: str,
    *,
    suite_name: str = "shapes",
    lora: Path | Sequence[Path] | None = None,
    against: str | None = None,
    output: Path | None = None,
    seed: int = 0,
    num_prompts: int | None = None,
    images_per_prompt: int = 4,
    num_steps: int | None = None,
    resolution: float = 0.02,
    reference_images: Path | None = None,
    extractor: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score a model on a suite, alone or against another on the same prompts and noise; the command ``flowalign evaluate``.

    Several LoRAs are runs of one recipe from several training seeds. ``reference_images`` and ``extractor`` are those of
    :func:`flowalign.fidelity_options.ruler`, ``options`` those of :func:`flowalign.suite_options.suite_options`, for the suites "geneval" and "prompts".
    """
    loras = [] if lora is None else [lora] if isinstance(lora, Path) else list(lora)
    _check_recipe(loras)
    sizes = {"num_prompts": num_prompts, "images_per_prompt": images_per_prompt}
    chosen = suite(suite_name, **{**sizes, **suite_options(suite_name, num_prompts, options or {})})
    settings, evaluated = open_model(model, loras[0] if loras else None, num_steps=num_steps)
    measured_by = ruler(chosen, folder=reference_images, extractor=extractor, image_size=image_size(evaluated))
    steps = evaluated.num_steps
    runs, base, others = [score_model(evaluated, chosen, num_steps=steps, seed=seed, title=model)], None, steps
    if against is not None or loras:
        others = _steps_of_other(loras[0] if loras else Path(model), against, steps)
    if against is not None:
        # The same settings: a comparison is of weights, not of guidance or sizes.
        other = replace(settings, model=against, lora=None).build(device=evaluated.device)
        base = score_model(other, chosen, num_steps=others, seed=seed, title=against)
    elif loras:
        base = score_model(evaluated, chosen, num_steps=others, seed=seed, title=f"{model} without LoRA", role=REFERENCE)
    for further in loras[1:]:
        _, evaluated = open_model(model, further, num_steps=num_steps)
        runs.append(score_model(evaluated, chosen, num_steps=steps, seed=seed, title=str(further)))
    result = Result(
        runs=runs,
        base=base,
        names=(against or f"{model} without LoRA", f"{model} with {', '.join(map(str, loras))}" if loras else model),
        num_steps=(steps, others),
        fidelity=[] if measured_by is None else [measured_by.compare(run, base) for run in runs],
        resolution=resolution,
        settings=configuration.encode(settings),
    )
    result.show()
    if output is not None:
        result.write(output)
    return {**result.as_dict(), "settings": dict(result.settings)}


def image_size(pipeline: FlowPipeline) -> tuple[int, int]:
    """Return height and width of a pipeline's images, by decoding one latent of zeros."""
    with torch.no_grad():
        height, width = pipeline.decode(torch.zeros(1, *pipeline.event_shape, device=pipeline.device)).shape[2:]
    return int(height), int(width)


def _check_recipe(loras: Sequence[Path]) -> None:
    """Refuse runs that differ in more than their seed: what is between them would be no spread of training seeds."""
    if len({path.resolve() for path in loras}) < len(loras):
        raise ConfigError("--lora: a run is given twice; several are several training seeds of one recipe")
    found = [(lora, None if (run := _run_of(lora)) is None else configuration.read_yaml(run)) for lora in loras]
    for lora, settings in found[1:]:
        first = found[0][1]
        if settings is None or first is None:
            raise ConfigError(
                f"--lora: {lora if settings is None else found[0][0]} is no run, so its recipe is not known; several --lora are runs"
            )
        one, other = ({key: value for key, value in each.items() if key not in ("seed", "output")} for each in (first, settings))
        changed = configuration.differences(one, other)
        if changed:
            raise ConfigError(
                f"--lora: {lora} is of another recipe than {found[0][0]} ({'; '.join(changed)}); several --lora are training seeds of one recipe. Compare "
                "recipes with flowalign benchmark"
            )


def sample(
    model: str,
    prompts: Sequence[str],
    *,
    lora: Path | None = None,
    output: Path = Path("samples.png"),
    seed: int = 0,
    num_images: int = 4,
    num_steps: int | None = None,
) -> Path:
    """Write a labelled grid, a row for each prompt; the command ``flowalign sample``."""
    if not prompts:
        raise ConfigError("sample: give at least one prompt")
    _, pipeline = open_model(model, lora, num_steps=num_steps)
    texts = [text for text in prompts for _ in range(num_images)]
    seeds = [(row, k) for row in range(len(prompts)) for k in range(num_images)]
    made = generator_of(pipeline, pipeline.num_steps, seed=seed)(texts, seeds)
    scale = max(1, 256 // made.shape[-1])
    output.parent.mkdir(parents=True, exist_ok=True)
    images.save_png(images.grid(made, num_images, captions=texts, scale=scale), output)
    print(f"written: {output}")
    return output


def merge(model: str, *, lora: Path, output: Path) -> Path:
    """Add a LoRA to its base and write the whole pipeline; the command ``flowalign merge``."""
    from flowalign.pipelines import lora_files

    _, pipeline = open_model(model, lora)
    lora_files.merge(pipeline, output)
    print(f"written: {output}")
    return output
