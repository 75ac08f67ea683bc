"""The command line. Thin: each command parses, then calls what does the work, which is imported only then."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from flowalign.commands import measuring, take_pipeline_fields, tools, training

COMMANDS = (
    training.add_demo,
    training.add_train,
    measuring.add_evaluate,
    training.add_benchmark,
    training.add_lcsc,
    measuring.add_sample,
    measuring.add_report,
    training.add_shapes,
    tools.add_doctor,
    tools.add_merge,
    tools.add_geneval,
    tools.add_serve_reward,
    tools.add_list,
    tools.add_env,
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowalign",
        description="Align diffusion and flow image models against rewards, and measure whether it helped.",
        epilog="Start with: flowalign demo",
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    parser.set_defaults(takes_fields=False)
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

    for add_command in COMMANDS:
        add_command(add)
    return parser


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read a command line; fields of a configuration are left as they stand, in ``fields``."""
    parser = _parser()
    words, fields = take_pipeline_fields(words)
    options, unknown = parser.parse_known_args(words)
    if unknown and not options.takes_fields:  # otherwise they are fields of a configuration
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.fields = [*fields, *unknown]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; errors that a user can mend print one message and exit with 2, Ctrl-C exits with 130."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    sys.path.append(os.getcwd())  # so that `type: my_package.my_reward` finds a module of the folder one works in
    try:
        options.run(options)
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if options.debug or os.environ.get("FLOWALIGN_DEBUG") == "1":
            raise
        print(f"flowalign: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        import torch

        from flowalign.pipelines.loaded_back import NotAsTrained
        from flowalign.train.memory import advise

        is_told = isinstance(error, torch.OutOfMemoryError | NotAsTrained)
        if options.debug or os.environ.get("FLOWALIGN_DEBUG") == "1" or not is_told:
            raise
        print(f"flowalign: {error if isinstance(error, NotAsTrained) else advise(error)}", file=sys.stderr)
        sys.exit(2)
