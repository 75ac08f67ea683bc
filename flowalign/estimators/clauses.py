"""Dense rewards from verifiable sub-checks, each weighted by how hard it is for the policy right now."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flowalign.estimators.batch import RewardBatch
from flowalign.estimators.kinds import FACTORS, Signature
from flowalign.estimators.needs import need
from flowalign.estimators.options import at_least
from flowalign.estimators.segments import SegmentStats, segment_stats
from flowalign.estimators.signals import Signal, Stage, pure, stage


def clause_weights(rate: Tensor, valid: Tensor, *, alpha: float = 1.0, sigma: float = 0.1, delta: float = 1e-6) -> Tensor:
    """Weigh the clauses of each prompt by difficulty, ``exp(-alpha * rate)``, shared among clauses of similar pass rate.

    Args:
        rate: ``[prompts, C]`` pass rates.
        valid: ``[prompts, C]``, which clauses the prompt has.
        alpha: How much harder clauses count more.
        sigma: Width of the neighbourhood of pass rates; 0 gives each clause a neighbourhood of its own.
        delta: Added to the size of a neighbourhood.
    """
    weight = torch.exp(-alpha * rate)
    if sigma > 0:
        near = torch.exp(-(rate[:, :, None] - rate[:, None, :]).square() / (2 * sigma**2))
        weight = weight / ((near * valid[:, None, :]).sum(2) + delta)
    return torch.where(valid, weight, 0.0)


@stage
def clause_rewards(
    *, alpha: float = 1.0, sigma: float = 0.1, delta: float = 1e-6, prior: float = 0.0, rewards: Sequence[float] | None = None
) -> Stage:
    """Replace the reward by two: 1 if every clause of the prompt passes, and the difficulty-weighted sum of the clauses that pass.

    A clause that was not evaluated because an earlier one failed counts as failed.

    Args:
        alpha: See ``clause_weights``.
        sigma: See ``clause_weights``.
        delta: See ``clause_weights``.
        prior: Passes and as many failures that are added to each pass rate; 1 is sensible for groups of at most 8.
        rewards: Weights of the rewards that the batch brings; at most one may differ from 0, since clauses replace it.
    """
    for name, value in (("alpha", alpha), ("sigma", sigma), ("delta", delta), ("prior", prior)):
        at_least(name, value, 0.0)

    def apply(signal: Signal, batch: RewardBatch) -> Signal:
        passed, valid = need(batch, "clauses", "clause_rewards"), need(batch, "clauses_valid", "clause_rewards")
        used = [w for w in (rewards or [1.0] * signal.x.shape[1]) if w != 0]
        if len(used) > 1:
            raise ValueError(
                f"clause_rewards: got {len(used)} rewards with a weight, but the clauses replace them; give the others weight 0"
            )
        known = torch.nan_to_num(passed)
        outside = (known < 0) | (known > 1)
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise ValueError(f"clauses[{row}, {column}]: got {known[row, column].item():g}, needed 0 (failed) to 1 (passed)")
        scored = ~torch.isnan(signal.x).all(1, keepdim=True)
        stats, rate, has = _pass_rates(known, valid, scored, batch, prior)
        weights = stats.rows(clause_weights(rate, has, alpha=alpha, sigma=sigma, delta=delta))
        asked = stats.rows(has)
        strict = torch.where(asked, known >= 1, True).all(1).double()
        dense = (weights * torch.where(asked, known, 0.0)).sum(1)
        x = torch.where(scored, torch.stack([strict, dense], 1), torch.nan)
        return replace(signal, x=x).note(strict=float(strict.mean()) if len(strict) else 0.0)

    return pure(
        Signature(rewards="several", rows="sample", phase="reward", refuses=FACTORS, adds="shaped"),
        apply,
        needs=("clauses", "clauses_valid"),
    )


def _pass_rates(passed: Tensor, valid: Tensor, scored: Tensor, batch: RewardBatch, prior: float) -> tuple[SegmentStats, Tensor, Tensor]:
    stats = segment_stats(torch.where(scored, passed, torch.nan), batch.group_id)
    rate = (torch.nan_to_num(stats.mean) * stats.count + prior) / (stats.count + 2 * prior).clamp(min=1)
    has = segment_stats(valid.double(), batch.group_id).maximum > 0
    return stats, rate, has


STAGES: Sequence[Callable[..., Stage]] = (clause_rewards,)
"""For ``stages.STAGES``."""
