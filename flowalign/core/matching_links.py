"""Links of the matching family that are more than a weighted score: DiffusionNFT's two branches and DGPO's group sigmoid."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.core.gaussians import reduce_event
from flowalign.core.links import clipped_mask
from flowalign.core.paths import expand_like, widest

_LEAST = 1e-5  # the released code's floor of the adaptive weight


def negative_aware(
    velocity: Float[Tensor, "rows *event"],
    old: Float[Tensor, "rows *event"],
    x: Float[Tensor, "rows *event"],
    x0: Float[Tensor, "rows *event"],
    noise: Float[Tensor, "rows *event"],
    sigma: Float[Tensor, " rows"],
    optimality: Float[Tensor, " rows"],
    *,
    beta: float,
    scale: float,
    weighting: Literal["adaptive", "uniform"],
) -> Float[Tensor, " rows"]:
    """Draw one mixture of the new and the old velocity to the image, and its mirror image to it where the image is bad.

    With ``v+ = beta v + (1 - beta) old`` and ``v- = (1 + beta) old - beta v`` the loss is ``scale / beta (r l+ + (1 - r) l-)``. Where v = old
    its gradient is ``scale (2 r - 1)`` times that of the matching error, whatever beta; beta is the strength of a quadratic pull to old.

    Args:
        velocity: New prediction at x, with gradient.
        old: Prediction of the role that sampled.
        x: State at ``sigma``.
        x0: The image.
        noise: The noise of x.
        sigma: Noise level.
        optimality: r in [0, 1], the probability that the image is good.
        beta: Positive.
        scale: Factor on the loss; the clip of the advantages makes the gradient advantage-weighted matching.
        weighting: "adaptive" takes the error of the predicted image over its own mean absolute size (released code), "uniform" that of the
            velocity.

    Returns:
        One loss per row.

    References:
        Zheng et al., "DiffusionNFT", 2025, https://arxiv.org/abs/2509.16117, equation 5, and its released code (``scale`` 5, ``1 / beta``).
    """
    new, before = widest(velocity), widest(old)
    losses = []
    for mixture in (beta * new + (1 - beta) * before, (1 + beta) * before - beta * new):
        if weighting == "uniform":
            losses.append(reduce_event((mixture - (widest(noise) - widest(x0))).square(), "mean"))
        else:
            error = widest(x) - expand_like(sigma, x).to(mixture) * mixture - widest(x0)
            size = reduce_event(error.detach().abs(), "mean").clamp(min=_LEAST)
            losses.append(reduce_event(error.square(), "mean") / size)
    good, bad = losses
    r = optimality.to(good)
    value = scale / beta * (r * good + (1 - r) * bad)
    return value.to(velocity.device, torch.promote_types(velocity.dtype, torch.float32))


def group_sigmoid(
    error: Float[Tensor, " rows"], reference: Float[Tensor, " rows"], advantage: Float[Tensor, " rows"], *, members: int, beta: float
) -> Float[Tensor, " rows"]:
    """Weigh advantage-weighted matching by how little the group already prefers its good images, as a stop-gradient.

    The gradient is that of ``-1 / beta log sigmoid(-mean over the group of beta A (error - reference))`` times the number of members.

    Args:
        error: Matching error of each row, with gradient; rows of a group at one level lie side by side.
        reference: The same under the reference.
        advantage: Advantage of each row.
        members: Rows of a group.
        beta: Temperature; 100 in the released code.

    Returns:
        One loss per row; with error = reference half of advantage-weighted matching.

    References:
        Luo et al., "DGPO", 2025, https://arxiv.org/abs/2510.08425, and its released code.
    """
    preferred = (beta * advantage * (error - reference)).detach().view(-1, members).mean(1)
    return torch.sigmoid(preferred).repeat_interleave(members) * advantage * error


def matching_mask(error: Tensor, old: Tensor, advantage: Tensor, *, clip: float) -> Tensor:
    """Tell which rows have gone far enough since the rollout: ``exp(old - error)`` outside its band in the advantage's direction."""
    return clipped_mask((old - error).detach(), advantage, clip=clip)
