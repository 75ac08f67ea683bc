"""The same run under accelerate on one process and on two."""

import os
import subprocess
import sys

from flowalign.run_config import load_config


def on_one_and_two_processes(write_config, **changes):
    """Train twice and return both run folders."""
    folders = []
    for name, processes in (("one", 1), ("two", 2)):
        path = write_config(name, **changes)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "flowalign", "train", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        folders.append(load_config(str(path)).output)
    return folders
