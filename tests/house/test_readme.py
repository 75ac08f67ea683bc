import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flowalign.cli import parse
from flowalign.run_config import load_config

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    re.sub(r"^.*?(?=flowalign )", "", line.split("  #")[0]).strip()
    for kind, block in BLOCKS
    if kind == ""
    for line in block.splitlines()
    if "flowalign " in line
]


def test_the_example_runs_as_it_stands():
    (example,) = [block for kind, block in BLOCKS if kind == "python"]
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "advantage" in example
    assert re.search(r"tensor\(", done.stdout), done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_the_command_line_takes(command):
    program, *arguments = shlex.split(command)
    assert program == "flowalign"
    parsed = parse(arguments)
    if parsed.command == "train" and parsed.config != "my_config.yaml":
        load_config(parsed.config, parsed.fields)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 5
