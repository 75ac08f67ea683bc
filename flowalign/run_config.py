"""What a run's YAML holds, and the run folder that is made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from flowalign import config as configuration
from flowalign import data, plugins, shapes
from flowalign.config import ConfigError, Plugin
from flowalign.core.distillation import Settings
from flowalign.files import write_atomically
from flowalign.train.checkpoint import present
from flowalign.train.settings import TrainConfig

CONFIGS = Path(__file__).parent / "configs"
_ASIDE = ("stop_on_alarm", "peak_tflops", "shard")  # of train: what a run may change when it goes on


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

    def sampler(self, prompts: list[data.Prompt], seed: int, num: int) -> Callable[[int], list[data.Prompt]]:
        """Return the function from a step to its ``num`` prompts."""
        weights = self.tag_weights
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
        reward: The plugin, or in Python a plain function ``f(prompts, images, **columns)``.
        weight: Weight in the sum of rewards; 0 only logs it.
        may_skip: NaN means "not computed" instead of being an error.
    """

    reward: Annotated[Any, Plugin("rewards")]
    weight: float = 1.0
    may_skip: bool = False

    def __post_init__(self) -> None:
        """Take a plain function as a plugin, and refuse negative weights."""
        if callable(self.reward) and not hasattr(self.reward, "build"):
            object.__setattr__(self, "reward", plugins.of_function(self.reward)())
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
        rewards: What images are scored by; in a distillation they only measure.
        metrics: Side measurements for estimators that read them, in the order of their columns: rewards that are not trained on, or "novelty",
            each image's mean distance to the others of its group (root mean square over 8 x 8 pixels).
        advantage: Recipe of the estimator core: a name, a mapping with "type", or a list of stages.
        algorithm: How advantages become a loss.
        train: Sizes and rates.
    """

    seed: int = 0
    steps: int
    output: Path = Path("runs/run")
    pipeline: Annotated[Any, Plugin("pipelines")]
    prompts: PromptsConfig = PromptsConfig()
    rewards: tuple[RewardConfig, ...] = ()
    metrics: tuple[RewardConfig | Literal["novelty"], ...] = ()
    advantage: Any = "flow_grpo"
    algorithm: Annotated[Any, Plugin("algorithms")]
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        """Refuse a run that cannot begin."""
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, needed at least 1")
        if not isinstance(self.algorithm, Settings) and not any(entry.weight > 0 for entry in self.rewards):
            raise ValueError("rewards: got none of positive weight, needed at least one")


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
    path = find_config(name)
    raw = configuration.override(configuration.read_yaml(path), overrides)
    try:
        decoded: RunConfig = configuration.decode(RunConfig, raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return decoded


def _identity(encoded: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes a run what it is: more steps is going on, a moved folder is the same run, and when to stop, what its speed is compared with
    and how processes share its weights are no part of it.
    """
    kept = {key: value for key, value in encoded.items() if key not in ("steps", "output")}
    return kept | {"train": {key: value for key, value in encoded.get("train", {}).items() if key not in _ASIDE}}


def resolved(path: Path) -> dict[str, Any]:
    """Read a stored configuration, with the defaults of settings that there were not when it was written."""
    stored = configuration.read_yaml(path)
    try:
        return configuration.encode(configuration.decode(RunConfig, stored))
    except ConfigError:
        return stored  # of a setting that there is no longer: the difference names it


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
        changed = configuration.differences(_identity(resolved(path)), _identity(encoded))
        if changed:
            raise ConfigError(
                f"{config.output}: holds a run of another configuration (changed: {'; '.join(changed)}); choose another --output"
            )
        done = max(present(config.output / "checkpoints"), default=0)
        if done > config.steps:
            raise ConfigError(
                f"steps: got {config.steps}, but {config.output} holds a run of {done} steps already; choose another --output"
            )
    existed = path.is_file()
    config.output.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(encoded, sort_keys=False)
    if not existed or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)
    return existed
