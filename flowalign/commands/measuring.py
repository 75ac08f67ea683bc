"""Commands that score and show: evaluate, sample, report."""

from __future__ import annotations

import argparse
from pathlib import Path

from flowalign.commands import NUM_STEPS_HELP, Add, add_pipeline_fields, positive


def add_evaluate(add: Add) -> None:
    """Add `flowalign evaluate`."""
    evaluate = add(
        "evaluate",
        "score a model on a suite with 95 %% intervals, alone or against another",
        "flowalign evaluate shapes --lora runs/demo/run",
    )
    evaluate.add_argument("model", metavar="MODEL", help="folder, hub id, or 'shapes' for the shipped pipeline")
    evaluate.add_argument("--suite", default="shapes", help="benchmark suite: shapes, geneval or prompts")
    evaluate.add_argument("--prompts", type=Path, default=None, metavar="FILE", help="prompts: a .txt or .jsonl file")
    evaluate.add_argument(
        "--reward",
        action="append",
        default=None,
        metavar="TYPE",
        help="prompts, shapes: a reward to measure, as 'clip_score' or '{type: clip_score, model: FOLDER}'",
    )
    evaluate.add_argument("--detector", default=None, metavar="MODEL", help="geneval: folder or hub id of a Mask2Former for COCO instances")
    evaluate.add_argument("--clip", default=None, metavar="MODEL", help="geneval: folder or hub id of the CLIP that names colours")
    evaluate.add_argument("--split", default=None, help="geneval: official, train, unseen or all; shapes: heldout or train")
    evaluate.add_argument("--resolution", type=float, default=0.02, help="difference of scores that a comparison should resolve")
    evaluate.add_argument(
        "--lora",
        type=Path,
        action="append",
        default=None,
        metavar="RUN",
        help="run folder or LoRA to load; compared with the model without it. Several are runs of one recipe from several training seeds",
    )
    evaluate.add_argument(
        "--against",
        action="append",
        default=None,
        metavar="MODEL",
        help="another model, or a run with another LoRA of the same one, to compare with on the same prompts and noise. Several are runs of another "
        "recipe from several training seeds",
    )
    evaluate.add_argument(
        "--reference-images",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="real images to measure fidelity against (KID, Frechet distance, precision, recall); the shapes suite renders its own where not given",
    )
    evaluate.add_argument(
        "--extractor",
        default=None,
        metavar="NAME",
        help="features of fidelity and diversity: random, folder or hub id of an image encoder (DINOv2), or my_module.my_function that returns a network",
    )
    evaluate.add_argument("--output", type=Path, default=None, help="folder for records, summary.json and report.html")
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the noise")
    evaluate.add_argument(
        "--num-prompts",
        type=positive,
        default=None,
        help="number of prompts, the tags in equal shares as far as they go; all of them where not given (shapes: 300)",
    )
    evaluate.add_argument("--images-per-prompt", type=positive, default=4, help="images of each prompt")
    evaluate.add_argument("--num-steps", type=positive, default=None, help=NUM_STEPS_HELP)
    evaluate.add_argument(
        "--batch-size", type=positive, default=128, help="images of one call of the model; lower it where memory runs out"
    )
    add_pipeline_fields(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from flowalign.evaluation import evaluate

    evaluate(
        options.model,
        suite_name=options.suite,
        lora=options.lora,
        against=options.against,
        output=options.output,
        seed=options.seed,
        num_prompts=options.num_prompts,
        images_per_prompt=options.images_per_prompt,
        num_steps=options.num_steps,
        resolution=options.resolution,
        reference_images=options.reference_images,
        extractor=options.extractor,
        batch_size=options.batch_size,
        fields=options.fields,
        options={name: vars(options)[name] for name in ("prompts", "reward", "detector", "clip", "split")},
    )


def add_sample(add: Add) -> None:
    """Add `flowalign sample`."""
    sample = add("sample", "write a labelled grid of samples", "flowalign sample shapes 'a photo of a red ring' --lora runs/demo/run")
    sample.add_argument("model", metavar="MODEL", help="folder, hub id, or 'shapes'")
    sample.add_argument("prompts", nargs="+", metavar="PROMPT", help="one row of the grid each")
    sample.add_argument("--lora", type=Path, default=None, help="run folder or LoRA to load")
    sample.add_argument("--output", type=Path, default=Path("samples.png"), help="PNG file")
    sample.add_argument("--seed", type=int, default=0, help="seed of the noise")
    sample.add_argument("--num-images", type=positive, default=4, help="images of each prompt")
    sample.add_argument("--num-steps", type=positive, default=None, help=NUM_STEPS_HELP)
    sample.add_argument("--batch-size", type=positive, default=None, help="images of one call of the model; all where not given")
    add_pipeline_fields(sample)
    sample.set_defaults(run=_sample)


def _sample(options: argparse.Namespace) -> None:
    from flowalign.generate import sample

    sample(
        options.model,
        options.prompts,
        lora=options.lora,
        output=options.output,
        seed=options.seed,
        num_images=options.num_images,
        num_steps=options.num_steps,
        batch_size=options.batch_size,
        fields=options.fields,
    )


def add_report(add: Add) -> None:
    """Add `flowalign report`."""
    report = add(
        "report", "write the report of one run, or of several side by side", "flowalign report runs/mine runs/other --output both.html"
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training run")
    report.add_argument("--output", type=Path, default=None, help="HTML file; report.html in the first run's folder where not given")
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    from flowalign.run_report import report_runs

    print(f"written: {report_runs(options.runs, options.output)}")
