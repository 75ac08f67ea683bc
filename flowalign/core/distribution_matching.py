"""The two ways to move a network, and the directions of distribution matching.

`regress` draws a prediction to a target; `push` moves a sample against a direction. With a fake score that knows the student's own noised density, DMD2
is ``push(x0, x0_fake - x0_teacher, weight=scale)`` and f-distill the same with ``weight=h * scale``, h from `flowalign.core.ratios.density_weights`.
"""

from jaxtyping import Float
from torch import Tensor

from flowalign.core.gaussians import reduce_event
from flowalign.core.paths import Level, at_least_float32, expand_level


def regress(
    prediction: Float[Tensor, "batch *event"], target: Float[Tensor, "batch *event"], weight: Float[Tensor, " batch"] | None = None
) -> Float[Tensor, " batch"]:
    """Return the weighted mean squared error of each row; gradient flows to the prediction alone.

    A fake score is trained by it on the student's samples, with the velocity ``noise - x0`` as its target.

    Args:
        prediction: What the network says.
        target: What it should say.
        weight: One factor per row; None for 1.

    Returns:
        ``weight * mean((prediction - sg(target))**2)``, the mean over event, at least float32.

    Raises:
        ValueError: If the shapes do not fit.

    Examples:
        >>> import torch
        >>> regress(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([5.])
    """
    _check("regress", prediction, target, weight)
    error = at_least_float32(prediction) - at_least_float32(target).detach()
    return _weighted(reduce_event(error.square(), "mean"), weight)


def pseudo_huber(
    prediction: Float[Tensor, "batch *event"], target: Float[Tensor, "batch *event"], *, width: float = 0.03
) -> Float[Tensor, " batch"]:
    """Return the pseudo-Huber distance of each row: rows that are far off weigh no more than those that are near.

    A one-step student cannot follow every sample of its teacher; squared errors let the few that it misses move it most.

    Args:
        prediction: What the network says; gradient flows to it alone.
        target: What it should say.
        width: Root mean square below which the distance is quadratic.

    Returns:
        ``sqrt(mean((prediction - sg(target))**2) + width**2) - width``, the mean over event, at least float32.

    Raises:
        ValueError: If the shapes do not fit or ``width`` is not positive.

    References:
        Song and Dhariwal, "Improved Techniques for Training Consistency Models", 2023, https://arxiv.org/abs/2310.14189, section 3.3. Deviation: of
        the mean over elements and not the sum, so that the distance does not grow with their number; published widths are 0.00054 in these units.

    Examples:
        >>> import torch
        >>> pseudo_huber(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), width=1e-9)
        tensor([3.5355])
    """
    if not width > 0:
        raise ValueError(f"pseudo_huber: width: got {width}, needed a positive number")
    return (regress(prediction, target) + width**2).sqrt() - width


def push(
    x: Float[Tensor, "batch *event"], direction: Float[Tensor, "batch *event"], weight: Float[Tensor, " batch"] | None = None
) -> Float[Tensor, " batch"]:
    """Move samples against a direction: ``mean((x - sg(x - weight * direction))**2) / 2`` for each row.

    The gradient in x is ``weight * direction`` over the number of elements. Several pushes add up as their directions do.

    Args:
        x: Samples of the student, with gradient.
        direction: Where they should not go; taken as a constant.
        weight: One factor per row, taken as a constant; None for 1.

    Returns:
        One loss per row, at least float32. Its size says how far samples are pushed, not how good they are.

    Raises:
        ValueError: If the shapes do not fit.

    References:
        Yin et al., "One-step Diffusion with Distribution Matching Distillation", 2023, https://arxiv.org/abs/2311.18828, algorithm 1.
        Deviation: the value and gradient are formed from the step itself and not from ``x - (x - step)``, which rounds small steps away.

    Examples:
        >>> import torch
        >>> x = torch.tensor([[1.0, 3.0]], requires_grad=True)
        >>> push(x, torch.tensor([[2.0, 0.0]]), torch.tensor([0.5])).backward()
        >>> x.grad
        tensor([[0.5000, 0.0000]])
    """
    _check("push", x, direction, weight)
    step = at_least_float32(direction).detach()
    if weight is not None:
        step = step * weight.detach().to(step).reshape(-1, *[1] * (step.ndim - 1))
    moved = at_least_float32(x)
    return reduce_event(step.square() / 2 + step * (moved - moved.detach()), "mean")


def dmd_scale(
    x0: Float[Tensor, "batch *event"], x0_teacher: Float[Tensor, "batch *event"], *, eps: float = 1e-6
) -> Float[Tensor, " batch"]:
    """Return DMD's factor of each row, ``1 / (mean|x0 - x0_teacher| + eps)``: all noise levels push with about one strength.

    Args:
        x0: Samples of the student.
        x0_teacher: The teacher's predictions of them from noised copies, guidance included.
        eps: Keeps a sample that the teacher leaves where it is from an endless push. For images of many elements 1e-6 is enough; in few dimensions, where
            the mean can vanish by chance, take about a tenth of the data's spread.

    Returns:
        Positive, without gradient, at least float32.

    Raises:
        ValueError: If the shapes differ or ``eps`` is not positive.

    References:
        Yin et al., DMD, 2023, https://arxiv.org/abs/2311.18828, section 3.2. Deviation: as in the released code of DMD and DMD2, where the rest of the
        published weight turns the difference of scores into one of predictions and a factor alpha is left out.
    """
    _check("dmd_scale", x0, x0_teacher, None)
    if not eps > 0:
        raise ValueError(f"eps: got {eps}, needed a positive number (1e-6 as published)")
    distance = at_least_float32(x0).detach() - at_least_float32(x0_teacher).detach()
    return 1 / (reduce_event(distance.abs(), "mean") + eps)


def exact_scale(sigma: Level, x0: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
    """Return the factor that makes the push the exact gradient of the divergence at a noise level: ``((1 - sigma) / sigma)**2``.

    For ``x = (1 - sigma) * x0 + sigma * noise`` the difference of scores is ``(1 - sigma) / sigma**2`` times that of the predictions of x0, and the
    chain rule adds ``1 - sigma``. It is the signal-to-noise ratio, and the same for a variance-preserving process at the same ratio. Divided by the mean over
    event inside `push`, the gradient is that of the divergence over the number of elements.

    Args:
        sigma: Noise level, in (0, 1].
        x0: Samples of the student; only the shape is used.

    Raises:
        ValueError: If a level is outside (0, 1].
    """
    level = expand_level(sigma, x0, positive=True)
    ratio = ((1 - level) / level).square().flatten()
    return ratio.expand(len(x0)) if len(ratio) == 1 else ratio


def matching_direction(x0_fake: Float[Tensor, "batch *event"], x0_teacher: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
    """Return ``x0_fake - x0_teacher``, against which samples are pushed; without guidance, on the same noised samples.

    Raises:
        ValueError: If the shapes differ.
    """
    _check("matching_direction", x0_fake, x0_teacher, None)
    return at_least_float32(x0_fake) - at_least_float32(x0_teacher)


def guidance_direction(
    x0_teacher: Float[Tensor, "batch *event"], x0_guided: Float[Tensor, "batch *event"]
) -> Float[Tensor, "batch *event"]:
    """Return the part of the direction that the teacher's guidance adds: its prediction without guidance less that with.

    Matching and guidance are pushed apart: the ratio of densities weighs the first. A discriminator that is shown the guided teacher's samples tells the
    ratio of the guided density, which in theory weighs both; see ``weigh_guidance`` of f_distill. With equal weights their sum is the direction to the guided prediction. For plain guidance of a scale it is
    ``-(scale - 1) * (x0_teacher - x0_unconditional)``.

    Args:
        x0_teacher: With the prompt, without guidance.
        x0_guided: With guidance.

    Raises:
        ValueError: If the shapes differ.

    References:
        "Decoupled DMD", 2025, https://arxiv.org/abs/2511.22677: guidance drives, matching regularises.
        Deviation: f-distill's released code multiplies both by h.
    """
    _check("guidance_direction", x0_teacher, x0_guided, None)
    return at_least_float32(x0_teacher) - at_least_float32(x0_guided)


def _weighted(rows: Tensor, weight: Tensor | None) -> Tensor:
    return rows if weight is None else rows * weight.detach().to(rows)


def _check(where: str, first: Tensor, second: Tensor, weight: Tensor | None) -> None:
    if first.shape != second.shape:
        raise ValueError(f"{where}: got shapes {list(first.shape)} and {list(second.shape)}, needed equal ones")
    if weight is not None and weight.shape != first.shape[:1]:
        raise ValueError(f"{where}: got weights of shape {list(weight.shape)}, needed one for each of {first.shape[0]} rows")
