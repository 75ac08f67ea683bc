"""The same run on one process and on two."""

import os
import subprocess
import sys

from flowalign.run_config import load_config


def launch(processes, module, *arguments, fails=False, **variables):
    """Run a module in several processes on the CPU and return what they printed; with ``fails`` it must not succeed.

    By torch's launcher: `accelerate launch --cpu --num_processes 2` starts one process and says nothing.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", module, *arguments]
    own = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    # Whoever waits for a process that has left waits for half an hour.
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **own, **variables}, check=False, timeout=900)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr if fails else done.stdout


def on_one_and_two_processes(write_config, **changes):
    """Train twice and return both run folders."""
    folders = []
    for name, processes in (("one", 1), ("two", 2)):
        path = write_config(name, **changes)
        launch(processes, "flowalign", "train", str(path))
        folders.append(load_config(str(path)).output)
    return folders
