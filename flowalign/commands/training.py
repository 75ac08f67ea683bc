"""Commands that train: demo, train, benchmark, lcsc, shapes pretrain."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flowalign.commands import Add, positive
from flowalign.config import ConfigError


def add_demo(add: Add) -> None:
    """Add `flowalign demo`."""
    demo = add(
        "demo",
        "align the shipped pipeline, or distil it, and report what came of it; no downloads, minutes on a laptop CPU",
        "flowalign demo --output runs/demo",
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=None,
        help="folder for report, weights and summary.json; runs/demo or runs/demo_distill where not given",
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of the training run")
    demo.add_argument("--threads", type=positive, default=None, metavar="N", help="CPU threads; all cores, at most 8, where not given")
    demo.add_argument("--distill", action="store_true", help="instead of aligning it, distil the pipeline into one step")
    demo.add_argument(
        "--model", default=None, help="with --distill: folder of another pipeline of the shapes world, such as an aligned and merged one"
    )
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    from flowalign import demo, one_step

    output = options.output or Path("runs/demo_distill" if options.distill else "runs/demo")
    if options.distill:
        one_step.demo(output, model=options.model or "shapes", seed=options.seed, threads=options.threads)
    elif options.model is not None:
        raise ConfigError(
            f"--model {options.model}: only --distill takes it; the demo aligns the shipped pipeline. Add --distill, or use `flowalign train`"
        )
    else:
        demo.demo(output, seed=options.seed, threads=options.threads)


def add_train(add: Add) -> None:
    """Add `flowalign train`."""
    train = add(
        "train", "train from a configuration; the same command resumes", "flowalign train shapes_awm --steps 3 --train.learning_rate 1e-4"
    )
    train.add_argument("config", metavar="CONFIG", help="YAML file, or the name of a shipped one (see flowalign/configs)")
    train.add_argument(
        "--from",
        dest="source",
        type=Path,
        default=None,
        metavar="RUN",
        help="go on from another run's last checkpoint, which stays as it is, with other rates, rewards or prompts",
    )
    train.add_argument_group("--FIELD VALUE", "any field of the configuration, dotted: --train.groups 4")
    train.usage = "flowalign train CONFIG [--from RUN] [--field value ...]"
    train.set_defaults(run=_train, takes_fields=True)


def _train(options: argparse.Namespace) -> None:
    from flowalign.run import train

    train(options.config, options.fields, source=options.source)


def add_benchmark(add: Add) -> None:
    """Add `flowalign benchmark`."""
    compare = add(
        "benchmark",
        "compare methods at equal compute over several seeds; the same command goes on; exit code 1 where runs are missing",
        "flowalign benchmark benchmark_shapes --jobs 2",
    )
    compare.add_argument("config", metavar="CONFIG", help="YAML file, or the name of a shipped one")
    compare.add_argument("--jobs", type=positive, default=1, help="runs at a time")
    compare.add_argument("--threads", type=positive, default=None, metavar="N", help="CPU threads of each; equal shares where not given")
    compare.usage = "flowalign benchmark CONFIG [--jobs JOBS] [--threads N] [--field value ...]"
    compare.set_defaults(run=_benchmark, takes_fields=True)


def _benchmark(options: argparse.Namespace) -> None:
    from flowalign.benchmark.study import benchmark, missing

    if missing(benchmark(options.config, options.fields, jobs=options.jobs, threads=options.threads)):
        sys.exit(1)  # the report has told which


def add_shapes(add: Add) -> None:
    """Add `flowalign shapes pretrain`."""
    world = add("shapes", "commands of the embedded world", "flowalign shapes pretrain --output runs/pretrain")
    actions = world.add_subparsers(dest="action", required=True, metavar="ACTION")
    pretrain = actions.add_parser(
        "pretrain", help="pretrain the shapes pipeline; the same command resumes", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    pretrain.add_argument("--output", type=Path, default=Path("runs/pretrain"), help="folder for the diffusers pipeline")
    pretrain.add_argument("--seed", type=int, default=0, help="seed of weights, data and noise")
    pretrain.add_argument("--steps", type=positive, default=None, help="steps of the denoiser; default: as shipped")
    pretrain.add_argument("--threads", type=positive, default=2, help="CPU threads")
    pretrain.set_defaults(run=_pretrain)


def _pretrain(options: argparse.Namespace) -> None:
    from flowalign.shapes.pretrain import PretrainConfig, pretrain

    steps = {} if options.steps is None else {"steps": options.steps}
    print(f"written: {pretrain(options.output, PretrainConfig(seed=options.seed, **steps), threads=options.threads)}")


def add_lcsc(add: Add) -> None:
    """Add `flowalign lcsc`."""
    lcsc = add(
        "lcsc",
        "combine a run's checkpoints: search for better weights than the last ones, by the run's own rewards",
        "flowalign lcsc runs/mine --budget 60",
    )
    lcsc.add_argument("folder", type=Path, metavar="RUN", help="run folder; train with --train.keep_checkpoints 10 or so")
    lcsc.add_argument("--output", type=Path, default=None, help="folder for weights and summary.json; RUN/lcsc where not given")
    lcsc.add_argument("--budget", type=positive, default=60, help="combinations that are scored")
    lcsc.add_argument("--num-prompts", type=positive, default=64, help="prompts of the search, and as many others for the check")
    lcsc.add_argument("--images-per-prompt", type=positive, default=1, help="images of each prompt")
    lcsc.add_argument("--seed", type=int, default=0, help="seed of search, noise and choice of prompts")
    lcsc.add_argument(
        "--reward",
        action="append",
        default=None,
        metavar="TYPE",
        help="what combinations are chosen by, as 'clip_score' or '{type: clip_score, model: FOLDER}'; the run's own rewards where not given",
    )
    lcsc.set_defaults(run=_lcsc)


def _lcsc(options: argparse.Namespace) -> None:
    from flowalign.lcsc import lcsc

    lcsc(
        options.folder, **{name: vars(options)[name] for name in ("output", "budget", "num_prompts", "images_per_prompt", "seed", "reward")}
    )
