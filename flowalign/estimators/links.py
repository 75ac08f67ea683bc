"""Derivatives of f-divergences, ``f'(u)`` at ``u = policy / target``: links of preference objectives and of f-DPG."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from flowalign.core.divergences import DIVERGENCES
from flowalign.estimators.spelling import unknown

FLink = Literal["reverse_kl", "forward_kl", "jensen_shannon", "total_variation", "chi_square", "alpha"]

LINKS: Mapping[str, Callable[[Tensor, float], Tensor]] = MappingProxyType(
    {
        # As functions of u a divergence is u f(1 / u), whose derivative is f(r) - r f'(r) at r = 1 / u.
        "reverse_kl": lambda log_u, alpha: DIVERGENCES["reverse_kl"].pull(-log_u),
        "forward_kl": lambda log_u, alpha: DIVERGENCES["forward_kl"].pull(-log_u),
        "jensen_shannon": lambda log_u, alpha: DIVERGENCES["jensen_shannon"].pull(-log_u),
        "total_variation": lambda log_u, alpha: torch.where(log_u.isnan(), log_u, torch.sign(log_u) / 2),
        "chi_square": lambda log_u, alpha: DIVERGENCES["pearson_chi_squared"].pull(-log_u),
        "alpha": lambda log_u, alpha: -torch.expm1(-alpha * log_u) / alpha,
    }
)
"""``f'`` as a function of ``log u``, by name; only ``alpha`` reads its second argument."""

LARGEST_LOG_RATIO = 30.0


def link(divergence: str, log_ratio: Tensor, *, alpha: float = 0.5) -> Tensor:
    """Return ``f'(u)`` with ``log u = log_ratio``.

    ===============  ===================  =============================
    divergence       f'(u)                behaviour
    ===============  ===================  =============================
    reverse_kl       log u + 1            seeks modes, unbounded
    forward_kl       -1 / u               covers, unbounded below
    jensen_shannon   log(2 u / (1 + u))   bounded above
    total_variation  sign(u - 1) / 2      bounded
    chi_square       1 - 1 / u**2         covers, strongly
    alpha            (1 - u**-alpha) / alpha   reverse_kl at 0 (less 1), forward_kl at 1 (plus 1)
    ===============  ===================  =============================

    Args:
        divergence: A name from the table.
        log_ratio: ``log policy - log target``.
        alpha: Of the alpha-divergence, between 0 and 1.

    Raises:
        ValueError: If the name is unknown, or alpha is not inside (0, 1).

    References:
        Wang et al., "Beyond Reverse KL", 2023, https://arxiv.org/abs/2309.16240; Go et al., "f-DPG", 2023,
        https://arxiv.org/abs/2302.08215 (total variation, chi-square). Deviation: TRL's option is 1 - alpha.

    Examples:
        >>> link("forward_kl", torch.tensor([0.5, 1.0, 2.0]).log())
        tensor([-2.0000, -1.0000, -0.5000])
    """
    if divergence not in LINKS:
        raise ValueError(unknown("divergence", divergence, LINKS))
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: got {alpha}, needed a number between 0 and 1 (the ends are 'reverse_kl' and 'forward_kl')")
    return LINKS[divergence](log_ratio, alpha)


def preference_margin(
    divergence: str,
    log_ratio_winner: Tensor,
    log_ratio_loser: Tensor,
    *,
    beta: float,
    alpha: float = 0.5,
    largest: float = LARGEST_LOG_RATIO,
) -> Tensor:
    """Return ``beta * (f'(u_winner) - f'(u_loser))``, the logit of f-DPO; u is policy over reference.

    Args:
        divergence: A name that ``link`` knows.
        log_ratio_winner: ``log u`` of the preferred samples; in Diffusion-DPO minus half of beta times the difference of errors.
        log_ratio_loser: ``log u`` of the others.
        beta: Strength.
        alpha: Of the alpha-divergence.
        largest: Log-ratios are clamped to this size, since ``exp`` of them occurs.

    References:
        Wang et al., "Beyond Reverse KL", 2023, https://arxiv.org/abs/2309.16240, theorem 1.

    Examples:
        >>> preference_margin("reverse_kl", torch.tensor(2.0).log(), torch.tensor(0.5).log(), beta=0.1)
        tensor(0.1386)
    """
    winner, loser = (link(divergence, value.clamp(-largest, largest), alpha=alpha) for value in (log_ratio_winner, log_ratio_loser))
    return beta * (winner - loser)
