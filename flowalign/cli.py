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
    evaluate.add_argument("--suite", default="shapes", help="benchmark suite: shapes, geneval or prompts")
    evaluate.add_argument("--prompts", type=Path, default=None, metavar="FILE", help="prompts: a .txt or .jsonl file")
    evaluate.add_argument(
        "--reward",
        action="append",
        default=None,
        metavar="TYPE",
        help="prompts: a reward, as 'clip_score' or '{type: clip_score, model: FOLDER}'",
    )
    evaluate.add_argument("--detector", default=None, metavar="MODEL", help="geneval: folder or hub id of a Mask2Former for COCO instances")
    evaluate.add_argument("--clip", default=None, metavar="MODEL", help="geneval: folder or hub id of the CLIP that names colours")
    evaluate.add_argument("--split", default=None, help="geneval: official, train, unseen or all; shapes: heldout or train")
    evaluate.add_argument("--resolution", type=float, default=0.02, help="difference of scores that a comparison should resolve")
    evaluate.add_argument("--lora", type=Path, default=None, help="run folder or LoRA to load; compared with the model without it")
    evaluate.add_argument("--against", default=None, metavar="MODEL", help="another model to compare with, on the same prompts and noise")
    evaluate.add_argument("--output", type=Path, default=None, help="folder for records and summary.json")
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the noise")
    evaluate.add_argument(
        "--num-prompts",
        type=_positive,
        default=None,
        help="number of prompts, the tags in equal shares as far as they go; all of them where not given (shapes: 300)",
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

    geneval = add(
        "geneval", "make GenEval-style prompts, or convert GenEval's detector", "flowalign geneval prompts --split unseen --num 500"
    )
    works = geneval.add_subparsers(dest="action", required=True, metavar="ACTION")
    made = works.add_parser("prompts", help="write prompts as a .jsonl file", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--split", default="official", help="official (553), train or unseen (objects apart), or all")
    made.add_argument("--num", type=_positive, default=1000, help="number of prompts; of 'official' always all")
    made.add_argument("--seed", type=int, default=0, help="seed of the prompts")
    made.add_argument("--output", type=Path, default=Path("geneval.jsonl"), help="file to write")
    turned = works.add_parser("convert", help="turn the original mmdet checkpoint into a folder for --detector")
    turned.add_argument("checkpoint", type=Path, metavar="FILE", help="mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_*.pth")
    turned.add_argument("--output", type=Path, required=True, help="folder to write")

    report = add(
        "report", "write the report of one run, or of several side by side", "flowalign report runs/mine runs/other --output both.html"
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training run")
    report.add_argument("--output", type=Path, default=None, help="HTML file; report.html in the first run's folder where not given")

    serve = add("serve-reward", "serve rewards to runs on other machines", "flowalign serve-reward clip_score jpeg_size --port 8100")
    serve.add_argument("rewards", nargs="+", metavar="TYPE", help="a reward, as 'clip_score' or '{type: clip_score, model: FOLDER}'")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; any but this machine's own needs a token")
    serve.add_argument("--port", type=int, default=8100, help="port")
    serve.add_argument("--token-variable", default="FLOWALIGN_REWARD_TOKEN", metavar="NAME", help="environment variable with the token")
    serve.add_argument("--max-batch", type=_positive, default=32, help="images scored together")
    serve.add_argument("--max-wait-ms", type=float, default=5.0, help="how long a request waits for others")
    serve.add_argument("--max-queue", type=_positive, default=1024, help="images that may wait; beyond, clients are asked to come back")

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
    if options.command == "report":
        from flowalign.run_report import report_runs

        print(f"written: {report_runs(options.runs, options.output)}")
        return
    if options.command == "serve-reward":
        from flowalign.serve import ServeConfig, serve, token_of

        sizes = {"max_batch": options.max_batch, "max_wait_ms": options.max_wait_ms, "max_queue": options.max_queue}
        serve(options.rewards, ServeConfig(host=options.host, port=options.port, token=token_of(options.token_variable), **sizes))
        return
    if options.command == "geneval":
        from flowalign.rewards.geneval_convert import convert_file
        from flowalign.suite_options import write_geneval_prompts

        if options.action == "convert":
            convert_file(options.checkpoint, options.output)
        else:
            write_geneval_prompts(options.output, options.split, num=options.num, seed=options.seed)
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
            resolution=options.resolution,
            options={name: getattr(options, name) for name in ("prompts", "reward", "detector", "clip", "split")},
        )
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
