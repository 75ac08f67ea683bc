"""Out of memory: said once, with what helps in the phase in which it happened."""

from __future__ import annotations

from collections.abc import Sequence

ADVICE = {
    "rollout": "lower train.rollout_batch_size; pipeline.offload: true takes text encoders and autoencoder off the device, pipeline.vae_slicing: true "
    "decodes image by image",
    "reward": "lower the reward's batch_size, load it in bfloat16, or let another device score (type: remote)",
    "train": "lower train.micro_batch_size, which changes nothing beyond rounding; pipeline.gradient_checkpointing: true keeps fewer activations",
}
ALWAYS = "smaller pictures (pipeline.height, pipeline.width) and pipeline.dtype: bfloat16 help everywhere"


class Exhausted(ValueError):
    """The device's memory does not suffice; the message says what helps."""


def exhausted(error: BaseException, step: int, phases: Sequence[str]) -> Exhausted:
    """Say where memory ran out and what helps.

    Args:
        error: What the device said.
        step: The step.
        phases: The phases of the step in which it happened, the innermost last.
    """
    where = next((name for name in reversed(phases) if name in ADVICE), None)
    advice = [*([] if where is None else [ADVICE[where]]), ALWAYS]
    return Exhausted(f"step {step}, {where or 'a part of it'}: out of memory ({_said(error)}). What helps: {'; '.join(advice)}")


def advise(error: BaseException) -> str:
    """Say what helps where memory runs out outside of training."""
    return (
        f"out of memory ({_said(error)}). What helps: a smaller --batch-size (evaluate, sample) or --num-images (doctor); --pipeline.offload true takes "
        f"text encoders and autoencoder off the device, --pipeline.vae_slicing true decodes image by image; {ALWAYS}"
    )


def _said(error: BaseException) -> str:
    return str(error).partition("\n")[0].strip() or "no details"
