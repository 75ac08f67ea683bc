"""Decays: how much of itself a slow role keeps after each step, ``role <- decay * role + (1 - decay) * current``."""

from collections.abc import Callable

Decay = Callable[[int], float]


def constant(decay: float) -> Decay:
    """Keep the same share at every step; 1 never moves, 0 copies."""
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: got {decay}, needed a value in [0, 1]")
    return lambda step: decay


def linear(rate: float, maximum: float, *, start: int = 0) -> Decay:
    """Keep ``min(maximum, rate * (step - start))``, and nothing before ``start``: begin as a copy, then slow down.

    Args:
        rate: Growth per step, at least 0.
        maximum: Upper bound, in [0, 1].
        start: Until this step the role is a copy of the current one.

    Returns:
        The decay as a function of the step.

    Raises:
        ValueError: If ``rate`` is negative or ``maximum`` outside [0, 1].

    References:
        Released code of AWM: ``linear(0.001, 0.3)``; of DiffusionNFT: ``linear(0.001, 0.5)`` (its type 1) and
        ``linear(0.0075, 0.999, start=75)`` (type 2).

    Examples:
        >>> [linear(0.001, 0.3)(step) for step in (0, 100, 300, 500)]
        [0.0, 0.1, 0.3, 0.3]
    """
    if rate < 0 or not 0 <= maximum <= 1:
        raise ValueError(f"rate and maximum: got {rate} and {maximum}, needed rate >= 0 and maximum in [0, 1]")
    return lambda step: min(maximum, rate * max(0, step - start))


def ema_warmup(maximum: float) -> Decay:
    """Keep ``min(maximum, (1 + step) / (10 + step))``: the usual warm-up of an exponential moving average."""
    if not 0 <= maximum <= 1:
        raise ValueError(f"maximum: got {maximum}, needed a value in [0, 1]")
    return lambda step: min(maximum, (1 + step) / (10 + step))
