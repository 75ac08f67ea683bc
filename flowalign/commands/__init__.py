"""The commands of the command line, by theme. Each adds its parser and the function that runs it; what does the work is imported only then."""

import argparse
from collections.abc import Callable, Sequence

Add = Callable[[str, str, str], argparse.ArgumentParser]
"""From a command's name, what it does and an example to its parser."""

PIPELINE_COMMANDS = ("evaluate", "sample", "merge", "doctor")
"""Commands that take settings of the model as ``--pipeline.KEY VALUE``."""

NUM_STEPS_HELP = "denoising steps; as in the run or the model's own configuration where not given"


def positive(text: str) -> int:
    """Read a whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: If it is smaller.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, needed at least 1")
    return value


def add_pipeline_fields(parser: argparse.ArgumentParser) -> None:
    """Say in a command's help that it takes settings of the model; they are taken out before the parser sees them."""
    parser.add_argument_group(
        "--pipeline.KEY VALUE",
        "any setting of the model, as in a configuration's pipeline: --pipeline.dtype bfloat16 --pipeline.height 512 --pipeline.offload true; "
        "further arguments of type auto: --pipeline.arguments.max_sequence_length 256",
    )


def take_pipeline_fields(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part a command line into words for the parser and ``--pipeline.KEY VALUE`` arguments, wherever they stand.

    argparse alone would take the value of an option that it does not know for a prompt.

    Examples:
        >>> take_pipeline_fields(["sample", "shapes", "--pipeline.dtype", "bfloat16", "a ring"])
        (['sample', 'shapes', 'a ring'], ['--pipeline.dtype', 'bfloat16'])
    """
    command = next((word for word in words if not word.startswith("-")), None)
    if command not in PIPELINE_COMMANDS:
        return list(words), []
    rest: list[str] = []
    fields: list[str] = []
    is_value = False
    for word in words:
        is_field = word.startswith("--pipeline.")
        (fields if is_field or is_value else rest).append(word)
        is_value = is_field and "=" not in word
    return rest, fields
