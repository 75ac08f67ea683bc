"""The commands of the command line, by theme. Each adds its parser and the function that runs it; what does the work is imported only then."""

import argparse
from collections.abc import Callable

Add = Callable[[str, str, str], argparse.ArgumentParser]
"""From a command's name, what it does and an example to its parser."""

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
