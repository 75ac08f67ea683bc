"""A fingerprint of a base: tells whether a LoRA meets the weights that it was trained on, whatever the folder is called."""

from __future__ import annotations

import hashlib

import torch

from flowalign.pipelines.bare import unadapted
from flowalign.pipelines.roles import Roles

_TENSORS = 24  # enough that some are of the attention, which is all that a merged LoRA changes
_VALUES = 4096  # of each tensor


def fingerprint(roles: Roles) -> str:
    """Return a hash over values of some of the base's matrices.

    Values are rounded to bfloat16 first, so that a base in float32 and the same in bfloat16 agree, on every device. Float16 rounds otherwise: a base
    that was published in float32 and loaded in float16 may have another fingerprint.

    Args:
        roles: Of the network; adapters, and which layers have one, make no difference.
    """
    matrices = {name: value for name, value in unadapted(dict(roles.module.named_parameters())).items() if value.dim() > 1}
    digest = hashlib.sha256()
    # Ordered by the hash of their names: every so many of the sorted ones could be the same layer of each block.
    for name in sorted(matrices, key=lambda name: hashlib.sha256(name.encode()).digest())[:_TENSORS]:
        values = matrices[name].detach().flatten()
        picked = values[:: max(1, len(values) // _VALUES)].cpu().float().bfloat16()
        digest.update(name.encode())
        digest.update(picked.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]
