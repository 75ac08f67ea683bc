"""GenEval as a reward: objects, numbers, colours and positions, found by Mask2Former and CLIP; 0 or 1, or graded in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flowalign.rewards import clip, pixels
from flowalign.rewards.geneval_detector import Detection, Detector
from flowalign.rewards.geneval_detector import load as load_detector
from flowalign.rewards.geneval_prompts import CLASSES, COLORS, check_record
from flowalign.rewards.geneval_rules import CLAUSES, MAX_OBJECTS, Found, Verdict, clause_rows, judge, kept, threshold
from flowalign.rewards.scored import RewardScores
from flowalign.rewards.weights import weights_name

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = 0x99 / 255  # behind an object whose colour is asked for
Measure = Literal["official", "strict", "graded", "graded_flow_grpo"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """GenEval's judge. Not verified with the published weights.

    Attributes:
        measure: Which verdict is the reward: "official" (GenEval's "correct"), "strict" (every number exact), "graded" (ours, in [0, 1]) or
            "graded_flow_grpo" (as published, with its defects). Training on one says nothing of the others: log them as metrics.
        detector: Folder or hub id of a Mask2Former for COCO instances. Meta's weights are not those of the original GenEval, and their
            scores not its scores; ``flowalign geneval convert`` makes a folder of the original checkpoint.
        clip: Folder or hub id of the CLIP that names colours.
        batch_size: Images of one forward of the detector.
        dtype: What the detector computes in; CLIP computes in float32.
        device: Null for the accelerator, where there is one.

    References:
        Ghosh et al., "GenEval", 2023, https://arxiv.org/abs/2310.11513.
    """

    measure: Measure = "graded"
    detector: str = "facebook/mask2former-swin-small-coco-instance"
    clip: str = "openai/clip-vit-large-patch14"
    batch_size: int = 4
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None

    def build(self) -> GenEval:
        """Load both models."""
        detector = load_detector(self.detector, dtype=self.dtype, device=self.device, batch_size=self.batch_size)
        loaded = clip.load(self.clip, None, "geneval: clip", dtype="float32", device=self.device, batch_size=16)
        return GenEval(self, detector, ColorNamer(loaded))


class ColorNamer:
    """Names the colour of objects with CLIP, zero-shot.

    Raises:
        ValueError: If the model computes GELU: OpenAI's CLIP was trained with QuickGELU, and with GELU it names colours worse.
    """

    def __init__(self, model: clip.Clip) -> None:
        """Check the model; text weights are made when a class is first met."""
        for tower in ("text_config", "vision_config"):
            activation = getattr(model.model.config, tower).hidden_act
            if activation != "quick_gelu":
                raise ValueError(f"geneval: clip: its {tower} has hidden_act {activation!r}, needed 'quick_gelu' as in OpenAI's CLIP")
        self.clip = model
        self._classifiers: dict[str, Tensor] = {}

    def classifier(self, name: str) -> Tensor:
        """Return a class's text weights ``[10, d]``: for each colour the mean of the unit embeddings of three phrases, of length one."""
        if name not in self._classifiers:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            rows = self.clip.texts(texts).reshape(len(COLORS), len(TEMPLATES), -1)
            self._classifiers[name] = clip.unit(rows.mean(1))
        return self._classifiers[name]

    def __call__(self, crops: Sequence[Tensor], names: Sequence[str]) -> list[str]:
        """Name the colours of objects, ``[3, h, w]`` each, of a class each; they share forwards, whatever their classes and images."""
        seen = self.clip.of_any_size(crops)
        rows = torch.stack([self.classifier(name) for name in names])
        return [COLORS[index] for index in (rows @ seen[:, :, None]).squeeze(2).argmax(1).tolist()]


def crop(image: Tensor, found: Detection) -> Tensor:
    """Cut an object out of an image ``[3, h, w]``: its box, with everything outside its mask made grey."""
    left, top, right, bottom = (round(side) for side in found.box)
    flat = torch.where(found.mask.to(image.device), image, torch.full_like(image, GREY))
    return flat[:, top : max(bottom, top + 1), left : max(right, left + 1)]


@dataclass(frozen=True)
class GenEval:
    """See ``Config``."""

    config: Config
    detector: Detector
    color_of: ColorNamer = field(repr=False)
    scores_alone: ClassVar[bool] = True
    clause_names: ClassVar[tuple[str, ...]] = CLAUSES

    @property
    def detector_name(self) -> str:
        """Name the detector's weights."""
        return weights_name(self.config.detector)

    @property
    def clip_name(self) -> str:
        """Name the weights that name colours."""
        return weights_name(self.config.clip)

    def check(self, record: Mapping[str, Any]) -> None:
        """Refuse a prompt's record that cannot be judged, before anything is sampled."""
        check_record(record)

    def verdicts(self, images: Tensor, metadata: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """Judge images ``[batch, 3, h, w]`` in [0, 1] against GenEval metadata.

        Raises:
            ValueError: If a record is not GenEval's, or images are not in [0, 1].
        """
        pixels.check(images, metadata, "geneval")
        for row, record in enumerate(metadata):
            try:
                check_record(record)
            except ValueError as error:
                raise ValueError(f"geneval: sample {row} (prompt {record.get('prompt')!r}): {error}") from error
        labels = [
            [CLASSES.index(clause["class"]) for part in ("include", "exclude") for clause in record.get(part, ())] for record in metadata
        ]
        found = self.detector(images, labels, [threshold(record["tag"]) for record in metadata])
        asked = [self._colored(record, detections) for record, detections in zip(metadata, found, strict=True)]
        crops = [crop(image, one) for image, some in zip(images, asked, strict=True) for one in some]
        names = [CLASSES[one.label] for some in asked for one in some]
        colors = iter(self.color_of(crops, names) if crops else ())
        named = [{id(one): next(colors) for one in some} for some in asked]
        return [judge(record, _objects(some, colored, record["tag"])) for record, some, colored in zip(metadata, found, named, strict=True)]

    def _colored(self, record: Mapping[str, Any], found: Sequence[Detection]) -> list[Detection]:
        """Choose the objects whose colour is asked for, at most those that GenEval looks at of each class."""
        wanted = {clause["class"] for clause in record["include"] if "color" in clause}
        return [one for name in sorted(wanted) for one in [one for one in found if CLASSES[one.label] == name][:MAX_OBJECTS]]

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> RewardScores:
        """Score images ``[batch, 3, h, w]`` in [0, 1] against GenEval metadata."""
        verdicts = self.verdicts(images, metadata)
        values = {
            "official": [verdict.official for verdict in verdicts],
            "strict": [verdict.strict for verdict in verdicts],
            "graded": [verdict.graded for verdict in verdicts],
            "graded_flow_grpo": [verdict.graded_flow_grpo for verdict in verdicts],
        }[self.config.measure]
        holds, asked = clause_rows(verdicts)
        return RewardScores(
            values={self.config.measure: torch.tensor(values, dtype=torch.float64)},
            clauses=torch.tensor(holds, dtype=torch.float64),
            clauses_valid=torch.tensor(asked, dtype=torch.bool),
        )


def _objects(found: Sequence[Detection], colors: Mapping[int, str], tag: str) -> dict[str, list[Found]]:
    """Lay an image's objects out by class, as the rules want them: highest score first, and no more than had their colours named."""
    objects: dict[str, list[Found]] = {}
    for one in found:
        objects.setdefault(CLASSES[one.label], []).append(Found(box=one.box, score=one.score, color=colors.get(id(one))))
    return {name: kept(rows, tag) for name, rows in objects.items()}
