"""Train several configurations one after the other in the same processes: ``-m tests.train.several CONFIG ...``.

Prints a line for each: how many numbers this process holds of what is trained, and how many there are.
"""

import sys

from accelerate import PartialState
from torch.distributed.tensor import DTensor

from flowalign.run import run_training
from flowalign.run_config import load_config

PartialState.destroy_process_group = lambda self, group=None: None  # a run ends its group of processes, which the next one here needs

for path in sys.argv[1:]:
    parameters = run_training(load_config(path)).cast.parameters
    held = sum((value.to_local() if isinstance(value, DTensor) else value).numel() for value in parameters)
    print(f"HELD {held} OF {sum(value.numel() for value in parameters)} BY {path}", flush=True)
