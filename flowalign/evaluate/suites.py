"""Suites: prompts to generate images for, and a judge of the images."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

import flowalign.shapes as shapes
from flowalign.core.randomness import key
from flowalign.evaluate.records import Evaluation, Record
from flowalign.rewards.parts import cut, scores_alone
from flowalign.rewards.pixels import to_bytes
from flowalign.shapes.prompts import meaning
from flowalign.shapes.verifier import CLAUSES

Generate = Callable[[list[str], list[tuple[int, int]]], Tensor]
"""Makes images ``[batch, 3, h, w]`` in [0, 1] from prompts and, for each image, two numbers that its noise must depend on alone."""


Score = Callable[[Tensor, list[str], list[dict[str, Any]]], Mapping[str, Tensor]]
"""Scores images ``[batch, 3, h, w]`` against prompts and records: names to values ``[batch]``, NaN where one could not be computed.

It is given all images of a prompt in one call, unless it says ``scores_alone`` (:mod:`flowalign.rewards.parts`).
"""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt of a suite.

    Attributes:
        id: Stable id, from :func:`prompt_id`.
        text: What the model is given.
        tag: Kind of the prompt; the macro mean is over tags.
        metadata: What the judge is given.
        meaning: Equal for prompts that ask for the same thing; None where the suite does not know.
    """

    id: int
    text: str
    tag: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    meaning: str | None = None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a suite says of one image; see :class:`flowalign.evaluate.records.Record`."""

    strict: bool | None = None
    graded: float | None = None
    scores: dict[str, float | None] = field(default_factory=dict)
    clauses: dict[str, bool] = field(default_factory=dict)
    reason: str = ""


class Suite(Protocol):
    """A benchmark."""

    @property
    def name(self) -> str:
        """Name, with whatever makes two runs comparable."""

    @property
    def images_per_prompt(self) -> int:
        """How many images each prompt gets."""

    @property
    def headline(self) -> str:
        """Name of the measure that the suite is known by."""

    def prompts(self) -> list[Prompt]:
        """Return the prompts, always the same ones."""

    def judge(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Judgement]:
        """Judge a batch of images: all images of each prompt, or any where the suite says ``scores_alone`` (:mod:`flowalign.rewards.parts`)."""


@dataclass(frozen=True, kw_only=True)
class ShapesSuite:
    """The suite of the embedded world: GenEval's six tags, judged by a verifier without learned weights.

    Attributes:
        split: Held-out meanings, which no training has seen, or training meanings.
        seed: Chooses the prompts where ``num_prompts`` leaves a choice.
        num_prompts: How many prompts, the tags in equal shares as far as they go; None for all there are.
        images_per_prompt: How many images each prompt gets.
        score: From images, prompts and their records to further scores by name, for example rewards; NaN where one could not be computed.
    """

    split: Literal["heldout", "train"] = "heldout"
    seed: int = 0
    num_prompts: int | None = None
    images_per_prompt: int = 4
    score: Score | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Return ``shapes/heldout``."""
        return f"shapes/{self.split}"

    @property
    def headline(self) -> str:
        """Everything that was asked for."""
        return "strict"

    @property
    def scores_alone(self) -> bool:
        """Whether the further scores are of each image by itself; the verifier's are."""
        return self.score is None or scores_alone(self.score)

    def prompts(self) -> list[Prompt]:
        """Return the prompts of the split."""
        return [
            Prompt(
                id=prompt_id(metadata),
                text=metadata["prompt"],
                tag=metadata["tag"],
                metadata=metadata,
                meaning=meaning(metadata),
            )
            for metadata in shapes.prompts(self.split, seed=self.seed, num=self.num_prompts)
        ]

    def judge(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Judgement]:
        """Judge images with the verifier."""
        verdict = shapes.verify(images, [dict(prompt.metadata) for prompt in prompts])
        columns = zip(
            verdict.strict.tolist(),
            verdict.graded.tolist(),
            verdict.clauses.tolist(),
            verdict.clauses_valid.tolist(),
            strict=True,
        )
        found = [{}] * len(prompts) if self.score is None else scores_of(self.score, images, prompts)
        judgements = []
        for row, (strict, graded, holds, is_asked) in enumerate(columns):
            clauses = {n: bool(h) for n, h, asked in zip(CLAUSES, holds, is_asked, strict=True) if asked}
            reason = "; ".join(f"{name}: wrong" for name, good in clauses.items() if not good)
            judgements.append(Judgement(strict=bool(strict), graded=float(graded), scores=found[row], clauses=clauses, reason=reason))
        return judgements

    def reference(self, *, seed: int) -> Tensor:
        """Draw fresh images of the suite's prompts, ``images_per_prompt`` of each, in the order of an evaluation's records."""
        metadata = [dict(p.metadata) for p in self.prompts() for _ in range(self.images_per_prompt)]
        return shapes.render(metadata, seed)


def scores_of(score: Score, images: Tensor, prompts: Sequence[Prompt]) -> list[dict[str, float | None]]:
    """Return further scores of each image by name; None where one could not be computed."""
    columns = score(images, [prompt.text for prompt in prompts], [dict(prompt.metadata) for prompt in prompts])
    rows = {name: [None if math.isnan(value) else value for value in values.tolist()] for name, values in columns.items()}
    return [{name: values[i] for name, values in rows.items()} for i in range(len(prompts))]


def names() -> list[str]:
    """Return the names that :func:`suite` knows."""
    return ["shapes", "geneval", "prompts"]


def suite(name: str, **options: Any) -> Suite:
    """Build a suite by name; the options are the fields of its class.

    Raises:
        ValueError: If there is no such suite; the message says the nearest name.
    """
    check_name(name)
    # Imported here: these two stand on this module.
    if name == "shapes":
        return ShapesSuite(**options)
    if name == "geneval":
        from flowalign.evaluate.geneval_suite import GenEvalSuite

        return GenEvalSuite(**options)
    from flowalign.evaluate.prompt_suite import PromptSuite

    return PromptSuite(**options)


def check_name(name: str) -> None:
    """Refuse a suite that there is not.

    Raises:
        ValueError: Says the nearest name.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0)[0]
        raise ValueError(f"suite: got {name!r}, did you mean {near!r}? (known: {', '.join(names())})")


def prompt_id(metadata: Mapping[str, Any]) -> int:
    """Return an id that depends on the metadata alone, not on the suite, its order or its size.

    It has 52 bits, so that every reader of JSON keeps it whole.
    """
    return key("prompt", json.dumps(metadata, sort_keys=True)) % 2**52


def run_suite(
    suite: Suite,
    generate: Generate,
    *,
    batch_size: int = 64,
    seed: int = 0,
    keep_images: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Generate and judge every image of a suite, each exactly once.

    Args:
        suite: The suite.
        generate: Called with the texts and, for each image, ``(noise id, k)``. The noise id is a 63-bit key made of ``seed``
            and the prompt's id, k the number of the image among those of its prompt: noise that is a function of these two does
            not depend on the batch size, the order or the other prompts.
        batch_size: Images in a call of ``generate`` at most. Of a suite that does not say ``scores_alone`` all images of a prompt are judged together.
        seed: Another seed gives all images other noise.
        keep_images: Keep the images in the evaluation, on the CPU, rounded to bytes, for grids and fidelity measures.
        progress: Called with the number of images done and the number of all.

    Returns:
        The evaluation, records in the order of the suite's prompts.

    Raises:
        ValueError: If a size is not positive, the suite has no prompts or one twice, or the images have a wrong shape or range or
            hold values that are not finite.
    """
    if batch_size < 1 or suite.images_per_prompt < 1:
        raise ValueError(f"needed batch_size and images_per_prompt of at least 1, got {batch_size}, {suite.images_per_prompt}")
    prompts = suite.prompts()
    if not prompts:
        raise ValueError(f"{suite.name}: the suite has no prompts")
    if len({prompt.id for prompt in prompts}) != len(prompts):
        raise ValueError(f"{suite.name}: a prompt occurs twice; ask for more images per prompt instead")
    samples = [(prompt, k) for prompt in prompts for k in range(suite.images_per_prompt)]
    parts = cut(range(len(samples)) if scores_alone(suite) else [prompt.text for prompt, _ in samples], batch_size)
    records: list[Record] = []
    kept: list[Tensor] = []
    for part in parts:
        batch = [samples[row] for row in part]
        images = torch.cat([_made(generate, batch[start : start + batch_size], seed) for start in range(0, len(batch), batch_size)])
        judgements = suite.judge(images, [prompt for prompt, _ in batch])
        records += [_record(prompt, k, verdict) for (prompt, k), verdict in zip(batch, judgements, strict=True)]
        if keep_images:
            kept.append(to_bytes(images).cpu())
        if progress is not None:
            progress(len(records), len(samples))
    assert len({(record.id, record.k) for record in records}) == len(samples), "a sample was judged twice or not at all"
    images_of_all = torch.cat(kept) if kept else None
    order = torch.tensor([row for part in parts for row in part]).argsort()
    if order.tolist() != list(range(len(samples))):  # a text stands at several places of the suite
        records = [records[row] for row in order.tolist()]
        images_of_all = None if images_of_all is None else images_of_all[order]
    return Evaluation(suite=suite.name, seed=seed, records=tuple(records), images=images_of_all, headline=suite.headline)


def _made(generate: Generate, batch: Sequence[tuple[Prompt, int]], seed: int) -> Tensor:
    texts = [prompt.text for prompt, _ in batch]
    images = generate(texts, [(key(seed, "evaluate", prompt.id), k) for prompt, k in batch])
    _check(images, texts)
    return images


def _record(prompt: Prompt, k: int, judgement: Judgement) -> Record:
    return Record(
        id=prompt.id,
        prompt=prompt.text,
        tag=prompt.tag,
        meaning=prompt.meaning,
        k=k,
        strict=judgement.strict,
        graded=judgement.graded,
        scores=judgement.scores,
        clauses=judgement.clauses,
        reason=judgement.reason,
    )


def _check(images: Tensor, texts: Sequence[str]) -> None:
    if images.ndim != 4 or images.shape[:2] != (len(texts), 3):
        raise ValueError(f"generate: got images of shape {tuple(images.shape)}, needed ({len(texts)}, 3, height, width)")
    is_finite = torch.isfinite(images).flatten(1).all(1).tolist()
    if not all(is_finite):
        raise ValueError(f"generate: the image of {texts[is_finite.index(False)]!r} holds values that are not finite")
    low, high = float(images.min()), float(images.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"generate: got values from {low:.3g} to {high:.3g}, needed [0, 1] (decoded images, not latents)")
