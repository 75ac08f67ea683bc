"""Assemble the parts: train from a configuration, evaluate, sample, and the demo that does all of it."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from flowalign import config as configuration
from flowalign import data, estimators, images, shapes
from flowalign.config import ConfigError, Plugin
from flowalign.core.algorithm import CURRENT
from flowalign.core.plans import ode
from flowalign.core.randomness import normal
from flowalign.evaluate.records import Evaluation, compare, table
from flowalign.evaluate.suites import run_suite, suite
from flowalign.pipelines.base import FlowPipeline
from flowalign.train.fit import TrainConfig, Trainer
from flowalign.train.journal import write_atomically
from flowalign.train.scoring import NamedReward

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Where training prompts come from.

    Attributes:
        source: "shapes", or a file: ``.txt`` with a prompt a line, ``.jsonl`` with a record a line.
        split: Of the shapes world: "train" or "heldout".
        num: How many; null for all.
        tag_weights: How often prompts of each tag come, as whole numbers (``{position: 2, colors: 1}``); 0 leaves a tag out. Null draws
            all prompts alike, so that a tag comes as often as it has prompts.
    """

    source: str = "shapes"
    split: str = "train"
    num: int | None = None
    tag_weights: dict[str, int] | None = None

    def __post_init__(self) -> None:
        """Refuse numbers and proportions that are none."""
        if self.num is not None and self.num < 1:
            raise ValueError(f"num: got {self.num}, needed at least 1, or null for all")
        weights = self.tag_weights
        if weights is None:
            return
        for tag, weight in weights.items():
            if not isinstance(weight, int) or isinstance(weight, bool) or weight < 0:
                raise ValueError(f"tag_weights: {tag}: got {weight!r}, needed a whole number of at least 0")
        if sum(weights.values()) == 0:
            raise ValueError("tag_weights: all are 0, needed a positive one")

    def load(self, seed: int) -> list[data.Prompt]:
        """Read or generate the prompts."""
        if self.source == "shapes":
            return data.number(shapes.prompts(self.split, seed=seed, num=self.num), "prompts")  # type: ignore[arg-type]
        prompts = data.read_prompts(Path(self.source))
        return prompts[: self.num]

    def sampler(self, seed: int, num: int) -> Callable[[int], list[data.Prompt]]:
        """Load the prompts and return the function from a step to its ``num`` prompts."""
        prompts, weights = self.load(seed), self.tag_weights
        if len(prompts) < num:
            raise ConfigError(f"train.groups: a step takes {num} prompts, but there are {len(prompts)}; lower it or add prompts")
        if weights is None:
            return lambda step: data.draw(prompts, seed=seed, step=step, num=num)
        tagged = data.by_tag(prompts, weights)
        return lambda step: data.draw_by_tag(tagged, weights, seed=seed, step=step, num=num)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One reward of a run.

    Attributes:
        reward: The plugin.
        weight: Weight in the sum of rewards; 0 only logs it.
        may_skip: NaN means "not computed" instead of being an error.
    """

    reward: Annotated[Any, Plugin("rewards")]
    weight: float = 1.0
    may_skip: bool = False

    def __post_init__(self) -> None:
        """Refuse negative weights."""
        if self.weight < 0:
            raise ValueError(
                f"weight: must not be negative, got {self.weight} (to penalise, negate the reward and keep the weight positive)"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One reproducible run.

    Attributes:
        seed: Seed of everything.
        steps: Training steps in all.
        output: Run folder.
        pipeline: Model and how it samples.
        prompts: Training prompts.
        rewards: What images are scored by.
        advantage: Recipe of the estimator core: a name, a mapping with "type", or a list of stages.
        algorithm: How advantages become a loss.
        train: Sizes and rates.
    """

    seed: int = 0
    steps: int
    output: Path = Path("runs/run")
    pipeline: Annotated[Any, Plugin("pipelines")]
    prompts: PromptsConfig = PromptsConfig()
    rewards: tuple[RewardConfig, ...]
    advantage: Any = "flow_grpo"
    algorithm: Annotated[Any, Plugin("algorithms")]
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        """Refuse a run that cannot begin."""
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, needed at least 1")
        if not self.rewards:
            raise ValueError("rewards: got none, needed at least one")


def find_config(name: str) -> Path:
    """Return a configuration's path: a file, or the name of one that ships with flowalign.

    Raises:
        FileNotFoundError: If it is neither.
    """
    shipped = CONFIGS / f"{name}.yaml"
    if Path(name).is_file() or not shipped.is_file():
        if not Path(name).is_file():
            known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
            raise FileNotFoundError(f"{name}: no such file, and no shipped configuration of that name (there are {known})")
        return Path(name)
    return shipped


def load_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and decode a configuration."""
    raw = configuration.override(configuration.read_yaml(find_config(name)), overrides)
    decoded: RunConfig = configuration.decode(RunConfig, raw)
    return decoded


def claim_folder(config: RunConfig) -> bool:
    """Write the resolved configuration into the run folder, or check that a run that is there is the same but for its length.

    Returns:
        True if there was a run already.

    Raises:
        ConfigError: If the folder belongs to another configuration; the changed fields are listed.
    """
    encoded = configuration.encode(config)
    path = config.output / "config.yaml"
    if path.is_file():
        # More steps is going on, and a moved folder is the same run.
        free = ("steps", "output")
        before = {key: value for key, value in configuration.read_yaml(path).items() if key not in free}
        changed = configuration.differences(before, {key: value for key, value in encoded.items() if key not in free})
        if changed:
            raise ConfigError(
                f"{config.output}: holds a run of another configuration (changed: {'; '.join(changed)}); choose another --output"
            )
    existed = path.is_file()
    config.output.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(encoded, sort_keys=False)
    if not existed or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)
    return existed


def build_trainer(config: RunConfig, accelerator: Accelerator, *, pipeline: FlowPipeline | None = None) -> Trainer:
    """Build every part of a run."""
    draw = config.prompts.sampler(config.seed, config.train.groups)
    rewards = [
        NamedReward(name=name, weight=entry.weight, reward=entry.reward.build(), may_skip=entry.may_skip)
        for name, entry in zip(_reward_names(config), config.rewards, strict=True)
    ]
    estimator = _estimator(config.advantage, [entry.weight for entry in config.rewards])
    minibatches = getattr(config.algorithm, "num_minibatches", 1)
    if minibatches > config.train.groups:
        raise ConfigError(
            f"algorithm.num_minibatches: {minibatches} minibatches of whole groups need as many train.groups, got {config.train.groups}"
        )
    built = pipeline or config.pipeline.build(device=accelerator.device, seed=config.seed)
    return Trainer(
        pipeline=built,
        algorithm=config.algorithm.build(),
        estimator=estimator,
        rewards=rewards,
        draw=draw,
        config=config.train,
        seed=config.seed,
        folder=config.output,
        accelerator=accelerator,
    )


def _estimator(spec: Any, weights: list[float]) -> Any:
    """Build the estimator, its options checked like every other part of the configuration."""
    if isinstance(spec, str):
        spec = {"type": spec}
    if isinstance(spec, list):
        if any(weight != 1 for weight in weights):
            raise ConfigError("rewards: weights have no meaning beside a list of stages; give them to its combine_rewards stage")
        try:
            return estimators.from_config(spec)
        except TypeError as error:
            raise ConfigError(f"advantage: {error}") from error
    if not isinstance(spec, dict) or not isinstance(spec.get("type"), str):
        raise ConfigError(f"advantage: needs a recipe's name, a mapping with a 'type' or a list of stages, got {spec!r}")
    made = estimators.config(spec["type"])
    options = {key: value for key, value in spec.items() if key != "type"}
    if "reward_weights" in {field.name for field in fields(made)}:
        options.setdefault("reward_weights", weights)
    elif any(weight != 1 for weight in weights):
        raise ConfigError(f"rewards: recipe {spec['type']!r} takes no weights; leave them at 1 or choose another recipe")
    return configuration.decode(made, options, "advantage").build()


def _accelerator(config: RunConfig, *, cpu: bool) -> Accelerator:
    """Make the accelerator with what the configuration says, whatever a stored accelerate configuration says of numerics."""
    trackers: Any = list(config.train.trackers) or None
    accelerator = Accelerator(
        mixed_precision="no", gradient_accumulation_steps=1, log_with=trackers, project_dir=str(config.output), cpu=cpu
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            "accelerate's own gradient accumulation is switched on (ACCELERATE_GRADIENT_ACCUMULATION_STEPS); unset it and use "
            "train.micro_batch_size, which changes nothing beyond rounding"
        )
    return accelerator


def _reward_names(config: RunConfig) -> list[str]:
    names = [type(entry.reward).__module__.rpartition(".")[2] for entry in config.rewards]
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]


def run_training(config: RunConfig, *, pipeline: FlowPipeline | None = None) -> Trainer:
    """Train and save the weights into ``output/weights``."""
    _check_trackers(config.train.trackers)
    accelerator = _accelerator(config, cpu=pipeline is not None and pipeline.device.type == "cpu")
    # Built first: a mistake in the configuration must not claim a folder.
    trainer = build_trainer(config, accelerator, pipeline=pipeline)
    if accelerator.is_main_process:
        claim_folder(config)
    accelerator.wait_for_everyone()
    if config.train.trackers:
        accelerator.init_trackers("flowalign", config=_settings(configuration.encode(config)))
    if config.train.sample_every:
        trainer.after_step = _sample_grids(config, accelerator)
    trainer.fit(config.steps)
    if accelerator.is_main_process:
        trainer.pipeline.save(config.output / "weights", trainer.result)  # type: ignore[attr-defined]
        print(f"weights: {config.output / 'weights'}")
    accelerator.end_training()
    return trainer


def _check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that accelerate would leave out without a word."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.trackers: {name} is not installed; pip install 'flowalign-diffusion[{name}]', or remove it")


def _settings(value: Any, prefix: str = "") -> dict[str, Any]:
    """Lay a configuration out as dotted keys with plain values, which is all that trackers take."""
    if isinstance(value, dict):
        return {
            key: item for name, inner in value.items() for key, item in _settings(inner, f"{prefix}.{name}" if prefix else name).items()
        }
    return {prefix: value if isinstance(value, int | float | str | bool) else str(value)}


def _sample_grids(config: RunConfig, accelerator: Accelerator) -> Callable[[dict[str, Any], Tensor], None]:
    def write(line: dict[str, Any], made: Tensor) -> None:
        if accelerator.is_main_process and line["step"] % config.train.sample_every == 0:
            columns = min(config.train.group_size, len(made))
            picture = images.grid(made[: 4 * columns].cpu(), columns)
            images.save_png(picture, config.output / "samples" / f"step_{line['step']:06d}.png")

    (config.output / "samples").mkdir(parents=True, exist_ok=True)
    return write


def train(name: str, overrides: Sequence[str] = ()) -> None:
    """Train from a configuration; the command ``flowalign train``."""
    run_training(load_config(name, overrides))


# -- evaluate and sample --------------------------------------------------------------------------------------------------------


def generator_of(pipeline: FlowPipeline, num_steps: int, role: str = CURRENT) -> Callable[[list[str], list[tuple[int, int]]], Tensor]:
    """Return what a suite calls for images: the ODE of a role of the pipeline from noise keyed by (noise id, k)."""

    def generate(prompts: list[str], seeds: list[tuple[int, int]]) -> Tensor:
        ids, numbers = (torch.tensor(column) for column in zip(*seeds, strict=True))
        x_init = normal(pipeline.event_shape, seed=0, purpose="evaluate", step=0, prompts=ids, samples=numbers).to(pipeline.device)
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


def settings_of(model: str, lora: Path | None) -> Any:
    """Return how to build a model for evaluation: as the run did that trained it or its LoRA, else with the family's defaults.

    Args:
        model: Folder, hub id or "shapes"; the ``weights`` of a run that trained all weights bring the run's settings.
        lora: A run folder, its ``weights`` folder, or a LoRA file.
    """
    from flowalign.pipelines import lora_files, sd3
    from flowalign.pipelines.roles import LoRA

    places = [Path(model).parent] if lora is None else [lora, lora.parent]
    run = next((place / "config.yaml" for place in places if (place / "config.yaml").is_file()), None)
    # The shipped pipeline is evaluated as its own configuration runs it.
    run = find_config("shapes_awm") if run is None and model == "shapes" else run
    settings = sd3.Config(model=model) if run is None else load_config(str(run)).pipeline
    if lora is None:
        return replace(settings, model=model, lora=None)
    rank, alpha, targets = lora_files.settings(_weights(lora))
    return replace(settings, model=model, lora=LoRA(rank=rank, alpha=alpha, targets=targets))


def _weights(lora: Path) -> Path:
    return lora / "weights" if (lora / "weights").is_dir() else lora


def pipeline_of(model: str, lora: Path | None, *, num_steps: int | None = None) -> FlowPipeline:
    """Load a model for evaluation; see ``settings_of``.

    Args:
        model: Folder, hub id or "shapes".
        lora: A run folder, its ``weights`` folder, or a LoRA file.
        num_steps: Denoising steps; None for those of the settings.
    """
    settings = settings_of(model, lora)
    built = replace(settings, num_steps=num_steps or settings.num_steps).build(device=Accelerator().device)
    if lora is not None:
        built.load_lora(_weights(lora))
    return built


def evaluate(
    model: str,
    *,
    suite_name: str = "shapes",
    lora: Path | None = None,
    against: str | None = None,
    output: Path | None = None,
    seed: int = 0,
    num_prompts: int | None = 300,
    images_per_prompt: int = 4,
    num_steps: int | None = None,
) -> dict[str, Any]:
    """Score a model on a suite, alone or against another on the same prompts and noise; the command ``flowalign evaluate``."""
    chosen = suite(suite_name, num_prompts=num_prompts, images_per_prompt=images_per_prompt)
    settings = settings_of(model, lora)
    settings = replace(settings, num_steps=num_steps or settings.num_steps)
    evaluated = settings.build(device=Accelerator().device)
    if lora is not None:
        evaluated.load_lora(_weights(lora))
    tuned = score_model(evaluated, chosen, num_steps=evaluated.num_steps, seed=seed, title=model)
    result: dict[str, Any] = tuned.summary()
    base = None
    if against is not None:
        # The same settings: a comparison is of weights, not of guidance or sizes.
        other = replace(settings, model=against, lora=None).build(device=evaluated.device)
        base = score_model(other, chosen, num_steps=evaluated.num_steps, seed=seed, title=against)
    elif lora is not None:
        base = score_model(evaluated, chosen, num_steps=evaluated.num_steps, seed=seed, title=f"{model} without LoRA", role="reference")
    if base is not None:
        differences = {measure: found.as_dict() for measure, found in compare(base, tuned).items()}
        result = {"base": base.summary(), "tuned": tuned.summary(), "paired_difference": differences}
    for measure in ("strict", "graded"):
        print(f"\n{measure} on {tuned.suite}, {len(tuned.records)} images, {evaluated.num_steps} steps, seed {seed}")
        print(table(base or tuned, tuned if base else None, measure=measure))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        tuned.write(output / "records.jsonl")
        if base is not None:
            base.write(output / "records_base.jsonl")
        result["settings"] = configuration.encode(settings)
        (output / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"\nwritten: {output}")
    return result


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
    pipeline = pipeline_of(model, lora, num_steps=num_steps)
    texts = [text for text in prompts for _ in range(num_images)]
    seeds = [(seed + row, k) for row in range(len(prompts)) for k in range(num_images)]
    made = generator_of(pipeline, pipeline.num_steps)(texts, seeds)
    scale = max(1, 256 // made.shape[-1])
    output.parent.mkdir(parents=True, exist_ok=True)
    images.save_png(images.grid(made, num_images, captions=texts, scale=scale), output)
    print(f"written: {output}")
    return output


def command_line() -> str:
    """Return the command that is running, for reports."""
    return shlex.join(["flowalign", *sys.argv[1:]])
