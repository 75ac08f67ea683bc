"""Signs of reward hacking, or of a student that falls apart, while a run trains: what its images look like, how alike they are, and what scores do."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flowalign.estimators.diversity import group_novelty

PIXELS = ("brightness", "saturation", "edge_density", "high_frequency")
DIVERSITY = "diversity"
NORMS = ("latent_rms", "velocity_rms")  # root mean squares, which the loop measures
_SIDE = 256  # pixels a side of what is looked at: a monitor must cost next to nothing
_COARSE = 8
_WINDOW = 5  # steps of the baseline, and of what is compared with it
_SPREADS = 6.0  # of the baseline's steps; each step is a mean over many images
_GROWTH = 0.25  # a smaller change of a norm, as a share of what it was, is no sign
_LEAST = 0.1  # a smaller change of a statistic in [0, 1] is no sign, however steady the baseline was


def features(images: Tensor) -> Tensor:
    """Return for each image its brightness, saturation, edge density, high-frequency energy and 8 x 8 pixels, ``[batch, 196]`` float64.

    Of images above 256 pixels, edges and high frequencies are those of the middle 256 x 256 pixels, the rest is of averages.

    High-frequency energy is the share of the variance of luma that a 3 x 3 average removes, in [0, 1]; the other statistics are those of
    :func:`flowalign.evaluate.fidelity.pixel_statistics`.

    Args:
        images: ``[batch, 3, h, w]`` in [0, 1].
    """
    height, width = (min(side, _SIDE) for side in images.shape[2:])
    whole = images.detach().float()
    small = functional.adaptive_avg_pool2d(whole, (height, width)) if images.shape[2:] != (height, width) else whole
    pixels = small.cpu().double().clamp(0, 1)
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    # Texture is lost where pixels are averaged: edges and high frequencies are looked for in the middle, at full resolution.
    luma = _luma(whole[:, :, top : top + height, left : left + width].cpu().double().clamp(0, 1))
    high, low = pixels.amax(1), pixels.amin(1)
    saturation = torch.where(high > 0, (high - low) / high.clamp(min=1e-12), 0.0)
    right, down = functional.pad(luma.diff(dim=2), (0, 1)), functional.pad(luma.diff(dim=1), (0, 0, 0, 1))
    edges = ((right.square() + down.square()).sqrt() > 0.1).double()
    smooth = functional.avg_pool2d(functional.pad(luma[:, None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[:, 0]
    variance = luma.flatten(1).var(1, correction=0)
    rough = (luma - smooth).flatten(1).var(1, correction=0) / variance.clamp(min=1e-12)
    columns = [_luma(pixels).mean((1, 2)), saturation.mean((1, 2)), edges.mean((1, 2)), rough.clamp(max=1)]
    return torch.cat([torch.stack(columns, 1), functional.adaptive_avg_pool2d(pixels, _COARSE).flatten(1)], 1)


def _luma(pixels: Tensor) -> Tensor:
    """Return luma by Rec. 709, ``[batch, h, w]``."""
    return (pixels * torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)[:, None, None]).sum(1)


def summarise(rows: Tensor, group: Tensor) -> dict[str, float]:
    """Return the monitors of a step.

    Args:
        rows: Features of all images, from :func:`features`.
        group: The prompt of each image.

    Returns:
        Means of the pixel statistics, and of the distance of an image to the others of its prompt (root mean square over 8 x 8 pixels).
    """
    values = dict(zip(PIXELS, rows[:, : len(PIXELS)].mean(0).tolist(), strict=True))
    values[DIVERSITY] = float(group_novelty(rows[:, len(PIXELS) :], group).mean())
    return {name: round(value, 8) for name, value in values.items()}  # the order of sums must not show


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A sign that something goes wrong: which monitor, at which step, and what it says."""

    monitor: str
    step: int
    text: str


def alarms(lines: Sequence[Mapping[str, Any]], trained: Sequence[str], held_out: Sequence[str]) -> list[Alarm]:
    """Look for signs of reward hacking at the last of a log's steps.

    The last five steps are compared with the first five:

    - diversity within a prompt has fallen below half;
    - a pixel statistic has moved by more than 0.1 and by more than six times the spread of the first steps;
    - a norm of latents or velocities has moved by more than a quarter and by more than six times that spread;
    - a trained reward, one of several is enough, has risen by more than twice its spread, while a held-out one has fallen by as much of its own.

    Args:
        lines: Of ``log.jsonl``, from the first step.
        trained: Names of the rewards that are trained on.
        held_out: Names of rewards and metrics that are only watched.

    Returns:
        The alarms of the last step; none before ten steps.
    """
    if len(lines) < 2 * _WINDOW:
        return []
    step, change = int(lines[-1]["step"]), functools.partial(_change, lines)
    found = []
    diversity = change("monitor", DIVERSITY)
    if diversity is not None and diversity[1] < 0.5 * diversity[0]:
        found.append(
            Alarm(monitor=DIVERSITY, step=step, text=f"images of a prompt grow alike: diversity {diversity[0]:.4f} -> {diversity[1]:.4f}")
        )
    for name in PIXELS:
        moved = change("monitor", name)
        if moved is not None and abs(moved[1] - moved[0]) > max(_LEAST, _SPREADS * moved[2]):
            found.append(Alarm(monitor=name, step=step, text=f"{name.replace('_', ' ')} has moved: {moved[0]:.3f} -> {moved[1]:.3f}"))
    for name in NORMS:
        moved = change("monitor", name)
        if moved is not None and abs(moved[1] - moved[0]) > max(_GROWTH * moved[0], _SPREADS * moved[2]):
            found.append(Alarm(monitor=name, step=step, text=f"{name.replace('_', ' ')} has moved: {moved[0]:.3f} -> {moved[1]:.3f}"))
    risen = [name for name in trained if _moved(change("reward", name), 1)]
    for name in held_out:
        moved = change("metric", name) or change("reward", name)
        if risen and moved is not None and _moved(moved, -1):
            text = f"held-out {name} falls, {moved[0]:.4f} -> {moved[1]:.4f}, while {', '.join(risen)} rises"
            found.append(Alarm(monitor=f"held-out {name}", step=step, text=text))
    return found


_SCATTER = 2.0  # of single steps; the mean of a window scatters less than half as much


def student_alarms(lines: Sequence[Mapping[str, Any]], rewards: Sequence[str]) -> list[Alarm]:
    """Look for a student that falls apart, at the last of a distillation's steps.

    Its first images are no yardstick: in few steps an untrained student makes the same blur of every noise. What it had is: the last five steps are
    compared with the best five before. An alarm is a diversity within a prompt that has fallen below half of that, or a score that has lost more than
    half of what it had gained, and more than its steps scatter (scores may be negative, and of any offset).

    Args:
        lines: Of ``log.jsonl``, from the first step.
        rewards: Names of the rewards that measure it.

    Returns:
        The alarms of the last step; none before ten steps.
    """
    found = []
    for part, name in (("monitor", DIVERSITY), *(("reward", name) for name in rewards)):
        values = [line.get(part, {}).get(name) for line in lines]
        known = [value for value in values if value is not None and math.isfinite(value)]
        if len(known) < 2 * _WINDOW:
            continue
        means = [fmean(known[start : start + _WINDOW]) for start in range(len(known) - _WINDOW + 1)]
        best, last = max(means[:-_WINDOW]), means[-1]
        if name == DIVERSITY:
            fallen = last < 0.5 * best
        else:
            scatter = fmean(pstdev(known[start : start + _WINDOW]) for start in range(len(known) - _WINDOW + 1))
            fallen = best - last > max(0.5 * (best - min(means[:-_WINDOW])), _SCATTER * scatter)
        if fallen:
            text = f"the student's {name.replace('_', ' ')} falls: {best:.4f} -> {last:.4f}"
            found.append(Alarm(monitor=name, step=int(lines[-1]["step"]), text=text))
    return found


def gaps(lines: Sequence[Mapping[str, Any]], trained: Sequence[str], held_out: Sequence[str]) -> dict[str, float]:
    """Return how far the trained rewards have run ahead of each held-out one, ``gap/NAME``.

    A rise is that from the first five steps to the last five, in units of the spread of the first; the gap is the mean rise of the trained rewards less
    that of the held-out one. A policy that learns what both reward has none.

    Returns:
        Nothing before ten steps, or where a reward did not vary at first.
    """
    if len(lines) < 2 * _WINDOW:
        return {}

    def rise(name: str) -> float | None:
        moved = _change(lines, "metric", name) or _change(lines, "reward", name)
        return None if moved is None or moved[2] == 0 else (moved[1] - moved[0]) / moved[2]

    risen = [value for name in trained if (value := rise(name)) is not None]
    held = {name: value for name in held_out if (value := rise(name)) is not None}
    return {f"gap/{name}": fmean(risen) - value for name, value in held.items()} if risen else {}


def _change(lines: Sequence[Mapping[str, Any]], part: str, name: str) -> tuple[float, float, float] | None:
    """Return the means of the first and the last five steps, and the spread of the first; None where a value is missing."""
    rows = [line.get(part, {}).get(name) for line in (*lines[:_WINDOW], *lines[-_WINDOW:])]
    known = [value for value in rows if value is not None and math.isfinite(value)]
    if len(known) < len(rows):
        return None
    return fmean(known[:_WINDOW]), fmean(known[_WINDOW:]), pstdev(known[:_WINDOW])


def _moved(change: tuple[float, float, float] | None, sign: int) -> bool:
    """Tell whether a mean has moved one way by more than twice the spread of the first steps, and at all."""
    return change is not None and sign * (change[1] - change[0]) > max(2 * change[2], 1e-6 * abs(change[0]), 1e-9)
