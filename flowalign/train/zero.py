"""DeepSpeed's ZeRO behind the loop's own order: all backward passes, a look at the gradient, and then the step."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero:
    """A network whose gradients and moments processes share (ZeRO stage 1 or 2); each has all weights.

    accelerate's own way would step inside the backward pass, before loss and gradient were looked at; the engine itself is asked here.

    Attributes:
        engine: DeepSpeed's engine; what is called where gradients flow.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        network: nn.Module,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        clip: float,
    ) -> None:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        stage = settings["zero_optimization"]["stage"]
        if stage not in (1, 2):
            raise ValueError(
                f"accelerate: DeepSpeed with zero_stage {stage} is not supported, needed 1 or 2; --train.shard true shares weights too"
            )
        for name, value in (("train_micro_batch_size_per_gpu", 1), ("gradient_accumulation_steps", 1), ("gradient_clipping", clip)):
            settings[name] = value  # rows of a pass are counted here, and not by the engine
        self._parameters, self._optimizer = list(parameters), optimizer
        self._groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        self._fragments: Any = importlib.import_module("deepspeed.utils")
        self.engine: Any = accelerator.prepare(network, optimizer)[0]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add to the gradient; after the last pass of an update it is summed over processes."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss)

    def norm(self) -> float:
        """Return the norm of the whole gradient, on every process; every process must ask."""
        squares = [self._fragments.safe_get_full_grad(parameter).double().square().sum() for parameter in self._parameters]
        return math.sqrt(float(torch.stack(squares).sum()))

    def step(self) -> None:
        """Clip the gradient and move the weights."""
        self.engine.step()

    def drop(self) -> None:
        """Forget the gradient."""
        shared = self.engine.optimizer
        shared.zero_grad(set_to_none=True)
        for number in shared.averaged_gradients:
            shared.averaged_gradients[number] = None

    def state_dict(self) -> dict[str, Any]:
        """Gather the moments as AdamW would have them on one process; every process must ask."""
        steps = [state["step"] for state in self._optimizer.state.values() if "step" in state]
        state = {}
        for number, parameter in enumerate(self._parameters) if steps else ():
            moments = {name: self._fragments.safe_get_full_optimizer_state(parameter, name).cpu() for name in _MOMENTS}
            state[number] = {"step": torch.as_tensor(float(steps[0])), **moments}
        groups = [{**options, "params": list(range(len(self._parameters)))} for options in self._groups]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` or one process's AdamW gave, after the weights were."""
        shared = self.engine.optimizer
        shared.refresh_fp32_params()
        if not state["state"]:
            return
        moments = {int(key): value for key, value in state["state"].items()}
        for flat in shared.single_partition_of_fp32_groups:
            empty = {name: torch.zeros_like(flat) for name in _MOMENTS}
            self._optimizer.state[flat] = {"step": torch.as_tensor(float(moments[0]["step"])), **empty}
        shared._lazy_init_hp_params_optimizer_state()
        for number, parameter in enumerate(self._parameters):
            for name in _MOMENTS:
                self._fragments.safe_set_full_optimizer_state(parameter, moments[number][name].to(parameter.device), name)


def is_zero(accelerator: Accelerator) -> bool:
    """Tell whether accelerate was launched with DeepSpeed."""
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)
