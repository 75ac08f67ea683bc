"""Going on from another run's last checkpoint with other settings, in a folder of its own: ``flowalign train CONFIG --from RUN``."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowalign import config as configuration
from flowalign.config import ConfigError
from flowalign.run_config import RunConfig, resolved
from flowalign.train.checkpoint import present

# What weights, moments and an estimator's memory are of; and what a teacher's samples were made by.
_KEPT = ("pipeline.type", "pipeline.model", "pipeline.lora", "algorithm.type", "advantage")
_OF_PAIRS = (
    *("seed", "prompts", "pipeline", "algorithm.num_pairs", "algorithm.teacher_steps", "algorithm.guidance_scale"),
    *("train.groups", "train.group_size", "train.rollout_batch_size"),
)


def take_over(run: Path, config: RunConfig) -> int | None:
    """Copy what a run is resumed from into the folder of another; the run itself stays as it is.

    Rates, penalties, rewards, prompts and the length may differ. The model, what is trained of it, the algorithm and the estimator may not: a
    checkpoint holds their weights, moments and memory. A teacher's samples are taken along where the same would be made again.

    Args:
        run: Folder of the run to go on from.
        config: What goes on, in ``config.output``.

    Returns:
        The step that it goes on from; None where ``config.output`` holds a run already, which is resumed as it is.

    Raises:
        ConfigError: If it is no run, has no checkpoint, has done all steps already, or holds weights of something else.
    """
    folder = config.output
    if (folder / "config.yaml").is_file():
        return None
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"--from {run}: not a run folder (config.yaml is missing); give the folder that `flowalign train` wrote")
    stored, encoded = resolved(run / "config.yaml"), configuration.encode(config)
    changed = configuration.differences(_of(stored, _KEPT), _of(encoded, _KEPT))
    if changed:
        raise ConfigError(f"--from {run}: its checkpoints are of something else (changed: {'; '.join(changed)})")
    checkpoints = present(run / "checkpoints")
    if not checkpoints:
        raise ConfigError(f"--from {run}: has no checkpoint; it was stopped before its first one")
    done = max(checkpoints)
    if done >= config.steps:
        raise ConfigError(f"steps: got {config.steps}, but {run} has done {done} already; give more")
    same_pairs = _of(stored, _OF_PAIRS) == _of(encoded, _OF_PAIRS)
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("checkpoints", "pairs", "best"):
        shutil.rmtree(folder / part, ignore_errors=True)  # of a copy that was interrupted
        if (run / part).is_dir() and (part != "pairs" or same_pairs):
            shutil.copytree(run / part, folder / part)
    shutil.copyfile(run / "log.jsonl", folder / "log.jsonl")
    return done


def _of(encoded: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: functools.reduce(lambda inner, name: inner.get(name, {}), key.split("."), encoded) for key in keys}
