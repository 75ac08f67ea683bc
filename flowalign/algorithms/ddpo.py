"""DDPO: the policy gradient over DDIM's transitions with full noise, from which the flow methods descend."""

from __future__ import annotations

from dataclasses import dataclass

from flowalign.core.kernels import DDIM
from flowalign.core.plans import chain
from flowalign.core.policy import KernelName, PolicyConfig, PolicyGradient
from flowalign.core.ratio_links import PPOClip


@dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig):
    """DDPO (Black et al., 2023), for variance-preserving models in the coordinates of the straight path, and for flow models.

    `flowalign.core.paths.vp_to_flow` makes a variance-preserving sampler with eta one of these transitions, with the same noise and, because
    it only rescales states, the same ratios. Use it with per-prompt statistics that outlive the step, for example the stages
    ``[combine_rewards, center_by_running_mean, ...]``, or with grpo.

    References:
        Black et al., "Training Diffusion Models with Reinforcement Learning", 2023, https://arxiv.org/abs/2305.13301, DDPO-IS, and the
        reference PyTorch code (1958463): eta 1, clip 1e-4 of means over latent elements, no KL.
        Deviations: all steps but the last, whose noise is 0, are trained, as one batch instead of in an order shuffled for each sample.

    Attributes:
        clip: PPO clip of the ratio of mean log-probs, a mean over latent elements.
    """

    kernel: KernelName = "ddim"
    kl_penalty: float = 0.0
    clip: float = 1e-4

    def build(self) -> PolicyGradient:
        """Make the algorithm.

        Raises:
            ValueError: If the kernel is not DDIM.
        """
        kernel = self.built_kernel()
        if not isinstance(kernel, DDIM):
            raise ValueError(f"kernel: got {self.kernel}, but ddpo is the policy gradient of DDIM's transitions; for others use flow_grpo")
        return PolicyGradient(
            config=self, kernel=kernel, plan_of=lambda step, num_steps, seed: chain(kernel, num_steps), link=PPOClip(clip=self.clip)
        )
