"""Which estimator? Recipes under AWM on the shapes world, at equal images and several training seeds, scored on held-out prompts.

Every run differs from the others in its recipe, its setting and its seed only. The reward is the demo's (half strict, half graded, all tags), or strict, 0 or
1: on the two hardest tags, and on training prompts that the base passes once in eight images or never, in groups of eight and, so that in most groups all
samples fail, of four. Finished runs are kept, so that the command goes on where it was stopped.

    python benchmarks/compare_estimators.py --output runs/compare_estimators --jobs 2

Advantages go to the loss as the recipe makes them. Their size is part of a recipe, and so is reported: the penalty that holds a run near the base
weighs less against large ones.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from flowalign.env import how_made
from flowalign.evaluate.records import Evaluation, compare_runs, read_evaluation
from flowalign.evaluate.report import Report, Table, write_report
from flowalign.evaluate.statistics import seed_spread
from flowalign.evaluate.suites import ShapesSuite
from flowalign.generate import score_model
from flowalign.run import run_training
from flowalign.run_config import RunConfig, load_config
from flowalign.train.journal import read_log

RECIPES = {
    "grpo": "grpo",
    "flow_grpo": "flow_grpo",
    "dr_grpo": "dr_grpo",
    "rloo": "rloo",
    "reinforce_pp_baseline": "reinforce_pp_baseline",
    "gpg": "gpg",
    "pass_at_k": "pass_at_k",
    "bnpo": "{type: bnpo, low: 0.0, high: 1.0}",
    "ngrpo": "{type: ngrpo, r_max: 1.0}",
    "f_dpg (forward KL)": "{type: f_dpg, divergence: forward_kl}",
    "verpo": "verpo",
}
ALL_TAGS = {"single_object": 1, "two_object": 3, "counting": 3, "colors": 2, "position": 4, "color_attr": 3}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is rewarded, on which training prompts, in groups of which size."""

    name: str
    strict: float
    tag_weights: dict[str, int] | None = None
    rarely_passed: bool = False
    group_size: int = 8


SETTINGS = {
    "graded": Setting(name="half strict, half graded reward, all tags", strict=0.5, tag_weights=ALL_TAGS),
    "strict": Setting(
        name="strict reward (0 or 1), the two hardest tags",
        strict=1.0,
        tag_weights={**dict.fromkeys(ALL_TAGS, 0), "position": 1, "color_attr": 1},
    ),
    "rare": Setting(name="strict reward (0 or 1), prompts that the base rarely passes", strict=1.0, rarely_passed=True),
    "few": Setting(
        name="strict reward (0 or 1), prompts that the base rarely passes, groups of four", strict=1.0, rarely_passed=True, group_size=4
    ),
}
REFERENCE = "grpo"
RARE, RARE_FROM, RARE_IMAGES = "rare_prompts.jsonl", 600, 8


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: which recipe, which setting, which seed, and its folder."""

    recipe: str
    setting: str
    seed: int
    folder: Path

    def config(self, options: argparse.Namespace) -> RunConfig:
        """The demo's configuration but for the sizes, the recipe and the reward."""
        overrides = {
            "seed": self.seed,
            "steps": options.steps,
            "output": self.folder / "run",
            "advantage": RECIPES[self.recipe],
            "rewards": f"[{{reward: {{type: shapes, strict: {SETTINGS[self.setting].strict}}}}}]",
            "prompts.source": str(options.output / RARE) if SETTINGS[self.setting].rarely_passed else "shapes",
            "prompts.tag_weights": json.dumps(SETTINGS[self.setting].tag_weights),
            "train.groups": options.images // SETTINGS[self.setting].group_size,
            "train.group_size": SETTINGS[self.setting].group_size,
            "train.checkpoint_every": options.steps,
        }
        return load_config("shapes_awm", [text for key, value in overrides.items() for text in (f"--{key}", str(value))])


def suite(options: argparse.Namespace) -> ShapesSuite:
    """The held-out prompts that every run is scored on."""
    return ShapesSuite(split="heldout", num_prompts=options.num_prompts, images_per_prompt=options.images_per_prompt)


def write_rare_prompts(options: argparse.Namespace) -> None:
    """Write the training prompts of which at most one of eight images of the base passes."""
    path = options.output / RARE
    if path.is_file():
        return
    training = ShapesSuite(split="train", num_prompts=RARE_FROM, images_per_prompt=RARE_IMAGES)
    pipeline = load_config("shapes_awm").pipeline.build(seed=0)
    found = score_model(pipeline, training, num_steps=pipeline.num_steps, seed=1, title="base on training prompts", role="reference")
    passed: dict[int, int] = {}
    for record in found.records:
        passed[record.id] = passed.get(record.id, 0) + record.strict
    lines = [json.dumps(dict(prompt.metadata)) for prompt in training.prompts() if passed[prompt.id] <= 1]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(cell: Cell, options: argparse.Namespace) -> None:
    """Train and score one cell, in a process and a thread of its own."""
    torch.set_num_threads(options.threads)
    cell.folder.mkdir(parents=True, exist_ok=True)
    with (cell.folder / "output.txt").open("w") as output:  # the runs' own progress would be a tangle
        sys.stdout = sys.stderr = output
        try:
            config = cell.config(options)
            pipeline = config.pipeline.build(seed=cell.seed)
            trainer = run_training(config, pipeline=pipeline)
            found = score_model(pipeline, suite(options), num_steps=pipeline.num_steps, seed=0, title="tuned", role=trainer.result)
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    found.write(cell.folder / "records.partial")
    (cell.folder / "records.partial").rename(cell.folder / "records.jsonl")


def rows(cells: Sequence[Cell], base: Evaluation, recipes: Sequence[str], setting: str) -> list[dict[str, object]]:
    """One row for each recipe, best first."""
    scores = {recipe: [read_evaluation(cell.folder / "records.jsonl") for cell in _of(cells, recipe, setting)] for recipe in recipes}
    found = []
    for recipe in recipes:
        gain = compare_runs([(base, one) for one in scores[recipe]])
        spread = seed_spread([compare_runs([(base, one)]).overall.mean for one in scores[recipe]]) if len(scores[recipe]) > 1 else None
        versus = compare_runs(list(zip(scores[REFERENCE], scores[recipe], strict=True))) if recipe != REFERENCE else None
        logs = [read_log(cell.folder / "run" / "log.jsonl") for cell in _of(cells, recipe, setting)]
        found.append(
            {
                "recipe": recipe,
                "gain": str(gain.overall),
                "gain_mean": gain.overall.mean,
                "seeds": "" if spread is None else f"{spread.low:.3f} to {spread.high:.3f}",
                "versus": "" if versus is None else f"{versus.overall}, p = {versus.p_value:.3f}",
                "size": _mean([line["advantage"]["size"] for log in logs for line in log]),
                "distance": _mean([log[-1]["metrics"]["distance/reference"] for log in logs]),
                "flat": _mean([line["advantage"].get("flat_groups", float("nan")) for log in logs for line in log]),
            }
        )
    return sorted(found, key=lambda row: -float(str(row["gain_mean"])))


def _of(cells: Sequence[Cell], recipe: str, setting: str) -> list[Cell]:
    return [cell for cell in cells if (cell.recipe, cell.setting) == (recipe, setting)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def failing(base: Evaluation, setting: str) -> float:
    """The share of groups that get nothing from the strict reward, each tag weighted as in training."""
    weights = SETTINGS[setting].tag_weights or ALL_TAGS
    groups: dict[tuple[str, int], list[bool]] = {}
    for record in base.records:
        groups.setdefault((record.tag, record.id), []).append(record.strict)
    share = {tag: _mean([not any(passed) for (name, _), passed in groups.items() if name == tag]) for tag in weights}
    return sum(weight * share[tag] for tag, weight in weights.items()) / sum(weights.values())


def report(options: argparse.Namespace, cells: Sequence[Cell], base: Evaluation, base_on_training: Evaluation) -> list[Table]:
    """The tables, one for each setting."""
    tables = []
    columns = ("recipe", "gain over the base", "seeds", f"minus {REFERENCE}", "mean |advantage|", "distance to the base")
    for setting in options.settings:
        found = rows(cells, base, options.recipes, setting)
        # What a recipe compares may be flat where its rewards are not; grpo compares the rewards themselves.
        flat = next(float(str(row["flat"])) for row in found if row["recipe"] == REFERENCE)
        rare = SETTINGS[setting].rarely_passed
        before = "" if rare else f"With the base, all samples fail in {failing(base_on_training, setting):.0%} of the groups; "
        num = len((options.output / RARE).read_text().splitlines()) if rare else 0
        chosen = f"{num} prompts, chosen among {RARE_FROM} by {RARE_IMAGES} images each; " if rare else ""
        groups = f"{options.images // SETTINGS[setting].group_size} prompts x {SETTINGS[setting].group_size} images a step; "
        (options.output / f"rows_{setting}.json").write_text(json.dumps(found, indent=2) + "\n")
        tables.append(
            Table(
                title=SETTINGS[setting].name,
                columns=columns,
                rows=[
                    [str(row[key]) for key in ("recipe", "gain", "seeds", "versus")] + [f"{row['size']:.3f}", f"{row['distance']:.4f}"]
                    for row in found
                ],
                caption=f"{groups}{before}{chosen}in {REFERENCE}'s training, {flat:.0%} of the groups are flat.",
            )
        )
    return tables


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/compare_estimators"))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--images", type=int, default=64, help="images a step, in groups of the setting's size")
    parser.add_argument("--num_prompts", type=int, default=120)
    parser.add_argument("--images_per_prompt", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    options = parser.parse_args()
    if REFERENCE not in options.recipes:
        parser.error(f"--recipes: needs {REFERENCE}, which the others are compared with")
    if any(options.images % SETTINGS[name].group_size for name in options.settings):
        parser.error(f"--images: got {options.images}, needed a multiple of the groups' size (8; 4 in the setting few)")

    # Seeds outermost: a study that is stopped early has all recipes on some seeds.
    cells = [
        Cell(
            recipe=recipe,
            setting=setting,
            seed=seed,
            folder=options.output / setting / recipe.split()[0] / f"seed_{seed}",
        )
        for seed in options.seeds
        for setting in options.settings
        for recipe in options.recipes
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    if any(SETTINGS[name].rarely_passed for name in options.settings):
        write_rare_prompts(options)
    todo = [cell for cell in cells if not (cell.folder / "records.jsonl").is_file()]
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(run, cell, options): cell for cell in todo}
        for done in tqdm(as_completed(running), total=len(cells), initial=len(cells) - len(todo), desc="runs"):
            cell = running[done]
            try:
                done.result()
            except Exception as error:
                raise RuntimeError(
                    f"{cell.recipe}, {cell.setting}, seed {cell.seed}: {error} (see {cell.folder / 'output.txt'})"
                ) from error

    first = cells[0].config(options)
    pipeline = first.pipeline.build(seed=0)
    base = score_model(pipeline, suite(options), num_steps=pipeline.num_steps, seed=0, title="base", role="reference")
    base.write(options.output / "records_base.jsonl")
    training = ShapesSuite(split="train", num_prompts=options.num_prompts, images_per_prompt=Setting.group_size)
    before = score_model(pipeline, training, num_steps=pipeline.num_steps, seed=0, title="base on training prompts", role="reference")
    tables = report(options, cells, base, before)
    head = (
        f"{options.steps * options.images} images a run ({options.steps} steps of {options.images}), seeds {options.seeds}; strict score on "
        f"{options.num_prompts} held-out prompts x {options.images_per_prompt}; base {base.scores().overall}"
    )
    print(f"\n{head}")
    for table in tables:
        print(f"\n{table.title}. {table.caption}\n\n| {' | '.join(table.columns)} |\n|{'---|' * len(table.columns)}")
        print("\n".join(f"| {' | '.join(row)} |" for row in table.rows))
    notes = [
        "Intervals: 95 %, over prompts, all seeds pooled. They do not cover new training seeds; the range over seeds stands beside them.",
        f"With {len(options.recipes) - 1} comparisons in each table, one in twenty has p < 0.05 by chance.",
    ]
    written = write_report(
        options.output / "report.html",
        Report(
            title="Estimators under AWM",
            subtitle=head,
            tables=tables,
            notes=notes,
            **how_made("python", sys.argv[0]),
        ),
    )
    print(f"\nreport {written}")


if __name__ == "__main__":
    main()
