"""Train several configurations one after the other under DeepSpeed, in processes on the CPU: ``-m tests.train.zero CONFIG ...``.

accelerate asks DeepSpeed for the process group of a GPU; here it is told to take gloo. The rest is the way of `accelerate launch` with configs/engines/zero2.yaml.
"""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs

from flowalign import run
from flowalign.run_config import load_config
from flowalign.train import checkpoint
from flowalign.train.updates import Diverged

settings = yaml.safe_load((Path(__file__).parents[2] / "configs" / "engines" / "zero2.yaml").read_text())
os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(settings["deepspeed_config"]["zero_stage"])
os.environ["DS_ACCELERATOR"] = "cpu"
made = run.Accelerator
run.Accelerator = lambda **options: made(**{**options, "kwargs_handlers": [InitProcessGroupKwargs(backend="gloo")]})
PartialState.destroy_process_group = lambda self, group=None: None  # a run ends its group of processes, which the next one here needs

built, build = [], run.build_trainer


def kept(config, accelerator, **options):
    """Keep the trainer; break its loss where the test asks for that."""
    trainer = build(config, accelerator, **options)
    if "BREAK_LOSS" in os.environ:
        loss = trainer.algorithm.loss
        object.__setattr__(trainer.algorithm, "loss", lambda *args: replace(told := loss(*args), value=told.value * math.nan))
    built.append(trainer)
    return trainer


run.build_trainer = kept

for path in sys.argv[1:]:
    try:
        run.run_training(load_config(path))
    except Diverged as error:
        print(f"DIVERGED {error}", flush=True)
        stored = checkpoint.load_newest(built[-1].folder / "checkpoints")[1]["roles"]["current"]
        now = built[-1].pipeline.roles.parameters("current")
        print(f"MOVED {any(not torch.equal(now[name].cpu(), value) for name, value in stored.items())}", flush=True)
        break
    shared = built[-1].cast.zero.engine.optimizer
    held = sum(flat.numel() for flat in shared.single_partition_of_fp32_groups)
    print(f"HELD {held} OF {sum(value.numel() for value in built[-1].cast.parameters)} BY {path}", flush=True)
