"""Links: from a score, an old score and an advantage to the loss of a row."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def linear(score: Float[Tensor, " rows"], advantage: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return ``-advantage * score``.

    Its gradient is that of ``-advantage * exp(score - sg(score))``, the on-policy ratio of AWM's Algorithm 1.
    """
    _check_rows(score, advantage)
    return -advantage * score


def on_policy_ratio(score: Float[Tensor, " rows"], advantage: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return ``-advantage * exp(score - sg(score))``: the value is minus the advantage, the gradient that of `linear`."""
    _check_rows(score, advantage)
    return -advantage * (score - score.detach()).exp()


def ppo_clip(log_ratio: Float[Tensor, " rows"], advantage: Float[Tensor, " rows"], *, clip: float) -> Float[Tensor, " rows"]:
    """Return PPO's pessimistic surrogate ``max(-A r, -A clip(r, 1 - c, 1 + c))`` with ``r = exp(log_ratio)``.

    Args:
        log_ratio: New minus old score of each row.
        advantage: Advantage of each row.
        clip: Half-width c of the ratio's band, in the unit of the scores (1e-4 is published for means over latent elements).

    Returns:
        One loss per row; rows in `clipped_mask` have no gradient.

    Raises:
        ValueError: If the shapes differ or ``clip`` is not positive.

    References:
        Schulman et al., "Proximal Policy Optimization Algorithms", 2017, https://arxiv.org/abs/1707.06347, equation 7.

    Examples:
        >>> ratio = torch.tensor([1.2, 0.8, 1.2, 0.8])
        >>> advantage = torch.tensor([1.0, -1.0, -1.0, 1.0])
        >>> ppo_clip(ratio.log(), advantage, clip=0.1)
        tensor([-1.1000,  0.9000,  1.2000, -0.8000])
    """
    _check_rows(log_ratio, advantage, clip)
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def bounded_ratio(
    log_ratio: Float[Tensor, " rows"], target: Float[Tensor, " rows"], advantage: Float[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """Return ``|r - target| |A|`` with ``r = exp(log_ratio)``: the ratio is drawn to its target, and beyond it back.

    Args:
        log_ratio: New minus old score of each row; clamped to 20 either way.
        target: Ratio to reach, from an estimator such as ``bpo``.
        advantage: Only its size counts; the target knows the direction.

    Returns:
        One loss per row, at least 0.

    Raises:
        ValueError: If the shapes differ.

    References:
        "Bounded Ratio Reinforcement Learning", 2026, GBPO, as in the released code.

    Examples:
        >>> bounded_ratio(torch.tensor([1.0, 1.0]).log(), torch.tensor([1.2, 0.9]), torch.tensor([1.0, -2.0]))
        tensor([0.2000, 0.2000])
    """
    _check_rows(log_ratio, advantage)
    _check_rows(log_ratio, target)
    return (log_ratio.clamp(-20, 20).exp() - target).abs() * advantage.abs()


def clipped_mask(log_ratio: Float[Tensor, " rows"], advantage: Float[Tensor, " rows"], *, clip: float) -> Bool[Tensor, " rows"]:
    """Tell which rows `ppo_clip` leaves without gradient: the ratio has left the band in the direction of the advantage."""
    _check_rows(log_ratio, advantage, clip)
    ratio = log_ratio.exp()
    return ((ratio > 1 + clip) & (advantage > 0)) | ((ratio < 1 - clip) & (advantage < 0))


def _check_rows(score: Tensor, advantage: Tensor, clip: float = 1.0) -> None:
    # A silent broadcast of [rows] against [rows, 1] would train every row on every advantage.
    if score.shape != advantage.shape:
        raise ValueError(
            f"link: got scores of shape {list(score.shape)} and advantages of shape {list(advantage.shape)}, needed one of each per row "
            f"(index the advantage [N, T] with the row's sample and step)"
        )
    if not clip > 0:
        raise ValueError(f"clip: got {clip}, needed a positive number (1e-4 is usual for mean log-probabilities)")
