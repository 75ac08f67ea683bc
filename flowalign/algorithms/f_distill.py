"""f-distill: distribution matching with any f-divergence, one weight of the density ratio away from DMD2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from flowalign.core.algorithm import NeverReady, Rows
from flowalign.core.distillation import Settings, State
from flowalign.core.distiller import Distiller, level_edges
from flowalign.core.ratios import RatioWeights, Reduce, bins_of, density_weights, is_calibrated, log_ratio_of, start_calibration


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Distil the pipeline into a student of one or a few steps; see the settings that all distillations share.

    Attributes:
        weights: The divergence, and how its weights are made of density ratios.
        weigh_guidance: Weigh what the teacher's guidance adds as well. The ratio is that of the guided teacher's samples, so that in theory it
            belongs to the whole direction; decoupled distribution matching weighs and schedules matching alone, which is the default.
    """

    weights: RatioWeights = field(default_factory=RatioWeights)
    weigh_guidance: bool = False

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        super().__post_init__()
        if self.adversarial_weight == 0:
            raise ValueError(
                "adversarial_weight: got 0, but f_distill reads density ratios off the discriminator; needed more, or algorithm dmd2"
            )

    def build(self) -> FDistill:
        """Make the algorithm."""
        return FDistill(self)


@dataclass(frozen=True)
class FDistill(Distiller):
    """See ``Config``.

    References:
        Xu et al., "One-step Diffusion Models with f-Divergence Distribution Matching", 2025, https://arxiv.org/abs/2502.15681, algorithm 1.
        Deviations: the discriminator compares with the teacher's own samples and not with a dataset, so that without guidance its ratio is the one that
        the theory asks for; guidance is pushed apart from matching and not weighted unless told (see ``weigh_guidance``); noise levels are binned by
        quantiles; the mean ratio of a bin runs over about ten batches (released: the batch's own, or 0.5); the critics begin alone, until the ratio is calibrated.
    """

    config: Config

    @property
    def weighs_batch(self) -> bool:
        """Ratios are calibrated and weights normalised over it; with reverse KL, whose weights are 1, they are still measured."""
        return True

    @property
    def weighs_guidance(self) -> bool:
        """As configured."""
        return self.config.weigh_guidance

    def start(self) -> State:
        """The running mean ratio of each bin of noise levels."""
        return {"calibration": start_calibration(self.config.weights.num_bins)}

    def is_ready(self, state: State, held_back: int) -> bool:
        """Let the student begin once every bin's mean ratio is within a factor of 2 of 1, after the critics' own steps.

        Where weights do not depend on the ratio (reverse KL, strength 0) it need not be calibrated, and the run is DMD2's.

        Raises:
            NeverReady: If it was held back for longer than ``patience``.
        """
        config = self.config
        if config.weights.divergence == "reverse_kl" or config.weights.strength == 0:
            return super().is_ready(state, held_back)
        alone = held_back - config.warmup_steps
        calibrated = is_calibrated(state["calibration"])
        if alone >= config.least_steps and calibrated:
            return True
        if alone >= config.patience:
            means = ", ".join(f"{value:.2f}" for value in state["calibration"][0].tolist())
            raise NeverReady(
                f"f_distill: in {alone} steps of the critics alone the density ratio was not calibrated (mean ratios by noise level {means}, needed 0.5 to 2), "
                "so the student never moved after its warm-up; warm the student up for longer, or go on in another folder (--from RUN) with a lower "
                "discriminator.learning_rate, a higher discriminator.r1 or more patience; algorithm dmd2 needs no ratio"
            )
        return False

    def weigh(self, parts: Sequence[Rows], state: State, reduce: Reduce) -> tuple[list[Rows], State, dict[str, float]]:
        """Weigh each sample by h of its density ratio, normalised over the whole batch."""
        if "student" not in parts[0].columns:
            return list(parts), state, {}
        settings = self.config.weights
        log_ratio = log_ratio_of(torch.cat([part["logits"] for part in parts])).cpu()
        bins = bins_of(torch.cat([part["sigma"] for part in parts]).cpu(), level_edges(self.config, max(1, settings.num_bins)))
        if settings.num_bins == 0:
            bins = torch.zeros_like(bins)
        found = density_weights(log_ratio, bins, state["calibration"], settings, reduce=reduce)
        sizes = [len(part) for part in parts]
        weighed = [
            replace(part, columns={**part.columns, "weight": weight.to(part["scale"])})
            for part, weight in zip(parts, found.weight.split(sizes), strict=True)
        ]
        logged = {f"ratio/{name}": value for name, value in found.stats.items()}
        logged |= {f"ratio/bin_{number}": value for number, value in enumerate(found.calibration[0].tolist())}
        return weighed, {"calibration": found.calibration}, logged
