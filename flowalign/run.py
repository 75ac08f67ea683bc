"""Assemble the parts of a run and train."""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from filelock import FileLock, Timeout
from tqdm import tqdm

from flowalign import config as configuration
from flowalign import data, estimators, model_card, scored, snapshots
from flowalign.config import ConfigError
from flowalign.core.distillation import Settings
from flowalign.env import note_made
from flowalign.estimators import Estimator
from flowalign.evaluate import monitors
from flowalign.going_on import take_over
from flowalign.pipelines.base import FlowPipeline
from flowalign.run_config import RewardConfig, RunConfig, claim_folder, load_config
from flowalign.train import checkpoint
from flowalign.train.best import WINDOW
from flowalign.train.collect import Collected, Metric
from flowalign.train.fit import Alarmed, Trainer
from flowalign.train.journal import read_log
from flowalign.train.scoring import ChecksRecords, NamedReward
from flowalign.train.sharding import unshared

_DISTANCE_EVERY = 5  # steps between looks at the distance to the base


def build_trainer(config: RunConfig, accelerator: Accelerator, *, pipeline: FlowPipeline | None = None) -> Trainer:
    """Build every part of a run."""
    if not accelerator.is_main_process:
        warnings.filterwarnings("ignore", message="density ratio: most of the batch")  # of all ranks' rows: one tells
    prompts = config.prompts.load(config.seed)
    draw = config.prompts.sampler(prompts, config.seed, config.train.groups)
    rewards = [
        NamedReward(name=name, reward=entry.reward.build(), may_skip=entry.may_skip)
        for name, entry in zip(_reward_names(config.rewards), config.rewards, strict=True)
    ]
    metrics = _metrics(config.metrics)
    _check_prompts([*rewards, *(metric for metric in metrics if not isinstance(metric, str))], prompts)
    _check_best(config, rewards, metrics)
    distils = isinstance(config.algorithm, Settings)
    if distils and metrics:
        raise ConfigError("metrics: a distillation measures its rewards, and trains on none; put them there")
    estimator = None if distils else estimator_of(config)
    minibatches = getattr(config.algorithm, "num_minibatches", 1)
    if minibatches > config.train.groups:
        raise ConfigError(
            f"algorithm.num_minibatches: {minibatches} minibatches of whole groups need as many train.groups, got {config.train.groups}"
        )
    built = pipeline or config.pipeline.build(device=accelerator.device, seed=config.seed)
    if built.device.type != accelerator.device.type:
        raise ValueError(
            f"pipeline: is on {built.device}, but accelerate works on {accelerator.device}; build it with device=accelerator.device"
        )
    return Trainer(
        pipeline=built,
        teacher=teacher_of(config, built) if distils else None,
        algorithm=config.algorithm.build(),
        estimator=estimator,
        rewards=rewards,
        metrics=metrics,
        draw=draw,
        config=config.train,
        seed=config.seed,
        folder=config.output,
        accelerator=accelerator,
    )


def teacher_of(config: RunConfig, student: FlowPipeline) -> FlowPipeline | None:
    """Return the student's pipeline with the teacher's guidance, on the same networks; None where it has none of its own.

    Raises:
        ConfigError: If the student is guided itself, or the pipeline makes no second pass.
    """
    if student.family.guidance_scale > 1:
        raise ConfigError(
            f"pipeline.guidance_scale: got {student.family.guidance_scale}, but a student of few steps is not guided; set it to no guidance, and "
            "algorithm.guidance_scale to the teacher's"
        )
    scale = config.algorithm.guidance_scale
    if scale == 1:
        return None
    try:
        guided = config.pipeline.guided(scale, student.pipe)
    except ValueError as error:
        raise ConfigError(f"algorithm.guidance_scale: {error}") from error
    teacher = student.guided(guided.family(student.pipe))
    if teacher.rows_per_evaluation != 2 * student.rows_per_evaluation:
        raise ConfigError(
            f"algorithm.guidance_scale: got {scale}, but the pipeline makes no second pass with a negative prompt at it (its guidance is embedded, or it "
            "takes no negative prompt); set algorithm.guidance_scale to 1: what is embedded is told to teacher, student and fake score alike"
        )
    return teacher


def _check_prompts(rewards: Sequence[NamedReward], prompts: Sequence[data.Prompt]) -> None:
    """Let rewards that read records refuse them before anything is sampled."""
    for entry in rewards:
        if not isinstance(entry.reward, ChecksRecords):
            continue
        for prompt in prompts:
            try:
                entry.reward.check(prompt.metadata)
            except ValueError as error:
                raise ConfigError(f"{prompt.where}: reward {entry.name!r} cannot score {prompt.text!r}: {error}") from error


def _check_best(config: RunConfig, rewards: Sequence[NamedReward], metrics: Sequence[Metric]) -> None:
    """Refuse to keep the best step by something that will not be logged; a reward with several columns logs ``name/column``."""
    by = config.train.keep_best_by
    names = {*(entry if isinstance(entry, str) else entry.name for entry in (*rewards, *metrics)), *monitors.PIXELS, monitors.DIVERSITY}
    if by is not None and by.partition("/")[0] not in names:
        raise ConfigError(
            f"train.keep_best_by: got {by!r}, but what is logged is {', '.join(sorted(names))}; add it under rewards with weight 0, or under "
            "metrics"
        )


def estimator_of(config: RunConfig) -> Estimator:
    """Build a configuration's estimator; rewards with weights tell it theirs.

    Raises:
        ConfigError: If it is none, or takes no weights and there are some.
    """
    spec, weights = config.advantage, [entry.weight for entry in config.rewards]
    if isinstance(spec, str):
        spec = {"type": spec}
    if isinstance(spec, list):
        if any(weight != 1 for weight in weights):
            raise ConfigError("rewards: weights have no meaning beside a list of stages; give them to its combine_rewards stage")
        return estimators.from_config(spec)
    if not isinstance(spec, dict) or not isinstance(spec.get("type"), str):
        raise ConfigError(f"advantage: needs a recipe's name, a mapping with a 'type' or a list of stages, got {spec!r}")
    made = estimators.config(spec["type"])
    options = {key: value for key, value in spec.items() if key != "type"}
    if "reward_weights" in {field.name for field in fields(made)}:
        options.setdefault("reward_weights", weights)
    elif any(weight != 1 for weight in weights):
        raise ConfigError(f"rewards: recipe {spec['type']!r} takes no weights; leave them at 1 or choose another recipe")
    try:
        return estimators.recipe(spec["type"], **options)
    except ValueError as error:
        raise ConfigError(f"advantage: {error}") from error


def _accelerator(config: RunConfig, *, cpu: bool) -> Accelerator:
    """Make the accelerator with what the configuration says, whatever a stored accelerate configuration says of numerics."""
    trackers: Any = list(config.train.trackers) or None
    # Two adapters on one wrapped network, of which each backward pass trains one.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if isinstance(config.algorithm, Settings) else None
    accelerator = Accelerator(
        mixed_precision="no",
        gradient_accumulation_steps=1,
        log_with=trackers,
        project_dir=str(config.output),
        cpu=cpu,
        kwargs_handlers=handlers,
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            "accelerate's own gradient accumulation is switched on (ACCELERATE_GRADIENT_ACCUMULATION_STEPS); unset it and use "
            "train.micro_batch_size, which changes nothing beyond rounding"
        )
    return accelerator


def _metrics(entries: Sequence[RewardConfig | Literal["novelty"]]) -> list[Metric]:
    names = iter(_reward_names([entry for entry in entries if not isinstance(entry, str)]))
    return [
        entry if isinstance(entry, str) else NamedReward(name=next(names), reward=entry.reward.build(), may_skip=entry.may_skip)
        for entry in entries
    ]


def _reward_names(entries: Sequence[RewardConfig]) -> list[str]:
    names = [type(entry.reward).__module__.rpartition(".")[2] for entry in entries]
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]


def run_training(config: RunConfig, *, pipeline: FlowPipeline | None = None, source: Path | None = None) -> Trainer:
    """Train and save the weights into ``output/weights``.

    Args:
        config: The run's.
        pipeline: Its pipeline, where that is built already.
        source: Folder of a run whose last checkpoint it goes on from; see `flowalign.going_on.take_over`.

    Returns:
        The trainer, with what it trained.
    """
    _check_trackers(config.train.trackers)
    accelerator = _accelerator(config, cpu=pipeline is not None and pipeline.device.type == "cpu")
    # Built first: a mistake in the configuration must not claim a folder.
    trainer = build_trainer(config, accelerator, pipeline=pipeline)
    with alone_in(config.output) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            taken = None if source is None else take_over(source, config)
            if taken is not None:
                print(f"going on from step {taken} of {source}")
            claim_folder(config)
            note_made(config.output)
        accelerator.wait_for_everyone()
        if config.train.trackers:
            accelerator.init_trackers("flowalign", config=_settings(configuration.encode(config)))
        if accelerator.is_main_process and isinstance(config.algorithm, Settings):
            print(f"memory: {_memory(trainer)}")
        trainer.distance_every = _DISTANCE_EVERY
        trainer.after_step = _after_step(config, accelerator, trainer)
        alarm = None
        try:
            trainer.fit(config.steps)
        except Alarmed as error:
            alarm = error  # what the run was stopped for must not cost its weights
        assert isinstance(trainer.pipeline, FlowPipeline)
        whole = unshared(trainer.pipeline)
        if whole is not None and accelerator.is_main_process:
            done = read_log(config.output / "log.jsonl")[-1]["step"] + 1
            whole.save(config.output / "weights", trainer.result, notes=_notes(config, step=done))
            model_card.write(config, config.output / "weights", step=done, pipeline=whole)
            print(f"weights: {config.output / 'weights'}")
            _save_best(trainer, config, whole)
        accelerator.end_training()
        if alarm is not None:
            raise alarm
    return trainer


def _memory(trainer: Trainer) -> str:
    """Say what each player costs: weights, gradient and moments; activations come on top."""
    sizes: dict[str, int] = trainer.pipeline.roles.memory()  # type: ignore[attr-defined]
    for name, head in trainer.cast.heads.items():
        sizes[name] = 4 * sum(parameter.numel() * parameter.element_size() for parameter in head.parameters)
    return ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items())


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Refuse a folder that another process works in. The lock is the operating system's and ends with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", blocking=False):
            yield
    except Timeout as error:
        raise ConfigError(f"{folder}: another process works in this folder; wait for it, or choose another --output") from error


def _check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that accelerate would leave out without a word."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.trackers: {name} is not installed; pip install 'flowalign-diffusion[{name}]', or remove it")


def _save_best(trainer: Trainer, config: RunConfig, pipeline: FlowPipeline) -> None:
    """Write the weights of the best step, where one was to be kept; the trainer keeps those of the last."""
    if trainer.best is None:
        return
    found = checkpoint.load_newest(config.output / "best")
    if found is None or trainer.best.value is None:
        print(f"best weights: none, because {WINDOW} steps with a finite {trainer.best.by} are compared")
        return
    step, state = found
    last = copy.deepcopy(pipeline.roles.state_dict())
    pipeline.roles.load_state_dict(state["roles"])
    pipeline.save(config.output / "best_weights", trainer.result, notes=_notes(config, step=step))
    model_card.write(config, config.output / "best_weights", step=step, pipeline=pipeline)
    pipeline.roles.load_state_dict(last)
    print(f"best weights: {config.output / 'best_weights'} (step {step}: {trainer.best.by} {trainer.best.value:.4f})")


def _notes(config: RunConfig, *, step: int) -> dict[str, str]:
    """Say in the file what it was trained on and how, after so many finished steps."""
    lines = [line for line in read_log(config.output / "log.jsonl") if line["step"] < step]
    encoded = configuration.encode(config)
    return {
        "base_model": model_card.base_model(config),
        "algorithm": json.dumps(encoded["algorithm"]),
        "advantage": json.dumps(encoded["advantage"]),
        "seed": str(config.seed),
        "steps": str(step),
        "last_rewards": json.dumps(lines[-1]["reward"] if lines else {}),
    }


def _settings(value: Any, prefix: str = "") -> dict[str, Any]:
    """Lay a configuration out as dotted keys with plain values, which is all that trackers take."""
    if isinstance(value, dict):
        return {
            key: item for name, inner in value.items() for key, item in _settings(inner, f"{prefix}.{name}" if prefix else name).items()
        }
    return {prefix: value if isinstance(value, int | float | str | bool) else str(value)}


def _after_step(config: RunConfig, accelerator: Accelerator, trainer: Trainer) -> Callable[[dict[str, Any], Collected], None]:
    """Return what a step ends with: monitors into its line, alarms onto the terminal, and records and a grid of samples where they are due."""
    log = config.output / "log.jsonl"
    lines: list[dict[str, Any]] = []
    told: set[str] = set()
    measured = isinstance(config.algorithm, Settings)  # nothing is trained on rewards
    trained = (
        set() if measured else {name for name, entry in zip(_reward_names(config.rewards), config.rewards, strict=True) if entry.weight > 0}
    )

    def watch(line: dict[str, Any], made: Collected) -> None:
        if not lines:
            lines.extend(earlier for earlier in read_log(log) if earlier["step"] < line["step"])
        rows = monitors.features(made.images)
        if accelerator.num_processes > 1:
            everyone = accelerator.gather(rows.float().to(accelerator.device)).cpu().double()
            # Rank r holds rows r, r + world, ...
            rows = everyone.unflatten(0, (accelerator.num_processes, -1)).transpose(0, 1).flatten(0, 1)
        line["monitor"] |= monitors.summarise(rows, torch.arange(len(rows)) // max(1, len(rows) // config.train.groups))
        lines.append(line)
        mine = [name for name in line["reward"] if name.split("/")[0] in trained]
        held_out = [name for name in (*line.get("metric", ()), *line["reward"]) if name not in mine]
        line["monitor"] |= monitors.gaps(lines, mine, held_out)
        found = monitors.student_alarms(lines, list(line["reward"])) if measured else monitors.alarms(lines, mine, held_out)
        if found:
            line["alarm"] = [alarm.text for alarm in found]
        for alarm in found:
            if alarm.monitor not in told and accelerator.is_main_process:
                tqdm.write(f"ALARM at step {alarm.step + 1}: {alarm.text} (look at samples and held-out rewards)")
            told.add(alarm.monitor)
        every, done = config.train.sample_every, line["step"] + 1
        if accelerator.is_main_process and scored.is_due(done, config.steps, config.train):
            scored.keep(config.output, done, made, seed=config.seed)
        if every and (accelerator.is_main_process or trainer.cast.is_sharded) and (done % every == 0 or done == config.steps):
            with trainer.clock.phase("samples"):
                snapshots.take(trainer, config, done)

    if config.train.sample_every:
        (config.output / snapshots.FOLDER).mkdir(parents=True, exist_ok=True)
    return watch


def train(name: str, overrides: Sequence[str] = (), *, source: Path | None = None) -> None:
    """Train from a configuration; the command ``flowalign train``."""
    run_training(load_config(name, overrides), source=source)
