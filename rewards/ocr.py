"""Whether the wanted text stands in the image, read by RapidOCR or Tesseract; in [0, 1], higher is better."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from flowalign.plugins import require
from flowalign.rewards import letters, pixels

Form = Literal["edit", "flow_grpo", "exact"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compares what is read, case and spaces aside, with a wanted text: the record's ``target_text``, else what the prompt quotes first.

    Attributes:
        engine: "rapidocr" (offline, PP-OCRv6 small: Latin, Greek, Chinese and Japanese; a wanted text in other letters is refused) or "tesseract"
            (the program must be installed). Published numbers were read by PaddleOCR 2.9.1; another engine needs a base row of its own.
        form: "edit", ``1 - edits / longer length``; "flow_grpo", ``1 - min(edits, n) / n`` with n letters wanted, and 1 wherever the wanted
            text stands inside what is read, so that any further text is free; "exact", 1 or 0.
        side: RapidOCR looks for text at this many pixels of the longer side; its own default enlarges small images, 30 times slower and worse.
        language: Tesseract's language.
        sparse: Tesseract: look for words anywhere (page mode 11) instead of one line (7).
        threads: RapidOCR's threads of one image.

    References:
        The form "flow_grpo": Liu et al., "Flow-GRPO", 2025, https://arxiv.org/abs/2505.05470, section 5.1.
    """

    engine: Literal["rapidocr", "tesseract"] = "rapidocr"
    form: Form = "edit"
    side: int = 320
    language: str = "eng"
    sparse: bool = True
    threads: int = 1

    def build(self) -> OCR:
        """Load the engine."""
        return OCR(self, _RapidOCR(self) if self.engine == "rapidocr" else _Tesseract(self))


class Engine(Protocol):
    """Reads text off images."""

    def read(self, array: np.ndarray) -> list[str]:
        """Return the lines of an RGB byte array ``[h, w, 3]``, from top to bottom and left to right."""

    def unknown(self, text: str) -> list[str]:
        """Return the letters of a text that the engine never reads."""

    @property
    def remedy(self) -> str:
        """What to do about them."""


@dataclass(frozen=True)
class OCR:
    """See ``Config``."""

    config: Config
    engine: Engine
    scores_alone: ClassVar[bool] = True

    def check(self, record: dict[str, Any]) -> None:
        """Refuse a prompt's record that wants no text, or one that the engine cannot read, before anything is sampled."""
        wanted = target_of(record.get("prompt", ""), record)
        unknown = self.engine.unknown(normal(wanted))
        if unknown:
            raise ValueError(f"the wanted text {wanted!r} holds {', '.join(map(repr, unknown))}, which {self.engine.remedy}")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Score images ``[batch, 3, h, w]`` in [0, 1].

        Raises:
            ValueError: If a prompt says nowhere what is to be written.
        """
        pixels.check(images, prompts, "ocr")
        targets = [target_of(prompt, record) for prompt, record in zip(prompts, metadata, strict=True)]
        texts = ["".join(self.engine.read(array)) for array in pixels.arrays(images)]
        scores = [agreement(read, wanted, self.config.form) for read, wanted in zip(texts, targets, strict=True)]
        return torch.tensor(scores, dtype=torch.float64)


def target_of(prompt: str, record: dict[str, Any]) -> str:
    """Return the text that a prompt wants written.

    Raises:
        ValueError: If there is none.

    Examples:
        >>> target_of('a sign that says "Open late"', {})
        'Open late'
    """
    quoted = re.search(r'"([^"]+)"|\u201c([^\u201d]+)\u201d', prompt)
    text = record.get("target_text", quoted and (quoted[1] or quoted[2]))
    if not isinstance(text, str) or not normal(text):
        raise ValueError(
            f"ocr: prompt {prompt!r} wants no text; quote it in the prompt (a sign that says \"Open\") or give the record a 'target_text'"
        )
    return text


def normal(text: str) -> str:
    """Return a text without spaces, in lower case, composed letters as one character."""
    return "".join(unicodedata.normalize("NFKC", text).lower().split())


def agreement(read: str, wanted: str, form: Form) -> float:
    """Score what was read against what was wanted.

    Examples:
        >>> [agreement(text, "Hello World", "flow_grpo") for text in ("hello world", "Helo World", "xxHello Worldyy", "")]
        [1.0, 0.9, 1.0, 0.0]
        >>> agreement("xxHello Worldyy", "Hello World", "edit") < 0.8
        True
    """
    read, wanted = normal(read), normal(wanted)
    if form == "exact":
        return float(read == wanted)
    if form == "flow_grpo":
        edits = 0 if wanted in read else min(edit_distance(read, wanted), len(wanted))
        return 1 - edits / len(wanted)
    return 1 - edit_distance(read, wanted) / max(len(read), len(wanted))


def edit_distance(one: str, two: str) -> int:
    """Return Levenshtein's distance: insertions, deletions and replacements.

    Examples:
        >>> edit_distance("kitten", "sitting")
        3
    """
    row = list(range(len(two) + 1))
    for i, letter in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(two, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


def reading_order(boxes: np.ndarray) -> list[int]:
    """Return the order of boxes ``[n, 4, 2]``: rows from top to bottom (a row is what overlaps by half its height), left to right in each."""
    tops, bottoms, lefts = boxes[:, :, 1].min(1), boxes[:, :, 1].max(1), boxes[:, :, 0].min(1)
    rows: list[list[int]] = []
    for index in np.argsort(tops, kind="stable").tolist():
        last = rows[-1][0] if rows else None
        if last is not None and min(bottoms[index], bottoms[last]) - tops[index] > 0.5 * min(
            bottoms[index] - tops[index], bottoms[last] - tops[last]
        ):
            rows[-1].append(index)
        else:
            rows.append([index])
    return [index for row in rows for index in sorted(row, key=lambda i: lefts[i])]


class _RapidOCR:
    remedy = "RapidOCR's model does not know; take engine: tesseract with a language that has them"

    def __init__(self, config: Config) -> None:
        require("onnxruntime", "ocr")
        self.engine = require("rapidocr", "ocr").RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.use_cls": False,
                "Det.limit_type": "max",
                "Det.limit_side_len": config.side,
                "EngineConfig.onnxruntime.intra_op_num_threads": config.threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )
        # The network that reads is loaded when it is needed first, and with it the table of what it knows.
        self.engine(np.zeros((48, 48, 3), np.uint8), use_det=False)
        self.table = frozenset(letter for entry in self.engine.text_rec.postprocess_op.character for letter in normal(entry))

    def unknown(self, text: str) -> list[str]:
        # Letters, marks and digits; punctuation that is never read costs little of a score.
        return [letter for letter in dict.fromkeys(text) if unicodedata.category(letter)[0] in "LMN" and letter not in self.table]

    def read(self, array: np.ndarray) -> list[str]:
        found = self.engine(np.ascontiguousarray(array[:, :, ::-1]), use_det=True)  # it takes arrays as BGR
        if found.txts is None:
            return []
        return [found.txts[index] for index in reading_order(np.asarray(found.boxes, dtype=np.float64))]


class _Tesseract:
    remedy = "Tesseract does not read in language 'eng'; set language"

    def __init__(self, config: Config) -> None:
        self.tesseract = require("pytesseract", "tesseract")
        try:
            languages = self.tesseract.get_languages()
        except self.tesseract.TesseractNotFoundError as error:
            raise FileNotFoundError("ocr: the program tesseract is not installed; run: apt install tesseract-ocr") from error
        if config.language not in languages:
            raise FileNotFoundError(
                f"ocr: tesseract lacks the language {config.language!r}; run: apt install tesseract-ocr-{config.language}"
            )
        self.language, self.options = config.language, f"--psm {11 if config.sparse else 7}"

    def unknown(self, text: str) -> list[str]:
        return letters.foreign(text) if self.language == "eng" else []

    def read(self, array: np.ndarray) -> list[str]:
        text = self.tesseract.image_to_string(array, lang=self.language, config=self.options)
        return [line for line in text.splitlines() if line.strip()]
