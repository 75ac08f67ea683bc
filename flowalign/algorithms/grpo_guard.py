"""GRPO-Guard: Flow-GRPO with a ratio that is centred and has the same scale at every step, so that clipping acts alike everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from flowalign.core.plans import chain
from flowalign.core.policy import PolicyConfig, PolicyGradient
from flowalign.core.ratio_links import CentredClip
from flowalign.core.step_weights import inverse_step


@dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig):
    """GRPO-Guard (Wang et al., 2025); use it with an estimator that divides by the std of the group, such as grpo.

    References:
        Wang et al., "GRPO-Guard", 2025, https://arxiv.org/abs/2510.22319, and its released code: no KL, clip 2e-6 (GenEval, OCR) or
        4e-6 (PickScore), loss over the step size. Deviation: the bias that is added back is that of each row.

    Attributes:
        clip: Clip of the centred ratio ``exp(<noise, change of the mean> / elements)``.
    """

    kl_penalty: float = 0.0
    clip: float = 2e-6

    def build(self) -> PolicyGradient:
        """Make the algorithm.

        Raises:
            ValueError: If the log-prob is not the density, whose bias is what is removed.
        """
        if self.log_prob != "gaussian":
            raise ValueError("log_prob: got 'unit', but the bias that grpo_guard removes is that of the density; use gaussian")
        kernel = self.built_kernel()
        return PolicyGradient(
            config=self,
            kernel=kernel,
            plan_of=lambda step, num_steps, seed: chain(kernel, num_steps),
            link=CentredClip(clip=self.clip),
            step_weight=inverse_step,
        )
