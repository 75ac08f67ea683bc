"""Linear combination of saved checkpoints: after a run, search the span of its checkpoints for better weights than the last ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from flowalign.config import ConfigError
from flowalign.core.algorithm import CURRENT
from flowalign.core.combinations import Candidate, Coefficients, combine, search
from flowalign.core.randomness import generator, key
from flowalign.data import Prompt
from flowalign.evaluate.scores import Difference
from flowalign.evaluate.statistics import paired_difference
from flowalign.files import write_atomically
from flowalign.generate import generator_of, student_steps
from flowalign.pipelines.base import FlowPipeline
from flowalign.rewards.parts import cut
from flowalign.run_config import RewardConfig, load_config
from flowalign.suite_options import named_rewards
from flowalign.train import checkpoint
from flowalign.train.cast import AVERAGE
from flowalign.train.scoring import NamedReward, score

_FEW = 4  # checkpoints below which there is little to combine


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The run's own rewards, weighted as in the run, on fixed prompts and noise.

    Attributes:
        pipeline: Generates with its ``current`` role.
        rewards: The run's rewards with their weights.
        num_steps: Denoising steps.
        prompts: One entry for each prompt.
        images_per_prompt: Images of each.
        batch_size: Images of a call.
        seed: Seed of the noise.
    """

    pipeline: FlowPipeline
    rewards: Sequence[tuple[NamedReward, float]]
    num_steps: int
    prompts: Sequence[Prompt]
    images_per_prompt: int
    batch_size: int
    seed: int

    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted reward of each image, float64; a reward with several columns counts by their mean, one that was skipped not at all."""
        self.pipeline.roles.load(CURRENT, weights)
        rows = [(prompt, k) for prompt in self.prompts for k in range(self.images_per_prompt)]
        generate = generator_of(self.pipeline, self.num_steps, CURRENT)
        alone = all(entry.is_alone for entry, _ in self.rewards)
        parts = cut(range(len(rows)) if alone else [prompt.text for prompt, _ in rows], self.batch_size)
        totals = []
        for part in [[rows[row] for row in chosen] for chosen in parts]:
            texts, seeds = [prompt.text for prompt, _ in part], [(key(self.seed, "lcsc", prompt.uid), k) for prompt, k in part]
            pieces = [slice(start, start + self.batch_size) for start in range(0, len(part), self.batch_size)]
            made = torch.cat([generate(texts[piece], seeds[piece]) for piece in pieces])
            columns = [weight * self._column(entry, made, part) for entry, weight in self.rewards]
            totals.append(torch.stack(columns).sum(0))
        return torch.cat(totals)[torch.tensor([row for part in parts for row in part]).argsort()]

    def _column(self, entry: NamedReward, made: Tensor, part: Sequence[tuple[Prompt, int]]) -> Tensor:
        texts, records = [prompt.text for prompt, _ in part], [dict(prompt.metadata) for prompt, _ in part]
        return torch.nan_to_num(torch.nanmean(score([entry], made, texts, records).values, 1))


def lcsc(
    run: Path,
    *,
    output: Path | None = None,
    budget: int = 60,
    num_prompts: int = 64,
    images_per_prompt: int = 1,
    seed: int = 0,
    reward: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Search for a combination of a run's checkpoints, check it on other prompts, and save it; the command ``flowalign lcsc``.

    Args:
        run: Run folder. It keeps ``train.keep_checkpoints`` checkpoints, 2 unless told: train with more.
        output: Where ``weights``, ``config.yaml``, ``search.jsonl`` and ``summary.json`` go; None for ``RUN/lcsc``. The same command goes on there.
        budget: Combinations that are scored.
        num_prompts: Prompts of the search, and as many others for the check; from the run's own prompts.
        images_per_prompt: Images of each.
        seed: Seed of the search, its noise and the choice of prompts.
        reward: What combinations are chosen by, as YAML texts; None for the rewards that the run trained on, or where it trained on none, as a
            distillation does, for all that it measured.

    Returns:
        What ``summary.json`` holds.

    Raises:
        ConfigError: If it is no run, has fewer than two whole checkpoints or four prompts, or nothing to choose by.

    References:
        See `flowalign.core.combinations.search`. Deviation: the metric is the run's reward and not FID, which needs many more images for one value.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: not a run folder (config.yaml is missing); give the folder that `flowalign train` wrote")
    if min(budget, num_prompts, images_per_prompt) < 1:
        raise ConfigError(f"lcsc: got budget {budget}, {num_prompts} prompts, {images_per_prompt} images each; needed at least 1 of each")
    output = run / "lcsc" if output is None else output
    config = load_config(str(run / "config.yaml"))
    steps, tables, result = read_checkpoints(run)
    chosen = choose(config.prompts.load(config.seed), num_prompts, seed)
    rewards = _rewards(config.rewards, reward or ())
    pipeline = config.pipeline.build(device=Accelerator().device, seed=config.seed)
    num_steps = student_steps(config) or pipeline.num_steps
    metric, check = (
        Metric(
            pipeline=pipeline,
            rewards=rewards,
            num_steps=num_steps,
            prompts=prompts,
            images_per_prompt=images_per_prompt,
            batch_size=config.train.rollout_batch_size,
            seed=seed,
        )
        for prompts in chosen
    )
    settings = {
        "steps": steps,
        "denoising_steps": num_steps,
        "num_prompts": len(chosen[0]),
        "images_per_prompt": images_per_prompt,
        "seed": seed,
        "reward": sorted(reward) if reward else "the run's",
    }
    output.mkdir(parents=True, exist_ok=True)
    found = _search(output / "search.jsonl", settings, tables, metric, budget)
    best = max(found, key=lambda entry: entry.score)
    print(
        f"the newest checkpoint scores {found[0].score:.4f} on the search's prompts, the best of {len(found)} combinations {best.score:.4f}"
    )
    weights = combine(tables, best.coefficients)
    difference = _compare(check, result, weights)
    pipeline.roles.load(CURRENT, weights)
    pipeline.save(output / "weights", CURRENT)
    write_atomically(output / "config.yaml", (run / "config.yaml").read_text(encoding="utf-8"))
    return _finish(output, settings, found, best, difference)


def read_checkpoints(run: Path) -> tuple[list[int], list[dict[str, Tensor]], dict[str, Tensor]]:
    """Read the trained weights of every whole checkpoint, oldest first.

    Returns:
        Steps, the ``current`` weights of each (all are held in memory), and the weights that the run is for: the newest average where there is one.

    Raises:
        ConfigError: If fewer than two are whole.
    """
    steps, tables, result = [], [], {}
    for path in checkpoint.present(run / "checkpoints").values():
        try:
            step, state = checkpoint.load(path)
        except ValueError as error:
            print(f"warning: {error}; left out")
            continue
        steps.append(step)
        tables.append(dict(state["roles"][CURRENT]))
        result = dict(state["roles"].get(AVERAGE, tables[-1]))
    if len(tables) < 2:
        raise ConfigError(
            f"{run}: has {len(tables)} whole checkpoints, needed at least 2; train with --train.keep_checkpoints 10 "
            "(and --train.checkpoint_every, so that they are some steps apart)"
        )
    if len(tables) < _FEW:
        print(f"warning: {run} has only {len(tables)} checkpoints; there is little to combine (train with --train.keep_checkpoints 10)")
    return steps, tables, result


def choose(prompts: Sequence[Prompt], num: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Draw prompts to search on and as many others to check on, from distinct texts.

    Raises:
        ConfigError: If there are fewer than two for each.
    """
    distinct = list({prompt.text: prompt for prompt in prompts}.values())
    num = min(num, len(distinct) // 2)
    if num < 2:
        raise ConfigError(f"prompts: got {len(distinct)} distinct ones, needed at least 4: half to search on, half to check on")
    order = torch.randperm(len(distinct), generator=generator(seed, "lcsc prompts")).tolist()
    return [distinct[i] for i in order[:num]], [distinct[i] for i in order[num : 2 * num]]


def _rewards(entries: Sequence[RewardConfig], named: Sequence[str]) -> list[tuple[NamedReward, float]]:
    """Return what combinations are chosen by: what the command names, else what the run trained on, else all that it measured alike."""
    if named:
        return [(entry, 1.0) for entry in named_rewards(named)]
    trained = any(entry.weight > 0 for entry in entries)
    chosen = [(place, entry) for place, entry in enumerate(entries) if entry.weight > 0 or not trained]
    if not chosen:
        raise ConfigError("lcsc: the run has no rewards, so nothing says which combination is better; name one, as in --reward clip_score")
    return [
        (NamedReward(name=f"rewards[{place}]", reward=entry.reward.build(), may_skip=entry.may_skip), entry.weight if trained else 1.0)
        for place, entry in chosen
    ]


def _search(
    path: Path, settings: Mapping[str, Any], tables: Sequence[Mapping[str, Tensor]], metric: Metric, budget: int
) -> list[Candidate]:
    """Run the search; what a file of an interrupted one knows is not generated again."""
    known = _known(path, settings)
    lines = [json.dumps(settings), *(json.dumps({"coefficients": list(c), "score": s}) for c, s in known.items())]
    with tqdm(total=budget, desc="combinations") as bar:

        def answer(coefficients: Coefficients) -> float:
            if coefficients not in known:
                known[coefficients] = float(metric(combine(tables, coefficients)).mean())
                lines.append(json.dumps({"coefficients": list(coefficients), "score": known[coefficients]}))
                write_atomically(path, "\n".join(lines) + "\n")
            return known[coefficients]

        found: list[Candidate] = []
        for candidate in search(answer, len(tables), budget=budget, seed=settings["seed"]):
            found.append(candidate)
            bar.update(1)
            bar.set_postfix(best=f"{max(entry.score for entry in found):.4f}")
    return found


def _known(path: Path, settings: Mapping[str, Any]) -> dict[Coefficients, float]:
    if not path.is_file():
        return {}
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    if json.loads(head) != settings:
        raise ConfigError(f"{path}: is a search with other checkpoints, prompts, rewards or seed; choose another --output, or remove it")
    return {tuple(line["coefficients"]): line["score"] for line in map(json.loads, lines)}


def _compare(check: Metric, result: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Difference:
    """Score the run's own result and the combination on prompts that the search has not seen, paired."""
    base, tuned = check(result), check(weights)
    ids = [prompt.uid for prompt in check.prompts for _ in range(check.images_per_prompt)]
    return paired_difference(base.numpy(), tuned.numpy(), ids, ["reward"] * len(ids))


def _finish(
    output: Path, settings: Mapping[str, Any], found: Sequence[Candidate], best: Candidate, difference: Difference
) -> dict[str, Any]:
    summary = {
        "settings": dict(settings),
        "budget": len(found),
        "coefficients": dict(zip(map(str, settings["steps"]), best.coefficients, strict=True)),
        "search": {"newest": found[0].score, "best": best.score},
        "check": difference.as_dict(),
    }
    write_atomically(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    parts = "  ".join(f"step {step}: {value:+.3f}" for step, value in zip(settings["steps"], best.coefficients, strict=True))
    print(f"coefficients  {parts}")
    print(
        f"check         reward of the combination minus that of the run's weights, on prompts that the search has not seen: {difference.overall}"
    )
    low = difference.overall.low
    if low is None or math.isnan(low) or low <= 0:
        print("              no gain is shown: the search fitted its own prompts, or there is none to find")
    print(f"weights       {output / 'weights'}")
    return summary
