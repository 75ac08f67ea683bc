"""Decays: how much of itself a slow role keeps after each step, ``role <- decay * role + (1 - decay) * current``."""

from collections.abc import Callable

Decay = Callable[[int], float]


def constant(decay: float) -> Decay:
    """Keep the same share at every step; 1 never moves, 0 copies."""
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: got {decay}, needed a value in [0, 1]")
    return lambda step: decay


def linear(rate: float, maximum: float) -> Decay:
    """Keep ``min(maximum, rate * step)``: begin as a copy, then slow down (AWM: 0.001 and 0.3; NFT: 0.001 and 0.5).

    Examples:
        >>> [linear(0.001, 0.3)(step) for step in (0, 100, 300, 500)]
        [0.0, 0.1, 0.3, 0.3]
    """
    if rate < 0 or not 0 <= maximum <= 1:
        raise ValueError(f"rate and maximum: got {rate} and {maximum}, needed rate >= 0 and maximum in [0, 1]")
    return lambda step: min(maximum, rate * step)


def ema_warmup(maximum: float) -> Decay:
    """Keep ``min(maximum, (1 + step) / (10 + step))``: the usual warm-up of an exponential moving average."""
    if not 0 <= maximum <= 1:
        raise ValueError(f"maximum: got {maximum}, needed a value in [0, 1]")
    return lambda step: min(maximum, (1 + step) / (10 + step))
