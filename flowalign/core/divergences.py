"""f-divergences between a teacher p and a student q as functions of ``log r``, r = p / q: how strongly a sample is pulled, and towards what.

``D_f(p || q) = E_q[f(r)]`` with f convex and f(1) = 0. For a student that makes its samples ``x = G(z)``,

    gradient of D_f = E_q[h(r) * (score_q - score_p)(x) * dx],    h(r) = r**2 f''(r),

so a divergence enters its own gradient through one weight per sample, and reverse KL (h = 1) is DMD2.

| name | f(r) | h(r) | bounded |
|---|---|---|---|
| reverse_kl | -log r | 1 | yes |
| softened_reverse_kl | (r + 1) log(1/2 + 1/(2r)) | 1 / (r + 1) | yes |
| jensen_shannon (twice the usual) | r log r - (r + 1) log((r + 1)/2) | r / (r + 1) | yes |
| squared_hellinger | 1 - sqrt(r) | sqrt(r) / 4 | no |
| forward_kl | r log r | r | no |
| jeffreys | (r - 1) log r | r + 1 | no |
| neyman_chi_squared (unsuitable) | (1 - r)**2 / r | 2 / r | no |
| pearson_chi_squared (unsuitable) | (r - 1)**2 | 2 r**2 | no |

References:
    Xu et al., "One-step Diffusion Models with f-Divergence Distribution Matching", 2025, https://arxiv.org/abs/2502.15681, table 1.
    Deviations: none (the released code leaves out constant factors); the chi-squares are not in the table.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.core.paths import at_least_float32, widest

_LOG_2 = math.log(2)

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """One f-divergence; every function takes ``log r`` and lets nan through.

    Attributes:
        f: f(r).
        slope: f'(r).
        curvature: f''(r).
        weight: h(r) = r**2 f''(r).
        pull: f(r) - r f'(r), whose derivative in log r is -h.
        is_bounded: Whether h is.
        unsuitable: Why a student should not be trained on it; empty where it may be.
    """

    f: Function
    slope: Function
    curvature: Function
    weight: Function
    pull: Function
    is_bounded: bool
    unsuitable: str = ""


def _softplus(x: Tensor) -> Tensor:
    # log(1 + exp(x)); torch's own softplus leaves the exponential out from x = 20 on, which is 2e-9 too soon.
    return -logsigmoid(-x)


# These forms are exact to rounding also where r or 1 / r vanishes beside 1.
DIVERGENCES: Mapping[str, Divergence] = MappingProxyType(
    {
        "reverse_kl": Divergence(
            f=lambda log_r: -log_r,
            slope=lambda log_r: -torch.exp(-log_r),
            curvature=lambda log_r: torch.exp(-2 * log_r),
            weight=torch.ones_like,
            pull=lambda log_r: 1 - log_r,
            is_bounded=True,
        ),
        "softened_reverse_kl": Divergence(
            f=lambda log_r: (torch.exp(log_r) + 1) * (_softplus(-log_r) - _LOG_2),
            slope=lambda log_r: _softplus(-log_r) - _LOG_2 - torch.exp(-log_r),
            curvature=lambda log_r: torch.exp(-2 * log_r) * torch.sigmoid(-log_r),
            weight=lambda log_r: torch.sigmoid(-log_r),
            pull=lambda log_r: 1 - _LOG_2 + _softplus(-log_r),
            is_bounded=True,
        ),
        "jensen_shannon": Divergence(
            f=lambda log_r: (torch.exp(log_r) + 1) * _LOG_2 - torch.exp(log_r) * _softplus(-log_r) - _softplus(log_r),
            slope=lambda log_r: _LOG_2 - _softplus(-log_r),
            curvature=lambda log_r: torch.exp(-log_r) * torch.sigmoid(-log_r),
            weight=torch.sigmoid,
            pull=lambda log_r: _LOG_2 - _softplus(log_r),
            is_bounded=True,
        ),
        "squared_hellinger": Divergence(
            f=lambda log_r: -torch.expm1(log_r / 2),
            slope=lambda log_r: -torch.exp(-log_r / 2) / 2,
            curvature=lambda log_r: torch.exp(-1.5 * log_r) / 4,
            weight=lambda log_r: torch.exp(log_r / 2) / 4,
            pull=lambda log_r: 1 - torch.exp(log_r / 2) / 2,
            is_bounded=False,
        ),
        "forward_kl": Divergence(
            f=lambda log_r: torch.exp(log_r) * log_r,
            slope=lambda log_r: log_r + 1,
            curvature=lambda log_r: torch.exp(-log_r),
            weight=torch.exp,
            pull=lambda log_r: -torch.exp(log_r),
            is_bounded=False,
        ),
        "jeffreys": Divergence(
            f=lambda log_r: torch.expm1(log_r) * log_r,
            slope=lambda log_r: log_r - torch.expm1(-log_r),
            curvature=lambda log_r: torch.exp(-log_r) + torch.exp(-2 * log_r),
            weight=lambda log_r: torch.exp(log_r) + 1,
            pull=lambda log_r: -log_r - torch.expm1(log_r),
            is_bounded=False,
        ),
        "neyman_chi_squared": Divergence(
            f=lambda log_r: 4 * torch.sinh(log_r / 2).square(),
            slope=lambda log_r: -torch.expm1(-2 * log_r),
            curvature=lambda log_r: 2 * torch.exp(-3 * log_r),
            weight=lambda log_r: 2 * torch.exp(-log_r),
            pull=lambda log_r: 2 * torch.expm1(-log_r),
            is_bounded=False,
            unsuitable="its weight 2 / r grows where the teacher has nothing, which is where the ratio is known worst, and seeks modes more than reverse_kl",
        ),
        "pearson_chi_squared": Divergence(
            f=lambda log_r: torch.expm1(log_r).square(),
            slope=lambda log_r: 2 * torch.expm1(log_r),
            curvature=lambda log_r: torch.full_like(log_r, 2.0),
            weight=lambda log_r: 2 * torch.exp(2 * log_r),
            pull=lambda log_r: -torch.expm1(2 * log_r),
            is_bounded=False,
            unsuitable="its weight 2 r**2 lets a few samples of each batch do all the pulling: the variance is far above that of forward_kl",
        ),
    }
)
"""Every divergence by name."""


def names(*, unsuitable: bool = False) -> tuple[str, ...]:
    """Return the divergences that a student may be trained on, or with ``unsuitable`` all of them.

    Examples:
        >>> len(names()), len(names(unsuitable=True))
        (6, 8)
    """
    return tuple(name for name, entry in DIVERGENCES.items() if unsuitable or not entry.unsuitable)


def divergence(name: str) -> Divergence:
    """Look a divergence up.

    Raises:
        ValueError: If the name is unknown; the message has the nearest one and the list.
    """
    if name not in DIVERGENCES:
        near = difflib.get_close_matches(name, DIVERGENCES, n=1, cutoff=0.5)
        hint = f", did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"divergence: got {name!r}{hint} need one of {', '.join(names())}")
    return DIVERGENCES[name]


def weight(name: str, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return ``h(r) = r**2 * f''(r)``, the factor of a sample in the gradient of an f-divergence.

    Args:
        name: A name from the table at the top of this module.
        log_ratio: ``log r = log p_teacher - log q_student`` at the student's samples.

    Returns:
        Non-negative weights in the dtype of ``log_ratio``, at least float32, neither clipped nor normalised. For ``|log r|`` up to 60 float32
        holds all but the chi-squares, whose weights pass its range at 44 (Pearson, log r) and are inf there; float64 holds those too.

    Raises:
        ValueError: If the name is unknown or a ratio is nan.

    References:
        Xu et al., 2025, https://arxiv.org/abs/2502.15681, table 1.

    Examples:
        >>> weight("jensen_shannon", torch.tensor([0.0]))
        tensor([0.5000])
    """
    entry = divergence(name)
    _check(log_ratio)
    return entry.weight(at_least_float32(log_ratio))


def generator(name: str, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return f(r); its mean over samples of the student is the divergence.

    Args:
        name: A name from the table at the top of this module.
        log_ratio: ``log p - log q``.

    Returns:
        float64: f spans ``r log r`` to ``1 / r``. Finite for ``|log r|`` up to 60.

    Raises:
        ValueError: If the name is unknown or a ratio is nan.

    Examples:
        >>> generator("reverse_kl", torch.tensor([0.5]))
        tensor([-0.5000], dtype=torch.float64)
    """
    entry = divergence(name)
    _check(log_ratio)
    return entry.f(widest(log_ratio))


def slope(name: str, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return f'(r) in float64; see `generator`."""
    entry = divergence(name)
    _check(log_ratio)
    return entry.slope(widest(log_ratio))


def curvature(name: str, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return f''(r) in float64; see `generator`."""
    entry = divergence(name)
    _check(log_ratio)
    return entry.curvature(widest(log_ratio))


def pull(name: str, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return ``f(r) - r f'(r)`` in float64: what a policy gradient on the divergence takes as the cost of a sample.

    The derivative of D_f in the student's density is this function, so its gradient in x, ``-h(r) * grad log r``, is what a student that can be
    differentiated through is pulled by. In ``u = q / p = 1 / r`` it is the derivative of ``u f(1 / u)``, the link of f-DPG (`flowalign.estimators.links`).

    Examples:
        >>> pull("reverse_kl", torch.tensor([0.5]))
        tensor([0.5000], dtype=torch.float64)
    """
    entry = divergence(name)
    _check(log_ratio)
    return entry.pull(widest(log_ratio))


def _check(log_ratio: Tensor) -> None:
    if bool(torch.isnan(log_ratio).any()):
        raise ValueError("log_ratio: got nan; need numbers (check the discriminator that estimates the ratio)")
