"""What the command line says of a suite, turned into what the suite is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from flowalign import config as configuration
from flowalign import data
from flowalign.config import ConfigError
from flowalign.rewards import geneval_prompts
from flowalign.run_config import RewardConfig
from flowalign.train.scoring import NamedReward, score

SHAPES_PROMPTS = 300  # of the shapes suite, where the command line does not say
_OF = {"shapes": ("split", "reward"), "geneval": ("detector", "clip", "split"), "prompts": ("prompts", "reward")}


def suite_options(name: str, num_prompts: int | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a suite; models are loaded here, so that missing weights are noticed before anything is generated.

    Args:
        name: The suite.
        num_prompts: As on the command line.
        options: ``split``; of "geneval" also ``detector`` and ``clip``; of "shapes" ``reward`` (YAML texts), measured besides; of "prompts" ``prompts`` (a
            file) and ``reward``. None where not given.

    Raises:
        ConfigError: If an option belongs to another suite, or one is missing.
    """
    given = given_options(name, options)
    if name == "shapes":
        rewards = given.pop("reward", None)
        scored = {} if rewards is None else {"score": Scorer(named_rewards(rewards))}
        return {**given, **scored, **({} if num_prompts else {"num_prompts": SHAPES_PROMPTS})}
    if name == "geneval":
        from flowalign.rewards.geneval import Config

        split = {"split": given["split"]} if "split" in given else {}
        _check_split(given.get("split", "official"))
        return {"judged_by": Config(**{key: given[key] for key in ("detector", "clip") if key in given}).build(), **split}
    return _of_prompts(given) if name == "prompts" else {}


def given_options(name: str, options: Mapping[str, Any], flag: str = "--") -> dict[str, Any]:
    """Return the options that are given, if they are those of the suite; nothing is loaded.

    Args:
        name: The suite.
        options: As of :func:`suite_options`.
        flag: What stands before an option's name where the user wrote it.

    Raises:
        ConfigError: If an option belongs to another suite, or one is missing.
    """
    given = {key: value for key, value in options.items() if value is not None}
    odd = next((key for key in given if name in _OF and key not in _OF[name]), None)
    if odd is not None:
        owners = " or ".join(suite for suite, keys in _OF.items() if odd in keys)
        raise ConfigError(f"{flag}{odd}: is an option of suite {owners}, not of {name!r}")
    missing = next((key for key in _OF["prompts"] if key not in given), None) if name == "prompts" else None
    if missing is not None:
        raise ConfigError(f"{flag}{missing}: is needed by suite prompts, for example prompts my_prompts.txt and reward clip_score")
    return given


def _of_prompts(given: Mapping[str, Any]) -> dict[str, Any]:
    prompts = data.read_prompts(Path(given["prompts"]))
    lines: dict[str, str] = {}
    for prompt in prompts:
        text = json.dumps(prompt.metadata, sort_keys=True)
        if text in lines:
            raise ConfigError(f"{prompt.where}: the prompt stands at {lines[text]} already; remove it, or ask for more --images-per-prompt")
        lines[text] = prompt.where
    rewards = named_rewards(given["reward"])
    for entry in rewards:
        check = getattr(entry.reward, "check", None)
        for prompt in prompts if check is not None else ():
            try:
                check(prompt.metadata)
            except ValueError as error:
                raise ConfigError(f"{prompt.where}: reward {entry.name!r} cannot score {prompt.text!r}: {error}") from error
    return {
        "title": Path(given["prompts"]).stem,
        "records": [prompt.metadata for prompt in prompts],
        "score": Scorer(rewards),
    }


def named_rewards(texts: Sequence[str], option: str = "--reward") -> list[NamedReward]:
    """Build rewards from YAML texts, such as ``clip_score`` or ``{type: clip_score, model: FOLDER}``."""
    entries: list[RewardConfig] = []
    for text in texts:
        try:
            entries.append(configuration.decode(RewardConfig, {"reward": yaml.safe_load(text)}, option))
        except yaml.YAMLError as error:
            raise ConfigError(f"{option} {text!r}: not YAML: {' '.join(str(error).split())}") from error
    names = [type(entry.reward).__module__.rpartition(".")[2] for entry in entries]
    numbered = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
    # A judge's unreadable answer is left out and counted; nothing is made up for it.
    return [NamedReward(name=name, reward=entry.reward.build(), may_skip=True) for name, entry in zip(numbered, entries, strict=True)]


@dataclass(frozen=True)
class Scorer:
    """What a suite scores with: every reward's raw values by name."""

    rewards: Sequence[NamedReward]

    @property
    def scores_alone(self) -> bool:
        """Whether all rewards score each image by itself."""
        return all(entry.is_alone for entry in self.rewards)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Score images."""
        table = score(self.rewards, images, prompts, metadata)
        return dict(zip(table.names, table.values.unbind(1), strict=True))


def write_geneval_prompts(path: Path, split: str, *, num: int, seed: int) -> Path:
    """Write GenEval-style prompts as JSON lines; the command ``flowalign geneval prompts``.

    Raises:
        ConfigError: If there is no such split, or the file's name does not end in ``.jsonl``: readers go by it.
        ValueError: If there are fewer prompts than asked for.
    """
    _check_split(split)
    if path.suffix != ".jsonl":
        raise ConfigError(f"--output: got {path}, needed a name that ends in .jsonl (a record a line)")
    records = geneval_prompts.official() if split == "official" else geneval_prompts.generate(split, seed=seed, num=num)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    print(f"written: {path}, {len(records)} prompts")
    return path


def _check_split(split: Any) -> None:
    if split not in ("official", "train", "unseen", "all"):
        raise ConfigError(f"--split: got {split!r}, needed official, train, unseen or all")
