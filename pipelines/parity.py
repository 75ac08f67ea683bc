"""Does a pipeline behave as record and replay promise? Measured, not assumed: by tests, by the parity table and by ``flowalign doctor``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.core.kernels import CPS, DDIM, DanceSDE, FlowSDE, Kernel
from flowalign.core.plans import Plan, PlanStep, chain, fork, ode
from flowalign.core.rollout import Trajectory, Transitions
from flowalign.pipelines.base import Conditioning, FlowPipeline
from flowalign.pipelines.frames import Flow, Frame
from flowalign.pipelines.loading import quiet
from flowalign.pipelines.roles import CURRENT, REFERENCE
from flowalign.pipelines.schedulers import frame_of
from flowalign.pipelines.watch import own_images

PROMPT = "a photo of a red ring"
LONG_PROMPT = "a photo of a red ring to the left of two small green squares, on a wooden table in the last light of the evening"
SPARING = "use dtype bfloat16, a smaller size, offload: true, gradient_checkpointing: true, or smaller batches"
ROUNDING = 1e-4  # of images in [0, 1] and of velocities of order 1, where other batch sizes sum in another order


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found.

    Attributes:
        check: Its name.
        passed: Whether the promise holds.
        found: The measurement, in a few words.
    """

    check: str
    passed: bool
    found: str


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A pipeline with what its checks share.

    Attributes:
        flow: The pipeline.
        noise: Two samples' first latents.
        draws: Noise of each step.
        num_steps: Steps of every rollout.
        prompt: The text of both samples.
    """

    flow: FlowPipeline
    noise: Tensor
    draws: Callable[[int], Tensor]
    num_steps: int
    prompt: str = PROMPT

    @property
    def kernel(self) -> Kernel:
        """A noisy kernel that suits the pipeline's coordinates."""
        return FlowSDE(0.7) if isinstance(self.frame, Flow) else DDIM(1.0)

    @property
    def frame(self) -> Frame:
        """The pipeline's coordinates."""
        return frame_of(self.flow.pipe.scheduler)

    def run(self, plan: Plan, **options: Any) -> Trajectory:
        """Roll two samples of one prompt out."""
        given: dict[str, Any] = {"x_init": self.noise, "noise": self.draws} | options
        return self.flow.rollout(self.flow.encode([self.prompt] * 2), plan, **given)


def subject(flow: FlowPipeline, *, num_steps: int | None = None) -> Subject:
    """Draw the noise of the checks; they take the pipeline's default number of steps unless another is given."""

    def draw(seed: int) -> Tensor:
        return torch.randn(2, *flow.event_shape, generator=torch.Generator().manual_seed(seed)).to(flow.device)

    return Subject(flow=flow, noise=draw(0), draws=lambda step: draw(100 + step), num_steps=num_steps or flow.num_steps)


def images_equal(it: Subject) -> Finding:
    """Compare the images of a deterministic plan with those of the untouched pipeline."""
    role = REFERENCE if it.flow.roles.lora else CURRENT
    made = it.flow.decode(it.run(ode(it.num_steps), role=role).x0)
    with it.flow.roles.use(role):
        own = own_images(it.flow, it.flow.pipe, it.prompt, it.noise, it.num_steps).float()
    # Text of one length is padded and masked in training, which moves the last bits of attention.
    tolerance = 0.0 if it.flow.family.fix is None and it.flow.dtype == torch.float32 else ROUNDING
    return _distance("images equal the pipeline's own", made, own, tolerance if it.flow.dtype == torch.float32 else 0.1)


def velocities_equal(it: Subject) -> Finding:
    """Replay every recorded velocity in the batch that it was recorded in."""
    table = it.run(chain(it.kernel, it.num_steps)).transitions
    cond = it.flow.encode([it.prompt] * 2)
    again = []
    for step in table.step.unique():
        rows = table.take((table.step == step).nonzero().squeeze(1))
        with torch.no_grad():
            again.append(it.flow.velocity(rows.x, rows.sigma, cond.take(rows.sample)))
    return _distance("replayed velocities equal recorded ones", torch.cat(again), table.velocity, 0.0)


def noise_0_is_the_ode(it: Subject) -> Finding:
    """Compare every kernel at noise level 0 with Euler's."""
    expected = it.run(ode(it.num_steps)).x0
    kernels: tuple[Kernel, ...] = (FlowSDE(0.0), DanceSDE(0.0), DDIM(0.0), CPS(0.0))
    made = [it.run(Plan((PlanStep(kernel=kernel),) * it.num_steps)).x0 for kernel in kernels]
    return _distance("kernels at noise 0 equal the ODE", torch.stack(made), expected.expand(len(made), *expected.shape), 0.0)


def resuming_is_going_on(it: Subject) -> Finding:
    """Go on from a stored state in the middle of the schedule."""
    plan, middle = chain(it.kernel, it.num_steps), it.num_steps // 2
    whole = it.run(plan)
    rows = whole.transitions.take((whole.transitions.step == middle).nonzero().squeeze(1))
    return _distance("resuming equals going on", it.run(plan, x_init=rows.x, start=middle).x0, whole.x0, 0.0)


def forks_go_on(it: Subject) -> Finding:
    """Let two children leave the path in the middle; replay where they left it, and lead them to the end a second time."""
    middle = it.num_steps // 2
    plan = fork(it.kernel, it.num_steps, num_children=2, steps=range(middle, middle + 1))

    def draws(step: int) -> Tensor:
        return torch.cat([it.draws(step), it.draws(step).flip(0)])

    done = it.run(plan, noise=draws)
    rows, cond = done.transitions, it.flow.encode([it.prompt] * 2)
    left = rows.take(torch.arange(0, len(rows), 2))  # both children of a state leave it with one evaluation
    with torch.no_grad():
        again = it.flow.velocity(left.x, left.sigma, cond.take(left.seed))
    if middle + 1 == it.num_steps:
        return _distance("children of a fork go on", again, left.velocity, 0.0)
    ends = it.flow.rollout(cond.take(rows.seed), ode(it.num_steps), x_init=rows.x_next, noise=draws, start=middle + 1).x0
    made, expected = torch.cat([again, ends]), torch.cat([left.velocity, done.x0[rows.sample]])
    return _distance("children of a fork go on", made, expected, 0.0)


def batches_agree(it: Subject) -> Finding:
    """Replay row by row what was recorded in a batch, and all steps in one."""
    table = it.run(chain(it.kernel, it.num_steps)).transitions
    cond = it.flow.encode([it.prompt] * 2).take(table.sample)
    rows = _row_by_row(it, table, cond)
    with torch.no_grad():
        whole = it.flow.velocity(table.x, table.sigma, cond)
    return _rounding(it, "micro-batches replay the same", torch.stack([rows, whole]), table.velocity)


def lengths_agree(it: Subject) -> Finding:
    """Sample a short and a long text in one batch, and replay each alone: no text may depend on another one's length."""
    with quiet(level=logging.ERROR):  # where a tokenizer cuts the long one, it says so
        cond = it.flow.encode([PROMPT, LONG_PROMPT])
    table = it.flow.rollout(cond, chain(it.kernel, it.num_steps), x_init=it.noise, noise=it.draws).transitions
    rows = _row_by_row(it, table, cond.take(table.sample))
    return _rounding(it, "texts of two lengths share a batch", rows, table.velocity)


def _row_by_row(it: Subject, table: Transitions, cond: Conditioning) -> Tensor:
    with torch.no_grad():
        rows = [it.flow.velocity(table.x[i : i + 1], table.sigma[i : i + 1], cond.take(torch.tensor([i]))) for i in range(len(table))]
    return torch.cat(rows)


def adapters_reach_attention(it: Subject) -> Finding:
    """Count the attention layers that the targets reach; those that they miss are what the family leaves out, or the user."""
    roles = it.flow.roles
    if roles.lora is None:
        return Finding(check="LoRA reaches the attention", passed=True, found="all weights are trained")
    attention = attention_layers(roles.module)
    missed = [name for name in attention if not any(layer.startswith(f"{name}.") for layer in roles.layers)]
    undeclared = [name for name in missed if name.rpartition(".")[2] not in it.flow.family.untargeted]
    found = f"{len(attention) - len(missed)} of {len(attention)} layers, {roles.num_layers} matrices"
    return Finding(
        check="LoRA reaches the attention",
        # Published targets may leave some out (SD3.5's second attention), and targets of one's own what they like; which, is said.
        passed=len(missed) < len(attention) and (roles.lora.targets is not None or not undeclared),
        found=found + (f"; without {', '.join(missed[:3])}" if missed else ""),
    )


def attention_layers(module: nn.Module) -> list[str]:
    """Name the modules that have a projection to queries, alone or with others, as diffusers calls it."""
    return [name.rpartition(".")[0] for name, _ in module.named_modules() if name.endswith((".to_q", ".to_qkv_mlp_proj"))]


CHECKS: Mapping[str, Callable[[Subject], Finding]] = {
    "images": images_equal,
    "velocities": velocities_equal,
    "noise 0": noise_0_is_the_ode,
    "resuming": resuming_is_going_on,
    "forks": forks_go_on,
    "batches": batches_agree,
    "lengths": lengths_agree,
    "adapters": adapters_reach_attention,
}


def findings(flow: FlowPipeline, *, num_steps: int | None = None) -> Iterator[Finding]:
    """Run every check; one that raises is a failure with its reason."""
    it = subject(flow, num_steps=num_steps)
    for name, check in CHECKS.items():
        yield attempt(name, partial(check, it))


def attempt(name: str, check: Callable[[], Finding]) -> Finding:
    """Run a check; one that raises is a failure with its reason."""
    try:
        return check()
    except torch.OutOfMemoryError as error:
        return Finding(check=name, passed=False, found=f"out of memory ({str(error).partition(chr(10))[0]}); {SPARING}")
    except Exception as error:  # what is examined is other people's code: whatever it raises is a finding, and the other checks go on
        return Finding(check=name, passed=False, found=f"{type(error).__name__}: {' '.join(str(error).split())}")


def _rounding(it: Subject, check: str, got: Tensor, expected: Tensor) -> Finding:
    """Compare velocities of other batches, relative to the largest."""
    size = float(expected.abs().max().clamp(min=1.0))
    tolerance = ROUNDING if it.flow.dtype == torch.float32 else 0.1
    return _distance(check, got / size, expected.expand_as(got) / size, tolerance)


def _distance(check: str, got: Tensor, expected: Tensor, tolerance: float) -> Finding:
    worst = float((got - expected).abs().max())
    return Finding(check=check, passed=worst <= tolerance, found="equal" if worst == 0 else f"apart by {worst:.1e}")
