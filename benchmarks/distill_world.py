"""One step on the shapes world: divergences, what matching adds to the warm-up, and the teacher at several numbers of steps.

Every student is `shapes_f_distill` with another divergence and seed. Students of a seed share their warm-up, which is a run of its own and is measured too: what they differ by is what matching made of it. The
control "more pairs" spends as many evaluations as the others on the teacher's samples and the warm-up alone, in the same proportion as the warm-up does. The teacher is guided as it teaches (`algorithm.guidance_scale`). All are scored on held-out prompts: strict and graded score, and measures that know nothing of the
verifier, in features of a fixed random network: kernel distance to real images, coverage of the teacher's images, and diversity within a prompt over the teacher's. Finished runs
are kept, so that the command goes on where it was stopped.

    python benchmarks/distill_world.py --output runs/distill_world --jobs 2
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from flowalign import config as configuring
from flowalign import images as pictures
from flowalign.env import how_made
from flowalign.evaluate.distances import manifold
from flowalign.evaluate.fidelity import RandomFeatures, features_of, kernel_distance, relative_diversity, within_prompt_distance
from flowalign.evaluate.records import Evaluation
from flowalign.evaluate.report import Report, Table, write_report
from flowalign.evaluate.statistics import seed_interval
from flowalign.evaluate.suites import ShapesSuite
from flowalign.files import write_atomically
from flowalign.generate import score_model
from flowalign.going_on import take_over
from flowalign.pipelines.base import FlowPipeline
from flowalign.run import run_training, teacher_of
from flowalign.run_config import RunConfig, claim_folder, load_config
from flowalign.train.journal import read_log

DIVERGENCES = ("reverse_kl", "jensen_shannon", "forward_kl")
WARM, PAIRS = "warm-up", "more pairs"
TEACHER_STEPS = (1, 2, 4, 10, 20)
WITHOUT = f"without guidance, {max(TEACHER_STEPS)} steps"
MEASURES = {
    "strict": "strict",
    "graded": "graded",
    "kernel": "kernel distance to real images, x 1000",
    "coverage": "coverage of the teacher",
    "recall": "recall",
    "diversity": "diversity within a prompt",
}


def suite() -> ShapesSuite:
    """Return what everything is scored on."""
    return ShapesSuite(split="heldout", num_prompts=150, images_per_prompt=4)


def measures(found: Evaluation, real: Tensor, teacher: Tensor | None) -> dict[str, float]:
    """Measure a model's images; the teacher's are those of its most steps, under other noise."""
    assert found.images is not None
    network, ids = RandomFeatures(), [record.id for record in found.records]
    seen, known = features_of(found.images, network=network), features_of(real, network=network)
    values = {name: found.scores(name).overall.mean for name in ("strict", "graded")}  # type: ignore[arg-type]
    values["kernel"] = 1000 * kernel_distance(seen, known, ids).mean
    if teacher is not None:
        theirs = features_of(teacher, network=network)
        nearest = manifold(seen, theirs)
        values |= {"coverage": nearest.coverage, "recall": nearest.recall}
        distances = [within_prompt_distance(points, ids) for points in (theirs, seen)]
        values["diversity"] = relative_diversity(distances[0], distances[1]).mean
    return values


def scores_of_teacher(output: Path, threads: int, extra: Sequence[str]) -> dict[str, Any]:
    """Score the teacher once, guided as it teaches, at several numbers of steps, and keep its images of the most; another model's scores are refused."""
    path, kept = output / "teacher.json", output / "teacher_images.safetensors"
    config = load_config("shapes_f_distill", list(extra))
    settings = configuring.encode(config.pipeline) | {"guidance_scale": config.algorithm.guidance_scale}
    if not path.is_file():
        from safetensors.torch import save_file

        torch.set_num_threads(threads)
        plain: FlowPipeline = config.pipeline.build()
        guided = teacher_of(config, plain) or plain
        real = suite().reference(seed=1)
        # Noise of its own: coverage by samples of the same noise would be too kind to a student that learnt pairs.
        reference = score_model(guided, suite(), num_steps=max(TEACHER_STEPS), seed=1000, title="teacher, other noise")
        assert reference.images is not None
        wanted = [(f"teacher, {steps} steps", guided, steps) for steps in TEACHER_STEPS]
        if guided is not plain:
            wanted.append((WITHOUT, plain, max(TEACHER_STEPS)))
        table = {
            title: {"steps": steps, **measures(score_model(model, suite(), num_steps=steps, seed=0, title=title), real, reference.images)}
            for title, model, steps in wanted
        }
        output.mkdir(parents=True, exist_ok=True)
        save_file({"images": reference.images.contiguous()}, kept)
        write_atomically(path, json.dumps({"pipeline": settings, "scores": table}, indent=2) + "\n")
    found: dict[str, Any] = json.loads(path.read_text())
    changed = configuring.differences(found["pipeline"], settings)
    if changed:
        raise SystemExit(f"{output}: holds a study of another teacher ({'; '.join(changed)}); choose another --output")
    scores: dict[str, Any] = found["scores"]
    return scores


def configuration(output: Path, name: str, seed: int, steps: int | None, extra: Sequence[str]) -> RunConfig:
    """Return the run of a student."""
    algorithm = load_config("shapes_f_distill", list(extra)).algorithm
    steps = algorithm.warmup_steps if name == WARM else steps
    flags = [*extra, "--seed", str(seed), "--output", str(output / f"{name.replace(' ', '_')}_{seed}")]
    if name in DIVERGENCES:
        flags += ["--algorithm.weights.divergence", name]
    elif name == PAIRS and steps is not None:
        pairs = round(algorithm.num_pairs * steps / algorithm.warmup_steps)
        flags += ["--algorithm.warmup_steps", str(steps), "--algorithm.num_pairs", str(pairs)]
    return load_config("shapes_f_distill", [*flags, *(["--steps", str(steps)] if steps is not None else [])])


def student(output: Path, name: str, seed: int, steps: int | None, extra: Sequence[str], threads: int) -> None:
    """Train and measure one student, unless that was done."""
    from safetensors.torch import load_file

    torch.set_num_threads(threads)
    config = configuration(output, name, seed, steps, extra)
    path = config.output / "result.json"
    if path.is_file() and _result(output, name, seed)["steps"] >= config.steps:
        claim_folder(config)  # refuses a result of other settings
        return
    if name in DIVERGENCES:
        take_over(configuration(output, WARM, seed, None, extra).output, config)
    pipeline = config.pipeline.build(seed=config.seed)
    trainer = run_training(config, pipeline=pipeline)
    found = score_model(pipeline, suite(), num_steps=1, seed=0, title=f"{name}, seed {seed}", role=trainer.result)
    log = read_log(config.output / "log.jsonl")
    values = measures(found, suite().reference(seed=1), load_file(output / "teacher_images.safetensors")["images"])
    values |= {
        "evaluations": float(sum(cost(line["evaluations"]) for line in log)),
        "seconds": float(sum(line["time_s"]["total"] for line in log)),
        "steps": float(len(log)),
    }
    found.write(config.output / "records.jsonl")
    assert found.images is not None
    pictures.save_png(pictures.grid(found.images[:32], 8, scale=3), config.output / "samples.png")
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def cost(evaluations: dict[str, int]) -> int:
    """Count a row that is differentiated three times, as benchmarks do; the teacher's samples and the shown ones count too."""
    return evaluations["total"] + 2 * evaluations.get("train", 0)


def main() -> None:
    """Run what is missing and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/distill_world"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each job")
    parser.add_argument("--no-control", action="store_true", help="leave out the runs on more pairs, which take as long as all others")
    options, extra = parser.parse_known_args()
    teacher = scores_of_teacher(options.output, options.threads * options.jobs, extra)
    _run(options, [(WARM, seed, None) for seed in options.seeds], extra)
    _run(options, [(name, seed, None) for seed in options.seeds for name in DIVERGENCES], extra)
    runs = [WARM, *DIVERGENCES] if options.no_control else [WARM, PAIRS, *DIVERGENCES]
    if not options.no_control:
        _control(options, extra)
    results = {name: [_result(options.output, name, seed) for seed in options.seeds] for name in runs}
    _report(options, teacher, results)


def _control(options: argparse.Namespace, extra: Sequence[str]) -> None:
    """Give the warm-up alone the evaluations that the others took, on average."""
    taken = [_result(options.output, name, seed)["evaluations"] for name in DIVERGENCES for seed in options.seeds]
    warm = [_result(options.output, WARM, seed)["evaluations"] for seed in options.seeds]
    usual = load_config("shapes_f_distill", extra).algorithm.warmup_steps
    steps = round(usual * sum(taken) / len(taken) / (sum(warm) / len(warm)))
    _run(options, [(PAIRS, seed, steps) for seed in options.seeds], extra)


def _run(options: argparse.Namespace, wanted: Sequence[tuple[str, int, int | None]], extra: Sequence[str]) -> None:
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = [pool.submit(student, options.output, name, seed, steps, extra, options.threads) for name, seed, steps in wanted]
        for run in tqdm(as_completed(runs), total=len(runs), desc="students"):
            run.result()


def _result(output: Path, name: str, seed: int) -> dict[str, float]:
    found: dict[str, float] = json.loads((output / f"{name.replace(' ', '_')}_{seed}" / "result.json").read_text())
    return found


def _report(options: argparse.Namespace, teacher: dict[str, Any], results: dict[str, list[dict[str, float]]]) -> None:
    best = teacher[f"teacher, {max(TEACHER_STEPS)} steps"]["strict"]
    columns = ("model", "steps", "share of the teacher", *MEASURES.values(), "evaluations")
    rows = [
        [name, values["steps"], f"{values['strict'] / best:.0%}", *(f"{values[key]:.3f}" for key in MEASURES), ""]
        for name, values in teacher.items()
    ]
    for name, runs in results.items():
        spans = [str(seed_interval([run[key] for run in runs])) for key in MEASURES]
        share = sum(run["strict"] for run in runs) / len(runs) / best
        evaluations = f"{sum(run['evaluations'] for run in runs) / len(runs):.3g}"
        rows.append([name, "1", f"{share:.0%}", *spans, evaluations])
    rows = [[str(cell) for cell in row] for row in rows]
    differences = []
    for name in DIVERGENCES:
        for other in (WARM, PAIRS, "reverse_kl"):
            if name != other and other in results:
                spans = [
                    str(seed_interval([one[key] - two[key] for one, two in zip(results[name], results[other], strict=True)]))
                    for key in MEASURES
                ]
                differences.append([f"{name} - {other}", *spans])
    tables = [
        Table(title="One step", columns=columns, rows=rows, caption="Intervals: 95 %, Student's t over training seeds."),
        Table(title="Differences, seed by seed", columns=("difference", *MEASURES.values()), rows=differences),
    ]
    text = "\n\n".join(
        "\n".join(
            [
                f"{t.title}. {t.caption}",
                "",
                f"| {' | '.join(t.columns)} |",
                f"|{'---|' * len(t.columns)}",
                *(f"| {' | '.join(r)} |" for r in t.rows),
            ]
        )
        for t in tables
    )
    print(text)
    write_atomically(options.output / "results.md", text + "\n")
    write_atomically(options.output / "results.json", json.dumps({"teacher": teacher, "students": results}, indent=2) + "\n")
    report = Report(
        title="One-step students of the shapes world",
        subtitle=f"{suite().name}, seeds {options.seeds}",
        tables=tables,
        **how_made("python", sys.argv[0]),
    )
    print(f"report {write_report(options.output / 'report.html', report)}")


if __name__ == "__main__":
    main()
