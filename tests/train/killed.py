"""Train, and end this process at an exact place: ``-m tests.train.killed PLACE N CONFIG``.

The places of a kill without warning: "step" (after the first update of step N, the first of which is 0), and of the checkpoint of N finished
steps "tensors" (they are written, and nothing else) and "rename" (all of it is written, under its temporary name). At "interrupt" the first
update of step N is followed by what Ctrl-C sends.
"""

import os
import signal
import sys

from flowalign import cli
from flowalign.train import checkpoint
from flowalign.train.updates import Updater

place, number, config = sys.argv[1], int(sys.argv[2]), sys.argv[3]
update, write, rename = Updater.update, checkpoint.save_file, os.replace


def end(kind):
    os.kill(os.getpid(), signal.SIGINT if kind == "interrupt" else signal.SIGKILL)


def updated(self, experience, velocity, at, **options):
    told = update(self, experience, velocity, at, **options)
    if place in ("step", "interrupt") and (at.step, at.index) == (number, 0):
        end(place)
    return told


def wrote(tensors, path):
    write(tensors, path)
    if place == "tensors" and path.parent.name == f"step_{number:06d}.partial":
        end(place)


def renamed(source, target):
    if place == "rename" and os.path.basename(target) == f"step_{number:06d}":
        end(place)
    rename(source, target)


Updater.update, checkpoint.save_file, os.replace = updated, wrote, renamed
cli.main(["train", config])
