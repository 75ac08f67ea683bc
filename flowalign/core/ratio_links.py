"""Links of policy gradients: from the ratio of a recorded transition and its advantage to a loss, each with what it logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flowalign.core.algorithm import Rows
from flowalign.core.gaussians import gaussian_kl
from flowalign.core.links import bounded_ratio, clipped_mask, ppo_clip


@dataclass(frozen=True, kw_only=True)
class RatioRows:
    """What a link sees: the new minus old mean log-prob ``[rows]``, the new mean ``[rows, *event]``, and the recorded rows.

    The table has the columns x_next, mean (the old one), std, sigma, sigma_next, advantage, and target where an estimator gives one.
    """

    log_ratio: Tensor
    mean: Tensor
    table: Rows

    def kl(self) -> Tensor:
        """Return the KL divergence of the step from the old policy's, a mean over latent elements, ``[rows]``."""
        return gaussian_kl(self.mean, self.table["mean"], self.table["std"], reduction="mean")


@runtime_checkable
class RatioLink(Protocol):
    """From rows to a loss for each and what to log of each."""

    @property
    def name(self) -> str:
        """How configurations spell it."""
        ...

    @property
    def reaches_target(self) -> bool:
        """Whether it draws ratios to targets that an estimator gives."""
        ...

    def __call__(self, rows: RatioRows) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return losses ``[rows]`` and detached metrics."""
        ...


@dataclass(frozen=True, kw_only=True)
class PPOClip:
    """See `flowalign.core.links.ppo_clip`."""

    clip: float
    name: str = "ppo_clip"
    reaches_target: bool = False

    def __post_init__(self) -> None:
        """Refuse a band without extent."""
        _check_clip(self.clip)

    def __call__(self, rows: RatioRows) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Clip the ratio in the direction of the advantage."""
        return _clipped(rows.log_ratio, rows.table["advantage"], self.clip)


@dataclass(frozen=True, kw_only=True)
class BoundedRatio:
    """See `flowalign.core.links.bounded_ratio`."""

    name: str = "bounded_ratio"
    reaches_target: bool = True

    def __call__(self, rows: RatioRows) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Draw the ratio to its target."""
        return bounded_ratio(rows.log_ratio, rows.table["target"], rows.table["advantage"]), {}


@dataclass(frozen=True, kw_only=True)
class CentredClip:
    """GRPO-Guard's ratio: the log-ratio without its negative bias, in a unit that is the same at every step, clipped as in PPO.

    The mean log-ratio is ``<eps, dmu> / (std d) - |dmu|^2 / (2 std^2 d)``. Its second part is never positive and grows as noise shrinks, so
    ratios drift below 1 and samples with positive advantage are clipped less. Here it is added back and what remains is multiplied by the std:
    ``exp(<eps, dmu> / d)``.

    References:
        Wang et al., "GRPO-Guard", 2025, https://arxiv.org/abs/2510.22319, and its released code.
        Deviation: the bias is that of the row; the released code takes it over the whole batch by an axis tuple that is empty.
    """

    clip: float
    name: str = "centred_clip"
    reaches_target: bool = False

    def __post_init__(self) -> None:
        """Refuse a band without extent."""
        _check_clip(self.clip)

    def __call__(self, rows: RatioRows) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Centre and rescale the log-ratio, then clip."""
        centred = (rows.log_ratio + rows.kl()) * rows.table["std"]
        value, metrics = _clipped(centred, rows.table["advantage"], self.clip)
        return value, {**metrics, "centred_log_ratio": centred.detach().abs()}


@dataclass(frozen=True, kw_only=True)
class KLMask:
    """Flow-DPPO's trust region: a row is left alone once its step's exact KL to the old policy exceeds ``delta`` in the advantage's direction.

    References:
        "Flow-DPPO", 2026, https://arxiv.org/abs/2606.11025: mask 0 where A (ratio - 1) > 0 and KL > delta, 1e-5 to 1e-7 for means over
        latent elements.
    """

    delta: float
    name: str = "kl_mask"
    reaches_target: bool = False

    def __post_init__(self) -> None:
        """Refuse a region without extent."""
        if not self.delta > 0:
            raise ValueError(f"delta: got {self.delta}, needed a positive number (1e-6 is usual for KL as a mean over latent elements)")

    def __call__(self, rows: RatioRows) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Follow the plain ratio inside the region and on the way back to it."""
        advantage, divergence = rows.table["advantage"], rows.kl().detach()
        outside = (advantage * rows.log_ratio.detach() > 0) & (divergence > self.delta)
        value = -advantage * rows.log_ratio.exp()
        kept = torch.where(outside, value.detach(), value)
        return kept, {"clip_fraction": outside.to(value), "kl/old": divergence}


def _clipped(log_ratio: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Mapping[str, Tensor]]:
    beyond = clipped_mask(log_ratio.detach(), advantage, clip=clip)
    return ppo_clip(log_ratio, advantage, clip=clip), {"clip_fraction": beyond.to(log_ratio)}


def _check_clip(clip: float) -> None:
    if not clip > 0:
        raise ValueError(f"clip: got {clip}, needed a positive number (1e-4 is usual for mean log-probabilities)")
