"""Train, and end this process at an exact place: ``-m tests.train.killed CONFIG PLACE STEP UPDATE``.

The places of a kill without warning: a player's name, before it moves in that update of that step (both count from 0); and of the checkpoint
of so many finished steps "tensors" (they are written, and nothing else) and "rename" (all of it is written, under its temporary name). At
"interrupt" the first player gets there what Ctrl-C sends, and goes on.
"""

import os
import signal
import sys

from flowalign import cli
from flowalign.train import checkpoint
from flowalign.train.updates import Updater

config, place, step, index = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
honest, write, rename = Updater._move, checkpoint.save_file, os.replace


def end():
    os.kill(os.getpid(), signal.SIGINT if place == "interrupt" else signal.SIGKILL)


def move(self, name, means, update):
    if place in ("interrupt", name) and (update.step, update.index) == (step, index):
        end()
    return honest(self, name, means, update)


def wrote(tensors, path):
    write(tensors, path)
    if place == "tensors" and path.parent.name == f"step_{step:06d}.partial":
        end()


def renamed(source, target):
    if place == "rename" and os.path.basename(target) == f"step_{step:06d}":
        end()
    rename(source, target)


Updater._move, checkpoint.save_file, os.replace = move, wrote, renamed
cli.main(["train", config])
