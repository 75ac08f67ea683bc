"""`flowalign evaluate`: score a model on a suite, alone or against another on the same prompts and noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign import config as configuration
from flowalign.config import ConfigError
from flowalign.core.algorithm import REFERENCE
from flowalign.evaluate.quality import Comparison
from flowalign.evaluate.records import Evaluation
from flowalign.evaluate.suites import suite
from flowalign.evaluate.verdicts import check_resolution
from flowalign.evaluation_result import Result
from flowalign.fidelity_options import Ruler, ruler
from flowalign.generate import open_model, run_of, score_model, student_steps
from flowalign.pipelines import lora_files
from flowalign.pipelines.base import FlowPipeline
from flowalign.pipelines.family import ModelConfig
from flowalign.pipelines.roles import LoRA
from flowalign.run_config import load_config, resolved
from flowalign.suite_options import suite_options


def evaluate(
    model: str,
    *,
    suite_name: str = "shapes",
    lora: Path | Sequence[Path] | None = None,
    against: str | Sequence[str] | None = None,
    output: Path | None = None,
    seed: int = 0,
    num_prompts: int | None = None,
    images_per_prompt: int = 4,
    num_steps: int | None = None,
    resolution: float = 0.02,
    reference_images: Path | None = None,
    extractor: str | None = None,
    batch_size: int = 128,
    fields: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score a model on a suite, alone or against another on the same prompts and noise; the command ``flowalign evaluate``.

    Several LoRAs are runs of one recipe from several training seeds. ``against`` names another model, or a LoRA of the same one; several are LoRAs of
    another recipe's training seeds. ``reference_images`` and ``extractor`` are those of :func:`flowalign.fidelity_options.ruler`, ``options`` those of
    :func:`flowalign.suite_options.suite_options`, for the suites "geneval" and "prompts". ``batch_size`` images are made by one call of the model;
    ``fields`` are ``--pipeline.KEY VALUE`` arguments, which hold for every model that is compared.
    """
    loras = [] if lora is None else [lora] if isinstance(lora, Path) else list(lora)
    others = [] if against is None else [against] if isinstance(against, str) else list(against)
    _check_sides(loras, others)
    check_resolution(resolution)
    sizes = {"num_prompts": num_prompts, "images_per_prompt": images_per_prompt}
    chosen = suite(suite_name, **{**sizes, **suite_options(suite_name, num_prompts, options or {})})
    settings, evaluated = open_model(model, loras[0] if loras else None, num_steps=num_steps, fields=fields)
    measured_by = ruler(chosen, folder=reference_images, extractor=extractor, image_size=image_size(evaluated))
    steps = own = evaluated.num_steps
    if others or loras:
        steps = _steps_of_other(loras[0] if loras else Path(model), others[0] if others else None, own)
    how: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    runs = [score_model(evaluated, chosen, num_steps=own, **how, title=str(loras[0]) if loras else model)]
    bases: list[Evaluation] = []
    if others:
        for name in others:
            scored = score_model(_other(settings, model, name, evaluated), chosen, num_steps=steps, **how, title=name)
            bases.append(replace(scored, images=None) if bases else scored)
    elif loras:
        bases.append(score_model(evaluated, chosen, num_steps=steps, **how, title=f"{model} without LoRA", role=REFERENCE))
    known = measured_by.features(bases[0]) if measured_by is not None and bases else None
    fidelity = _fidelity(measured_by, runs[0], known)
    for further in loras[1:]:
        _, evaluated = open_model(model, further, num_steps=num_steps, fields=fields)
        scored = score_model(evaluated, chosen, num_steps=own, **how, title=str(further))
        fidelity += _fidelity(measured_by, scored, known)
        # Pictures are of the first run; those of all would fill the memory.
        runs.append(replace(scored, images=None))
    result = Result(
        runs=runs,
        bases=bases,
        names=(", ".join(others) or f"{model} without LoRA", f"{model} with {', '.join(map(str, loras))}" if loras else model),
        num_steps=(own, steps),
        fidelity=fidelity,
        resolution=resolution,
        settings=configuration.encode(settings),
    )
    if output is not None:
        result.write(output)
    result.show()
    return {**result.as_dict(), "settings": dict(result.settings)}


def image_size(pipeline: FlowPipeline) -> tuple[int, int]:
    """Return height and width of a pipeline's images, by decoding one latent of zeros."""
    with torch.no_grad():
        height, width = pipeline.decode(torch.zeros(1, *pipeline.event_shape, device=pipeline.device)).shape[2:]
    return int(height), int(width)


def _fidelity(measured_by: Ruler | None, run: Evaluation, base: Tensor | None) -> list[Comparison]:
    return [] if measured_by is None else [measured_by.compare(run, base)]


def _other(settings: ModelConfig, model: str, name: str, like: FlowPipeline) -> FlowPipeline:
    """Build what a model is compared with, with the same settings: a comparison is of weights, not of guidance or sizes."""
    weights = lora_files.weights_of(Path(name))
    if not lora_files.holds_lora(weights):
        variant = None if run_of(weights) else settings.variant  # a run writes plain files
        return replace(settings, model=str(weights) if weights.is_dir() else name, lora=None, variant=variant).build(device=like.device)
    rank, alpha, targets = lora_files.settings(weights)
    built = replace(settings, model=model, lora=LoRA(rank=rank, alpha=alpha, targets=targets)).build(device=like.device)
    built.load_lora(weights)
    return built


def _steps_of_other(mine: Path, other: str | None, num_steps: int) -> int:
    """Return the steps of what a model is compared with: its own where it is a student, the teacher's where the model is one, else the same."""
    runs = [run_of(mine), None if other is None else run_of(Path(other))]
    own, theirs = (None if run is None else load_config(str(run)) for run in runs)
    few = None if theirs is None else student_steps(theirs)
    return few or (num_steps if own is None or student_steps(own) is None else own.pipeline.num_steps)


def _check_sides(loras: Sequence[Path], others: Sequence[str]) -> None:
    """Refuse sides that are no training seeds of one recipe each."""
    _check_recipe("--lora", loras)
    if len(others) < 2:
        return
    if len(loras) < 2:
        raise ConfigError(
            f"--against: got {len(others)} training seeds, but {len(loras)} of --lora; give at least 2 of each side, or compare with one"
        )
    _check_recipe("--against", [Path(name) for name in others])


def _check_recipe(option: str, loras: Sequence[Path]) -> None:
    """Refuse runs that differ in more than their seed: what is between them would be no spread of training seeds."""
    if len({path.resolve() for path in loras}) < len(loras):
        raise ConfigError(f"{option}: a run is given twice; several are several training seeds of one recipe")
    found = [(lora, None if (run := run_of(lora)) is None else resolved(run)) for lora in loras]
    for lora, settings in found[1:]:
        first = found[0][1]
        if settings is None or first is None:
            raise ConfigError(
                f"{option}: {lora if settings is None else found[0][0]} is no run, so its recipe is not known; several {option} are runs"
            )
        one, other = ({key: value for key, value in each.items() if key not in ("seed", "output")} for each in (first, settings))
        changed = configuration.differences(one, other)
        if changed:
            raise ConfigError(
                f"{option}: {lora} is of another recipe than {found[0][0]} ({'; '.join(changed)}); several {option} are training seeds of one recipe. Compare "
                "recipes with flowalign benchmark"
            )
