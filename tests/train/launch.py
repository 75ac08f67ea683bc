"""The same run on one process and on two."""

import os
import socket
import subprocess
import sys

import torch

from flowalign import run
from flowalign.run_config import load_config

OWN = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}


def launch(processes, module, *arguments, fails=False, **variables):
    """Run a module in several processes on the CPU and return what they printed; with ``fails`` it must not succeed.

    By torch's launcher: `accelerate launch --cpu --num_processes 2` starts one process and says nothing.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", module, *arguments]
    # Whoever waits for a process that has left waits for half an hour.
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **OWN, **variables}, check=False, timeout=900)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr if fails else done.stdout


def together(module, *arguments):
    """Run a module in two processes with what torch's launcher tells them, without an interpreter for the launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-m", module, *arguments]
    running = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **OWN, **told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=900)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    return "".join(said)


def end_at(path, place, step, update=0):
    """Train in a process of its own, which ends at an exact place; the places are those of ``tests.train.killed``."""
    command = [sys.executable, "-m", "tests.train.killed", str(path), place, str(step), str(update)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as here, where the run goes on: other numbers round otherwise
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **threads}, timeout=900)


def on_one_and_two_processes(write_config, **changes):
    """Train twice, once here, and return both run folders."""
    one, two = (write_config(name, **changes) for name in ("one", "two"))
    run.train(str(one))
    together("flowalign", "train", str(two))
    return [load_config(str(path)).output for path in (one, two)]
