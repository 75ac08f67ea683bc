"""The command line. Thin: each command parses, then calls what does the work, which is imported only then."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

KINDS = ("pipelines", "rewards", "algorithms", "estimators")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, needed at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowalign",
        description="Align diffusion and flow image models against rewards, and measure whether it helped.",
        epilog="Start with: flowalign demo",
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, what: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=what,
            description=what[0].upper() + what[1:].replace("%%", "%") + ".",
            epilog=f"Example: {example}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    demo = add(
        "demo",
        "align the shipped pipeline and report what it gained; no downloads, minutes on a laptop CPU",
        "flowalign demo --output runs/demo",
    )
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for report, weights and summary.json")
    demo.add_argument("--seed", type=int, default=0, help="seed of the training run")
    demo.add_argument("--threads", type=_positive, default=None, metavar="N", help="CPU threads; all cores, at most 8, where not given")

    train = add(
        "train", "train from a configuration; the same command resumes", "flowalign train shapes_awm --steps 3 --train.learning_rate 1e-4"
    )
    train.add_argument("config", metavar="CONFIG", help="YAML file, or the name of a shipped one (see flowalign/configs)")
    train.add_argument(
        "overrides", nargs=argparse.REMAINDER, metavar="--field value", help="any field of the configuration, dotted: --train.groups 4"
    )

    evaluate = add(
        "evaluate",
        "score a model on a suite with 95 %% intervals, alone or against another",
        "flowalign evaluate shapes --lora runs/demo/run",
    )
    evaluate.add_argument("model", metavar="MODEL", help="folder, hub id, or 'shapes' for the shipped pipeline")
    evaluate.add_argument("--suite", default="shapes", help="benchmark suite")
    evaluate.add_argument("--lora", type=Path, default=None, help="run folder or LoRA to load; compared with the model without it")
    evaluate.add_argument("--against", default=None, metavar="MODEL", help="another model to compare with, on the same prompts and noise")
    evaluate.add_argument("--output", type=Path, default=None, help="folder for records and summary.json")
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the noise")
    evaluate.add_argument(
        "--num-prompts", type=_positive, default=300, help="number of prompts, the tags in equal shares as far as they go"
    )
    evaluate.add_argument("--images-per-prompt", type=_positive, default=4, help="images of each prompt")
    evaluate.add_argument(
        "--num-steps", type=_positive, default=None, help="denoising steps; as in the run or the model's own configuration where not given"
    )

    sample = add("sample", "write a labelled grid of samples", "flowalign sample shapes 'a photo of a red ring' --lora runs/demo/run")
    sample.add_argument("model", metavar="MODEL", help="folder, hub id, or 'shapes'")
    sample.add_argument("prompts", nargs="+", metavar="PROMPT", help="one row of the grid each")
    sample.add_argument("--lora", type=Path, default=None, help="run folder or LoRA to load")
    sample.add_argument("--output", type=Path, default=Path("samples.png"), help="PNG file")
    sample.add_argument("--seed", type=int, default=0, help="seed of the noise")
    sample.add_argument("--num-images", type=_positive, default=4, help="images of each prompt")
    sample.add_argument(
        "--num-steps", type=_positive, default=None, help="denoising steps; as in the run or the model's own configuration where not given"
    )

    world = add("shapes", "commands of the embedded world", "flowalign shapes pretrain --output runs/pretrain")
    actions = world.add_subparsers(dest="action", required=True, metavar="ACTION")
    pretrain = actions.add_parser(
        "pretrain", help="pretrain the shapes pipeline; the same command resumes", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    pretrain.add_argument("--output", type=Path, default=Path("runs/pretrain"), help="folder for the diffusers pipeline")
    pretrain.add_argument("--seed", type=int, default=0, help="seed of weights, data and noise")
    pretrain.add_argument("--steps", type=_positive, default=None, help="steps of the denoiser; default: as shipped")
    pretrain.add_argument("--threads", type=_positive, default=2, help="CPU threads")

    merge = add(
        "merge", "add a LoRA to its base and write the whole pipeline", "flowalign merge shapes --lora runs/demo/run --output merged"
    )
    merge.add_argument("model", metavar="MODEL", help="folder, hub id, or 'shapes'")
    merge.add_argument("--lora", type=Path, required=True, help="run folder or LoRA to add")
    merge.add_argument("--output", type=Path, required=True, help="folder for the pipeline")

    doctor = add("doctor", "check that a model works here, and what it costs; exits with 1 if a check fails", "flowalign doctor shapes")
    doctor.add_argument("model", metavar="MODEL", help="folder, hub id, or 'shapes'")
    doctor.add_argument("--num-steps", type=_positive, default=4, help="denoising steps of every rollout")
    doctor.add_argument("--num-images", type=_positive, default=2, help="images of the rollout that is timed")

    listing = add("list", "list what can stand behind 'type' in a configuration", "flowalign list estimators")
    listing.add_argument("kind", nargs="?", choices=KINDS, default=None, help="what to list; default: everything")
    add("env", "print versions and devices for a bug report", "flowalign env")
    return parser


def _dispatch(options: argparse.Namespace) -> None:
    if options.command == "list":
        from flowalign.plugins import available

        for kind in [options.kind] if options.kind else KINDS:
            rows = available(kind)
            width = max(map(len, rows), default=0)
            print(f"{kind}:")
            print("\n".join(f"  {name.ljust(width)}  {text}" for name, text in rows.items()))
        return
    if options.command == "env":
        from flowalign.env import table

        print(table())
        return
    if options.command == "shapes":
        from flowalign.shapes.pretrain import PretrainConfig, pretrain

        steps = {} if options.steps is None else {"steps": options.steps}
        print(f"written: {pretrain(options.output, PretrainConfig(seed=options.seed, **steps), threads=options.threads)}")
        return
    _run(options)


def _run(options: argparse.Namespace) -> None:
    if options.command == "demo":
        from flowalign.demo import demo

        demo(options.output, seed=options.seed, threads=options.threads)
    elif options.command == "train":
        from flowalign.run import train

        train(options.config, options.overrides)
    elif options.command == "evaluate":
        from flowalign.generate import evaluate

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
        )
    elif options.command == "merge":
        from flowalign.generate import merge

        merge(options.model, lora=options.lora, output=options.output)
    elif options.command == "doctor":
        from flowalign.doctor import examine

        if not examine(options.model, num_steps=options.num_steps, num_images=options.num_images):
            sys.exit(1)
    else:
        from flowalign.generate import sample

        sample(
            options.model,
            options.prompts,
            lora=options.lora,
            output=options.output,
            seed=options.seed,
            num_images=options.num_images,
            num_steps=options.num_steps,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; errors that a user can mend print one message and exit with 2, Ctrl-C exits with 130."""
    options = _parser().parse_args(arguments)
    sys.path.append(os.getcwd())  # so that `type: my_package.my_reward` finds a module of the folder one works in
    try:
        _dispatch(options)
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if options.debug or os.environ.get("FLOWALIGN_DEBUG") == "1":
            raise
        print(f"flowalign: {error}", file=sys.stderr)
        sys.exit(2)
