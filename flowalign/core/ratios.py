"""From the logits of a discriminator to the weights of f-distill: clip, calibrate by noise level, weigh, normalise, and say how healthy that is.

A calibrated ratio has mean 1 over the student's samples at every noise level, so its mean in bins of noise levels both corrects and monitors the discriminator.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.core.divergences import divergence, weight
from flowalign.core.paths import widest

Operation = Literal["sum", "max"]


@runtime_checkable
class Reduce(Protocol):
    """Adds up what ranks have, or takes the largest, element by element."""

    def __call__(self, x: Tensor, op: Operation = "sum") -> Tensor:
        """Return what every rank gets."""
        ...


_MOSTLY = 0.5  # share of a batch outside the clip that is warned of


@dataclass(frozen=True, kw_only=True)
class RatioWeights:
    """How a density ratio becomes a weight.

    Attributes:
        divergence: A name of `flowalign.core.divergences`.
        lower: Ratios below are taken for this one.
        upper: Ratios above are taken for this one.
        num_bins: Bins of noise levels that are calibrated apart; 0 leaves ratios as they are.
        decay: Of the bins' running means; 0 takes each batch by itself.
        strength: Power of the weight, from 0 (DMD2) to 1 (f-distill).

    Raises:
        ValueError: If a number cannot be meant or the divergence is unknown.

    References:
        Xu et al., "One-step Diffusion Models with f-Divergence Distribution Matching", 2025, https://arxiv.org/abs/2502.15681; clip, bins and their
        decay (0 or 0.5) as in the released code. Deviations: bins by quantiles of the noise levels and not of equal width, which for EDM puts 64 % of
        all samples into one; ``strength``.
    """

    divergence: str = "jensen_shannon"
    lower: float = 0.1
    upper: float = 20.0
    num_bins: int = 10
    decay: float = 0.9
    strength: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers; warn of a divergence that is known to be unsuitable."""
        reason = divergence(self.divergence).unsuitable
        if reason:
            warnings.warn(f"divergence: {self.divergence} is not for training: {reason}; take jensen_shannon or forward_kl", stacklevel=2)
        if not 0 < self.lower < 1 < self.upper < math.inf:
            raise ValueError(f"lower, upper: got {self.lower} and {self.upper}, needed 0 < lower < 1 < upper (0.1 and 20 as published)")
        if self.num_bins < 0 or not 0 <= self.decay < 1 or not 0 <= self.strength <= 1:
            raise ValueError(
                f"got num_bins {self.num_bins}, decay {self.decay}, strength {self.strength}; needed at least 0, a value in [0, 1) and one in [0, 1]"
            )


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """Weights of a batch and what they say of the critics.

    Attributes:
        weight: Mean 1 over the batch of all ranks, without gradient, float64 ``[batch]``.
        calibration: Of each bin its mean ratio, and the weight that the mean stands on (0 where the bin was never seen), to be handed to the next
            call and saved; float64 ``[2, bins]``.
        stats: ``ratio`` (mean of the clipped, uncalibrated ratio), ``log_ratio`` (mean before clipping), ``weight_min``, ``weight_mean``, ``weight_max`` (before normalisation),
            ``effective_share`` (effective sample size over the batch size), ``clipped`` (share outside the clip), ``calibrated`` (share of bins whose
            mean lies in [1/2, 2]). Of all ranks.
    """

    weight: Float[Tensor, " batch"]
    calibration: Float[Tensor, "2 bins"]
    stats: dict[str, float]


def identity(x: Tensor, op: Operation = "sum") -> Tensor:
    """Reduce over one rank."""
    return x


def start_calibration(num_bins: int) -> Float[Tensor, "2 bins"]:
    """Return the calibration of bins that were never seen."""
    return torch.stack([torch.ones(num_bins, dtype=torch.float64), torch.zeros(num_bins, dtype=torch.float64)])


def log_ratio_of(logits: Float[Tensor, "batch heads"]) -> Float[Tensor, " batch"]:
    """Return the log-ratio that several heads agree on: the mean of their logits, float64, without gradient.

    Raises:
        ValueError: If a logit is not finite.
    """
    found = widest(logits.detach()).mean(1)
    if not bool(torch.isfinite(found).all()):
        raise ValueError(
            "logits: got one that is not finite; the discriminator has diverged (lower its learning rate, or clip its gradients)"
        )
    return found


def quantile_edges(sigmas: Float[Tensor, " levels"], num_bins: int) -> Float[Tensor, " edges"]:
    """Return the inner edges of bins that hold equal shares of the noise levels.

    Args:
        sigmas: The schedule's noise levels, or many draws of the sampler of noise levels.
        num_bins: Number of bins, at least 1.

    Returns:
        ``num_bins - 1`` increasing levels, float64; bin 0 is the least noisy.

    Raises:
        ValueError: If there are fewer distinct levels than bins.

    Examples:
        >>> quantile_edges(torch.tensor([1.0, 0.75, 0.5, 0.25]), 2)
        tensor([0.6250], dtype=torch.float64)
    """
    distinct = torch.unique(widest(sigmas)).numel()
    if num_bins < 1 or distinct < num_bins:
        raise ValueError(
            f"num_bins: got {num_bins} for {distinct} distinct noise levels, needed from 1 to as many (one for each rung at most)"
        )
    ordered = widest(sigmas).sort().values
    # An edge lies in the middle between two neighbours, so that no level falls on it.
    upper = (torch.arange(1, num_bins, device=ordered.device) * len(ordered)) // num_bins
    return (ordered[upper - 1] + ordered[upper]) / 2


def bins_of(sigma: Float[Tensor, " batch"], edges: Float[Tensor, " edges"]) -> Int[Tensor, " batch"]:
    """Return the bin of each noise level.

    Examples:
        >>> bins_of(torch.tensor([0.1, 0.9]), torch.tensor([0.5])).tolist()
        [0, 1]
    """
    return torch.bucketize(widest(sigma), widest(edges), right=True)


def effective_sample_size(weight: Float[Tensor, " batch"], *, reduce: Reduce = identity) -> float:
    """Return ``(sum of weights)**2 / sum of squared weights``, over all ranks: how many samples of equal weight would say as much.

    Examples:
        >>> effective_sample_size(torch.tensor([1.0, 1.0, 0.0, 0.0]))
        2.0
    """
    first, second = reduce(torch.stack([widest(weight).sum(), widest(weight).square().sum()])).tolist()
    return first * first / second if second else 0.0


def is_calibrated(calibration: Float[Tensor, "2 bins"], *, factor: float = 2.0) -> bool:
    """Tell whether every bin has been seen and its mean ratio lies within a factor of 1: before that, critics are trained alone."""
    return bool(_within(calibration, factor).all())


def _within(calibration: Tensor, factor: float = 2.0) -> Tensor:
    mean, known = calibration
    return (known > 0) & (mean >= 1 / factor) & (mean <= factor)


def density_weights(
    log_ratio: Float[Tensor, " batch"],
    bins: Int[Tensor, " batch"],
    calibration: Float[Tensor, "2 bins"],
    settings: RatioWeights,
    *,
    reduce: Reduce = identity,
) -> Weighted:
    """Turn log-ratios of the student's samples into the weights of their pushes.

    In order: clip; divide by the running mean ratio of the noise level's bin; h; divide by the mean of h over the batch of all ranks.
    Reverse KL gives exactly 1, so that it is DMD2.

    Args:
        log_ratio: ``log p - log q`` of the noised samples; see `log_ratio_of`.
        bins: Bin of each sample's noise level; see `bins_of`.
        calibration: Of the last call, or `start_calibration`.
        settings: Divergence, clip and bins.
        reduce: Sums, or takes the largest, over ranks. Ranks may have batches of different sizes, and bins that are empty on some.

    Returns:
        Weights, calibration and statistics.

    Raises:
        ValueError: If shapes or bins do not fit, or a log-ratio is not finite.

    Warns:
        UserWarning: If most of the batch lies outside the clip.

    References:
        Xu et al., 2025, https://arxiv.org/abs/2502.15681, and its released code. Deviations: log-space; no 1e-6 in the denominators.
    """
    _check(log_ratio, bins, calibration, settings)
    raw = widest(log_ratio.detach())
    clipped = raw.clamp(math.log(settings.lower), math.log(settings.upper))
    outside = (raw != clipped).double()
    counts = torch.stack([torch.ones_like(raw).sum(), outside.sum(), clipped.exp().sum(), raw.sum()])
    size, num_outside, ratio_sum, raw_sum = reduce(counts).tolist()
    if num_outside > _MOSTLY * size:
        _warn_of_clip(raw_sum / size, settings)
    calibration = _calibrated(clipped.exp(), bins, calibration, settings.decay, reduce)
    means = calibration[0]
    level = means.log()[bins] if len(means) else torch.zeros_like(clipped)
    h = weight(settings.divergence, clipped - level.to(clipped.device)) ** settings.strength
    mean = float(reduce(h.sum())) / size
    highest, lowest = reduce(torch.stack([h.max(), -h.min()]), "max").tolist()
    stats = {
        "ratio": ratio_sum / size,
        "log_ratio": raw_sum / size,
        "weight_min": -lowest,
        "weight_mean": mean,
        "weight_max": highest,
        "effective_share": effective_sample_size(h, reduce=reduce) / size,
        "clipped": num_outside / size,
        "calibrated": float(_within(calibration).double().mean()) if len(means) else 1.0,
    }
    return Weighted(weight=h / mean, calibration=calibration, stats=stats)


def _calibrated(ratio: Tensor, bins: Tensor, calibration: Tensor, decay: float, reduce: Reduce) -> Tensor:
    """Move the mean of every bin that has samples, on any rank, towards this batch's.

    A running mean that begins at 1 would say 1 for long, whatever is measured; this one is of the batches that were seen and nothing else.
    """
    num = calibration.shape[1]
    if num == 0:
        return calibration
    both = reduce(torch.stack([torch.bincount(bins, minlength=num).double(), torch.bincount(bins, weights=ratio, minlength=num)]))
    count, total = both.to(calibration.device)
    mean, known = calibration
    weight = decay * known + (1 - decay)
    moved = (decay * known * mean + (1 - decay) * total / count.clamp(min=1)) / weight
    return torch.where(count > 0, torch.stack([moved, weight]), calibration)


def _warn_of_clip(mean: float, settings: RatioWeights) -> None:
    # In the same words every time, so that Python says it once; how many and how far is in the statistics of every call.
    side = "far below: the discriminator tells the student's samples apart at once" if mean < 0 else "far above"
    warnings.warn(
        f"density ratio: most of the batch lies outside [{settings.lower:g}, {settings.upper:g}] ({side}; see the statistics clipped and log_ratio), so "
        "that weights say little; train the critics alone for longer, lower the discriminator's learning rate, or give it an R1 penalty",
        stacklevel=1,
    )


def _check(log_ratio: Tensor, bins: Tensor, calibration: Tensor, settings: RatioWeights) -> None:
    if log_ratio.shape != bins.shape or len(log_ratio) == 0:
        raise ValueError(f"density_weights: got {len(log_ratio)} log-ratios and {len(bins)} bins, needed one each and at least one")
    if not bool(torch.isfinite(log_ratio).all()):
        raise ValueError("log_ratio: got one that is not finite; the discriminator has diverged (lower its learning rate)")
    num_bins = calibration.shape[1] if calibration.ndim == 2 else -1
    if calibration.shape != (2, settings.num_bins):
        raise ValueError(
            f"calibration: has {num_bins} bins, the settings {settings.num_bins}; start it anew, or resume with the same num_bins"
        )
    if num_bins and not bool(((bins >= 0) & (bins < num_bins)).all()):
        raise ValueError(f"bins: got one outside 0 to {num_bins - 1}; make the edges with quantile_edges(..., {num_bins})")
