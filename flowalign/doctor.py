"""``flowalign doctor MODEL``: does this model work here, and what does it cost? Everything is measured on the model itself."""

from __future__ import annotations

import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from flowalign.algorithms import awm
from flowalign.core.kernels import gaussian_log_prob
from flowalign.core.plans import chain, ode
from flowalign.data import Prompt
from flowalign.estimators import recipe
from flowalign.model_settings import settings_for
from flowalign.pipelines import parity
from flowalign.pipelines.parity import Finding, Subject, attempt
from flowalign.train.fit import Trainer
from flowalign.train.scoring import NamedReward
from flowalign.train.settings import TrainConfig

CLIP = 1e-4  # Flow-GRPO's clip range of a mean log-ratio: what a gap is compared with
# In half precision a row rounds otherwise in another batch: 4e-4 at most on the shapes model in bfloat16, of which this is ten times.
HALF_GAP = 5e-3
# Random autoencoders reach 12 to 14 dB, that of the shapes model 46 in float32 and in bfloat16.
LEAST_PSNR = 20.0
SANITY_STEPS = 3


def examine(model: str, *, num_steps: int = 4, num_images: int = 2, fields: Sequence[str] = ()) -> bool:
    """Check a model and print a table of verdicts; the command ``flowalign doctor``.

    Args:
        model: Folder, hub id, "shapes", or a run's configuration.
        num_steps: Denoising steps of every rollout; of the numbers up to 10, only 4 and 5 have a grid under every spacing of DDIM.
        num_images: Images of the measured rollout.
        fields: ``--pipeline.KEY VALUE`` arguments.

    Returns:
        Whether everything that can fail passed.
    """
    settings = settings_for(model, fields, said_by={"model": "MODEL", "num_steps": "--num-steps"})
    began = time.perf_counter()
    print(f"{model}\n")
    loaded, flow = load(settings)
    passed = _tell(loaded)
    for finding in () if flow is None else examinations(flow, num_steps=num_steps, num_images=num_images):
        passed = _tell(finding) and passed
    print(f"\n{'all checks passed' if passed else 'a check failed'} ({time.perf_counter() - began:.0f} s)")
    return passed


def _tell(finding: Finding) -> bool:
    print(f"{'ok    ' if finding.passed else 'FAILED'}  {finding.check.ljust(40)}  {finding.found}", flush=True)
    return finding.passed


def load(settings: Any) -> tuple[Finding, Any]:
    """Build a model; None in its place if that fails, with the reason among the findings."""
    built: list[Any] = []

    def build() -> Finding:
        began = time.perf_counter()
        built.append(settings.build(device=Accelerator().device))
        made = f"{type(built[0].pipe).__name__} on {built[0].device}, {str(built[0].dtype).removeprefix('torch.')}"
        return Finding(check="loading", passed=True, found=f"{made}, {time.perf_counter() - began:.1f} s")

    return attempt("loading", build), built[0] if built else None


def examinations(flow: Any, *, num_steps: int, num_images: int) -> Iterator[Finding]:
    """Run every examination; one that raises is a failure with its reason."""
    subjects: list[Subject] = []

    def watch() -> Finding:
        subjects.append(parity.subject(flow, num_steps=num_steps))
        return Finding(check="recording", passed=True, found=f"latents {list(flow.event_shape)}, {num_steps} steps")

    yield attempt("recording", watch)
    if not subjects:
        return  # every further check begins with latents of the right shape
    it = subjects[0]
    checks: dict[str, Callable[[], Finding]] = {
        **{name: partial(check, it) for name, check in parity.CHECKS.items()},
        "ratio gap before the first update": lambda: ratio_gap(it),
        "autoencoder round trip": lambda: autoencoder(it),
        "LoRA file round trip": lambda: files(it),
        "memory by part": lambda: memory(flow.pipe),
        "speed": lambda: speed(it, num_images),
        "sanity run on JPEG size": lambda: sanity_run(flow),
    }
    for name, check in checks.items():
        yield attempt(name, check)


def ratio_gap(it: Subject) -> Finding:
    """Replay each trained step row by row, another batch than it was recorded in, and report the largest mean log-ratio of each step."""
    table = it.run(chain(it.kernel, it.num_steps)).transitions
    cond = it.flow.encode([parity.PROMPT] * 2)
    gaps = []
    for step in table.step.unique():
        rows = table.take((table.step == step).nonzero().squeeze(1))
        worst = 0.0
        for i in range(len(rows)):
            one = rows.take(torch.tensor([i], device=rows.step.device))
            with torch.no_grad():
                velocity = it.flow.velocity(one.x, one.sigma, cond.take(one.sample))
            mean = it.kernel(one.x, velocity, one.sigma, one.sigma_next).mean
            again = gaussian_log_prob(one.x_next, mean, one.std, reduction="mean")
            worst = max(worst, float((again - one.mean_log_prob()).abs().max()))
        gaps.append(worst)
    each = ", ".join(f"{gap:.1e}" for gap in gaps)
    return Finding(
        check="ratio gap before the first update",
        passed=max(gaps) < (CLIP if it.flow.dtype == torch.float32 else HALF_GAP),
        found=f"{each} by step, in other batches{'' if max(gaps) < CLIP else f'; above a clip of {CLIP:g}: train in the batch of the rollout'}",
    )


def autoencoder(it: Subject) -> Finding:
    """Encode decoded images and decode them again; what is lost is small for an autoencoder that was trained."""
    name = "autoencoder round trip"
    images = it.flow.decode(it.run(ode(it.num_steps)).x0)
    vae = it.flow.pipe.vae
    pixels = (2 * images - 1).to(next(vae.parameters()).dtype)
    is_video = any(isinstance(layer, nn.Conv3d) for layer in vae.modules())
    with torch.no_grad(), it.flow.resting.awake(images=True):
        coded = vae.encode(pixels.unsqueeze(2) if is_video else pixels, return_dict=False)[0]
        latents = coded if isinstance(coded, Tensor) else coded.mode()
        again = vae.decode(latents, return_dict=False)[0]
    again = ((again.squeeze(2) if is_video else again).float() / 2 + 0.5).clamp(0, 1)
    if not torch.isfinite(again).all():
        return Finding(check=name, passed=False, found="not finite")
    psnr = float(-10 * (again - images).square().mean().clamp(min=1e-12).log10())
    found = f"PSNR {psnr:.1f} dB{'' if psnr >= LEAST_PSNR else f', needed {LEAST_PSNR:.0f}: are its weights loaded?'}"
    return Finding(check=name, passed=psnr >= LEAST_PSNR, found=found)


def files(it: Subject) -> Finding:
    """Save an adapter that is not zero: saving loads the file back and compares weights, velocities and pixels."""
    roles = it.flow.roles
    before = {name: value.detach().clone() for name, value in roles.parameters("current").items()}
    try:
        if roles.lora is not None:
            with torch.no_grad():
                for value in roles.trainable_parameters():
                    value.add_(0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value))
        with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            it.flow.save(Path(place) / "weights")
            size = sum(path.stat().st_size for path in (Path(place) / "weights").rglob("*.safetensors"))
    finally:
        roles.load("current", before)
    unchecked = [str(warning.message) for warning in told if "not checked" in str(warning.message)]
    return Finding(
        check="LoRA file round trip" if roles.lora else "weights round trip",
        passed=not unchecked,
        found=f"{size / 2**20:.1f} MB, {unchecked[0] if unchecked else 'same pixels'}",
    )


def memory(pipe: Any) -> Finding:
    """Count the weights of each part, and what the device has held at most so far."""
    parts = {
        name: sum(parameter.nbytes for parameter in part.parameters())
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module)
    }
    found = ", ".join(f"{name} {size / 2**20:.0f} MB" for name, size in sorted(parts.items(), key=lambda pair: -pair[1]))
    peak = f"; peak on the device {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
    return Finding(check="memory by part", passed=True, found=found + peak)


def speed(it: Subject, num_images: int) -> Finding:
    """Time one rollout, and one update of as many samples: forward, backward and the optimizer's step."""
    flow = it.flow
    cond = flow.encode([parity.PROMPT] * num_images)
    x = torch.randn(num_images, *flow.event_shape, generator=torch.Generator().manual_seed(0)).to(flow.device)

    def timed(work: Callable[[], Any]) -> float:
        work()  # what is compiled or allocated at the first call is not measured
        _wait(flow.device)
        began = time.perf_counter()
        work()
        _wait(flow.device)
        return time.perf_counter() - began

    optimizer = torch.optim.AdamW(flow.roles.trainable_parameters(), lr=0.0)  # the same work, and the weights stay

    def update() -> None:
        flow.velocity(x, torch.tensor(0.5), cond).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    rollout = timed(lambda: flow.decode(flow.rollout(cond, ode(it.num_steps), x_init=x, noise=it.draws).x0))
    updated = timed(update)
    found = (
        f"{num_images / rollout:.2f} images/s of {it.num_steps} steps, decoded; {num_images / updated:.2f} rows/s of an update with AdamW"
    )
    return Finding(check="speed", passed=True, found=found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class JpegSize:
    """Reward: minus the size of the image as JPEG, in kilobytes; a reward that any model can be trained on."""

    quality: int = 90

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Compress every image."""
        sizes = []
        for image in images.float().cpu():
            buffer = io.BytesIO()
            to_pil_image(image).save(buffer, format="JPEG", quality=self.quality)
            sizes.append(-buffer.tell() / 1024)
        return torch.tensor(sizes, dtype=torch.float64)


def sanity_run(flow: Any) -> Finding:
    """Train a few steps of AWM on the size of the images as JPEG; the weights must move and stay finite. Gains need longer runs."""
    prompts = [Prompt(uid=i, text=text, metadata={}, where="doctor") for i, text in enumerate((parity.PROMPT, "a blue square"))]
    with tempfile.TemporaryDirectory() as place:
        trainer = Trainer(
            pipeline=flow,
            algorithm=awm.Config(num_levels=2).build(),
            estimator=recipe("flow_grpo"),
            rewards=[NamedReward(name="jpeg_size", reward=JpegSize())],
            draw=lambda step: prompts,
            config=TrainConfig(groups=2, group_size=4, rollout_batch_size=8, micro_batch_size=4, learning_rate=1e-4),
            seed=0,
            folder=Path(place),
            accelerator=Accelerator(cpu=flow.device.type == "cpu"),
        )
        before = [value.detach().clone() for value in flow.roles.trainable_parameters()]
        lines = [trainer.step(step) for step in range(SANITY_STEPS)]
    after = flow.roles.trainable_parameters()
    moved = float(torch.stack([(a.detach() - b).norm() for a, b in zip(after, before, strict=True)]).norm())
    finite = all(bool(torch.isfinite(value).all()) for value in after)
    sizes = " -> ".join(f"{-line['reward']['jpeg_size']:.2f}" for line in lines)
    return Finding(
        check="sanity run on JPEG size",
        passed=finite and moved > 0,
        found=f"{SANITY_STEPS} steps of AWM, {sizes} kB, weights moved by {moved:.1e}" if finite else "weights are not finite",
    )
