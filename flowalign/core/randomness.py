"""Randomness as a function: every draw is named by (seed, purpose, step, prompt, sample) and depends on nothing else.

So results do not change with the batch size, the number of ranks or an interruption.
"""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def key(*parts: int | str) -> int:
    """Hash integers and strings to 63 bits, the same on every platform and in every process.

    Raises:
        TypeError: If a part is neither, such as a tensor or a numpy integer.

    Examples:
        >>> key(0, "noise") == key(0, "noise"), key(0, "noise") == key("0", "noise")
        (True, False)
    """
    for part in parts:
        if not isinstance(part, int | str):
            raise TypeError(f"key: got {part!r} of type {type(part).__name__}, needed int or str (for a tensor or numpy number: int(...))")
    # Each part carries its type and length, so that ("ab", "c") and ("a", "bc") differ, and 1 and "1".
    text = "".join(f"{'i' if isinstance(part, int) else 's'}{len(str(part))}:{part};" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator that is seeded by the hash of its name.

    torch's CPU generator keeps 32 bits of a seed, so two names share a stream with probability 2**-32.
    """
    return torch.Generator().manual_seed(key(*parts))


def normal(
    shape: Sequence[int],
    *,
    seed: int,
    purpose: str,
    step: int,
    prompts: Int[Tensor, " batch"],
    samples: Int[Tensor, " batch"],
) -> Float[Tensor, "batch *event"]:
    """Draw standard normal noise whose rows are keyed one by one.

    Args:
        shape: Event shape of one row.
        seed: Seed of the run.
        purpose: What the noise is for; different purposes are independent.
        step: Step of the run.
        prompts: Id of each row's prompt.
        samples: Number of each row among the samples of its prompt.

    Returns:
        float32 on the CPU, ``[batch, *shape]``. Row i depends only on (seed, purpose, step, prompts[i], samples[i]).

    Raises:
        ValueError: If there are not as many samples as prompts.

    Examples:
        >>> ids = torch.tensor([5, 9])
        >>> both = normal((2,), seed=0, purpose="x", step=0, prompts=ids, samples=torch.tensor([0, 1]))
        >>> one = normal((2,), seed=0, purpose="x", step=0, prompts=ids[1:], samples=torch.tensor([1]))
        >>> torch.equal(both[1:], one)
        True
    """
    if prompts.shape != samples.shape:
        raise ValueError(f"prompts and samples: got {len(prompts)} and {len(samples)} rows, needed one each")
    rows = torch.empty(len(prompts), *shape)
    for row, prompt, number in zip(rows, prompts.tolist(), samples.tolist(), strict=True):
        row.normal_(generator=generator(seed, purpose, step, prompt, number))
    return rows


def uniform(*, seed: int, purpose: str, step: int, stratum: int = 0) -> float:
    """Draw one number in [0, 1), keyed like everything else."""
    # 53 bits divide exactly; a 63-bit integer could round up to 1.
    return (key(seed, purpose, step, stratum) >> 10) / 2**53
