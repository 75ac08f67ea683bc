"""Commands around models, rewards and the installation: doctor, merge, serve-reward, geneval, list, env."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flowalign.commands import Add, add_pipeline_fields, positive

KINDS = ("pipelines", "rewards", "algorithms", "estimators")


def add_merge(add: Add) -> None:
    """Add `flowalign merge`."""
    merge = add(
        "merge", "add a LoRA to its base and write the whole pipeline", "flowalign merge shapes --lora runs/demo/run --output merged"
    )
    merge.add_argument("model", metavar="MODEL", help="folder, hub id, or 'shapes'")
    merge.add_argument("--lora", type=Path, required=True, help="run folder or LoRA to add")
    merge.add_argument("--output", type=Path, required=True, help="folder for the pipeline")
    add_pipeline_fields(merge)
    merge.set_defaults(run=_merge)


def _merge(options: argparse.Namespace) -> None:
    from flowalign.generate import merge

    merge(options.model, lora=options.lora, output=options.output, fields=options.fields)


def add_doctor(add: Add) -> None:
    """Add `flowalign doctor`."""
    doctor = add("doctor", "check that a model works here, and what it costs; exits with 1 if a check fails", "flowalign doctor shapes")
    doctor.add_argument(
        "model", metavar="MODEL", help="folder, hub id, 'shapes', or a run's configuration (a file or the name of a shipped one)"
    )
    doctor.add_argument("--num-steps", type=positive, default=4, help="denoising steps of every rollout")
    doctor.add_argument("--num-images", type=positive, default=2, help="images of the rollout that is timed")
    add_pipeline_fields(doctor)
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> None:
    from flowalign.doctor import examine

    if not examine(options.model, num_steps=options.num_steps, num_images=options.num_images, fields=options.fields):
        sys.exit(1)


def add_serve_reward(add: Add) -> None:
    """Add `flowalign serve-reward`."""
    serve = add("serve-reward", "serve rewards to runs on other machines", "flowalign serve-reward clip_score jpeg_size --port 8100")
    serve.add_argument("rewards", nargs="+", metavar="TYPE", help="a reward, as 'clip_score' or '{type: clip_score, model: FOLDER}'")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; any but this machine's own needs a token")
    serve.add_argument("--port", type=int, default=8100, help="port; 0 for any free one, which is printed")
    serve.add_argument("--token-variable", default="FLOWALIGN_REWARD_TOKEN", metavar="NAME", help="environment variable with the token")
    serve.add_argument("--max-batch", type=positive, default=32, help="images scored together")
    serve.add_argument("--max-wait-ms", type=float, default=5.0, help="how long a request waits for others")
    serve.add_argument("--max-queue", type=positive, default=1024, help="images that may wait; beyond, clients are asked to come back")
    serve.add_argument("--max-queue-mb", type=positive, default=1024, metavar="MIB", help="MiB of images that may wait, likewise")
    serve.set_defaults(run=_serve_reward)


def _serve_reward(options: argparse.Namespace) -> None:
    from flowalign.serve import ServeConfig, serve, token_of

    sizes = {"max_batch": options.max_batch, "max_wait_ms": options.max_wait_ms, "max_queue": options.max_queue}
    sizes["max_queue_bytes"] = options.max_queue_mb * 2**20
    serve(options.rewards, ServeConfig(host=options.host, port=options.port, token=token_of(options.token_variable), **sizes))


def add_geneval(add: Add) -> None:
    """Add `flowalign geneval prompts` and `flowalign geneval convert`."""
    geneval = add(
        "geneval", "make GenEval-style prompts, or convert GenEval's detector", "flowalign geneval prompts --split unseen --num 500"
    )
    works = geneval.add_subparsers(dest="action", required=True, metavar="ACTION")
    made = works.add_parser("prompts", help="write prompts as a .jsonl file", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--split", default="official", help="official (553), train or unseen (objects apart), or all")
    made.add_argument("--num", type=positive, default=1000, help="number of prompts; of 'official' always all")
    made.add_argument("--seed", type=int, default=0, help="seed of the prompts")
    made.add_argument("--output", type=Path, default=Path("geneval.jsonl"), help="file to write, of JSON lines: its name ends in .jsonl")
    made.set_defaults(run=_geneval_prompts)
    turned = works.add_parser("convert", help="turn the original mmdet checkpoint into a folder for --detector")
    turned.add_argument("checkpoint", type=Path, metavar="FILE", help="mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_*.pth")
    turned.add_argument("--output", type=Path, required=True, help="folder to write")
    turned.set_defaults(run=_geneval_convert)


def _geneval_prompts(options: argparse.Namespace) -> None:
    from flowalign.suite_options import write_geneval_prompts

    write_geneval_prompts(options.output, options.split, num=options.num, seed=options.seed)


def _geneval_convert(options: argparse.Namespace) -> None:
    from flowalign.rewards.geneval_convert import convert_file

    convert_file(options.checkpoint, options.output)


def add_list(add: Add) -> None:
    """Add `flowalign list`."""
    listing = add("list", "list what can stand behind 'type' in a configuration", "flowalign list estimators")
    listing.add_argument("kind", nargs="?", choices=KINDS, default=None, help="what to list; default: everything")
    listing.set_defaults(run=_list)


def _list(options: argparse.Namespace) -> None:
    from flowalign.plugins import available

    for kind in [options.kind] if options.kind else KINDS:
        rows = available(kind)
        width = max(map(len, rows), default=0)
        print(f"{kind}:")
        print("\n".join(f"  {name.ljust(width)}  {text}" for name, text in rows.items()))


def add_env(add: Add) -> None:
    """Add `flowalign env`."""
    add("env", "print versions and devices for a bug report", "flowalign env").set_defaults(run=_env)


def _env(options: argparse.Namespace) -> None:
    from flowalign.env import table

    print(table())
