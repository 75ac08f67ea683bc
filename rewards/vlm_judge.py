"""A vision-language model as judge, behind any OpenAI-compatible server; a rating or P(yes) in [0, 1], higher is better."""

from __future__ import annotations

import base64
import ipaddress
import json
import math
import os
import re
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

from flowalign.images import png_bytes
from flowalign.rewards import pixels
from flowalign.rewards.http import Answer, Client

RATING = (
    "Does the image show what this caption says, and is it a good picture? Caption: {prompt}\n"
    'Answer with JSON only: {"score": N}, where N is a number from {low} (bad) to {high} (perfect).'
)
YES_NO = "Does this image show the following? {prompt}\nAnswer yes or no."
OPENAI_TOKEN = "OPENAI_API_KEY"


def is_safe(url: str) -> bool:
    """Tell whether nobody can read what is sent to an address on the way: it is encrypted, or never leaves this machine.

    Examples:
        >>> [is_safe(url) for url in ("https://api.openai.com/v1", "http://127.0.0.1:8000/v1", "http://[::1]/v1", "http://10.0.0.2/v1")]
        [True, True, True, False]
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        is_here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        is_here = False
    return parts.scheme == "https" or is_here


@dataclass(frozen=True, kw_only=True)
class Config:
    """Asks a judge about every image at temperature 0.

    An answer that cannot be read makes the sample invalid (NaN, so ``may_skip: true`` belongs beside this reward), never 0; more than
    ``max_invalid`` of them among the last ``window`` answers, over all calls, stop the run.

    Attributes:
        model: The model's name at the server.
        url: Base address, with the version: ``http://127.0.0.1:8000/v1`` for vLLM and SGLang.
        answer: "rating" asks for JSON ``{"score": N}`` and scales N to [0, 1]; "yes_no" is P(yes) / (P(yes) + P(no)) of the first token, for
            which the server must return log-probabilities.
        question: The question, with ``{prompt}`` (and ``{low}``, ``{high}``) in it; all other braces stay as they are. Null for ours.
        low, high: Ends of the rating.
        structured: Ask the server to enforce the JSON schema; false for servers that cannot.
        image_side: Images are scaled down to this many pixels of the longer side; null sends them as they are.
        max_tokens: Of an answer.
        concurrency: Requests at a time.
        deadline_s: Of one answer, with all retries.
        token_variable: Environment variable that holds the server's token, which is sent to ``url`` whatever it is. Null for OPENAI_API_KEY, which many
            have set for another server: it is sent over https and to this machine, never in the clear to others.
        max_invalid: Share of answers that may be unreadable.
        window: Answers over which that share is taken: the last so many, all as long as there are fewer, and at least those of the call at hand.
    """

    model: str
    url: str = "http://127.0.0.1:8000/v1"
    answer: Literal["rating", "yes_no"] = "rating"
    question: str | None = None
    low: float = 1.0
    high: float = 5.0
    structured: bool = True
    image_side: int | None = None
    max_tokens: int = 64
    concurrency: int = 8
    deadline_s: float = 120.0
    token_variable: str | None = None
    max_invalid: float = 0.2
    window: int = 200

    def __post_init__(self) -> None:
        """Refuse what cannot be asked."""
        if not self.low < self.high:
            raise ValueError(f"low, high: got {self.low} and {self.high}, needed low below high")
        if self.question is not None and "{prompt}" not in self.question:
            raise ValueError(f"question: got {self.question!r}, needed {{prompt}} in it, where the prompt goes")
        if not 0 <= self.max_invalid <= 1 or self.window < 1 or self.concurrency < 1 or not self.deadline_s > 0:
            raise ValueError("needed max_invalid in [0, 1], window and concurrency of at least 1 and a positive deadline_s")

    def build(self) -> VLMJudge:
        """Make the client; the server is asked with the first images."""
        return VLMJudge(self, Client(servers=(self.url,), where="vlm_judge", deadline_s=self.deadline_s, token=self._token()))

    def _token(self) -> str | None:
        if self.token_variable is not None:
            return os.environ.get(self.token_variable)
        token = os.environ.get(OPENAI_TOKEN)
        if token is not None and not is_safe(self.url):
            warnings.warn(
                f"vlm_judge: {OPENAI_TOKEN} is not sent to {self.url}, where others could read it on the way; use https, or name it as token_variable",
                stacklevel=3,
            )
            return None
        return token


@dataclass(frozen=True)
class VLMJudge:
    """See ``Config``."""

    config: Config
    client: Client
    recent: deque[bool] = field(default_factory=deque, repr=False)  # whether each of the last answers could be read
    scores_alone: ClassVar[bool] = True

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Score images ``[batch, 3, h, w]`` in [0, 1]; NaN where the answer cannot be read.

        Raises:
            ValueError: If more than ``max_invalid`` of the last answers cannot be read, with one of them, or a prompt is empty.
            Unavailable: If the server does not answer.
        """
        pixels.check(images, prompts, "vlm_judge")
        empty = next((row for row, prompt in enumerate(prompts) if not prompt.strip()), None)
        if empty is not None:
            raise ValueError(f"vlm_judge: the prompt of sample {empty} is empty, so there is nothing to ask")
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            answers = list(pool.map(self._ask, pixels.pictures(images), prompts))
        read = rating if self.config.answer == "rating" else yes_share
        scores = [read(answer, self.config.low, self.config.high) for answer in answers]
        self._watch(answers, scores)
        return torch.tensor(scores, dtype=torch.float64)

    def _watch(self, answers: Sequence[Mapping[str, Any]], scores: Sequence[float]) -> None:
        """Count unreadable answers over calls: a call is small, and a judge that now and then says nothing must not end a run."""
        self.recent.extend(not math.isnan(score) for score in scores)
        while len(self.recent) > max(self.config.window, len(scores)):
            self.recent.popleft()
        num, bad = len(self.recent), self.recent.count(False)
        if bad > self.config.max_invalid * num:
            example = next((answer for answer, score in zip(answers, scores, strict=True) if math.isnan(score)), None)
            raise ValueError(
                f"vlm_judge: {bad} of the last {num} answers cannot be read (max_invalid {self.config.max_invalid:g}), for example "
                f"{json.dumps(example)[:200]}; check model and question, or answer: {self.config.answer}"
            )

    def _ask(self, picture: Image.Image, prompt: str) -> dict[str, Any]:
        config = self.config
        if config.image_side is not None:
            picture.thumbnail((config.image_side, config.image_side), Image.Resampling.BICUBIC)
        default = RATING if config.answer == "rating" else YES_NO
        text = _filled(config.question or default, {"prompt": prompt, "low": f"{config.low:g}", "high": f"{config.high:g}"})
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode()}}
        body: dict[str, Any] = {
            "model": config.model,
            "messages": [{"role": "user", "content": [image, {"type": "text", "text": text}]}],
            "temperature": 0,
            "max_tokens": 1 if config.answer == "yes_no" else config.max_tokens,
        }
        if config.answer == "yes_no":
            body |= {"logprobs": True, "top_logprobs": 20}
        elif config.structured:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": _schema(config)}}
        return self.client.post("/chat/completions", json.dumps(body).encode(), "application/json", check=_choice)


def _filled(template: str, values: Mapping[str, str]) -> str:
    """Put values in, at once: braces elsewhere, in JSON that is asked for and in prompts, are text."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)


def _schema(config: Config) -> dict[str, Any]:
    score = {"type": "number", "minimum": config.low, "maximum": config.high}
    return {"type": "object", "properties": {"score": score}, "required": ["score"], "additionalProperties": False}


def _choice(answer: Answer) -> dict[str, Any]:
    """Take the first choice out of a completion; what is no completion is a fault of the server."""
    found = answer.json()
    choices = found.get("choices") if isinstance(found, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError(f"{answer.server}: answered no completion: {answer.body[:80]!r}")
    return choices[0]


def rating(choice: Mapping[str, Any], low: float, high: float) -> float:
    """Read ``{"score": N}`` and scale N to [0, 1]; NaN where there is no such object or N is outside.

    Examples:
        >>> rating({"message": {"content": '{"score": 4}'}}, 1, 5), rating({"message": {"content": "4"}}, 1, 5)
        (0.75, nan)
    """
    message = choice.get("message")
    text = message.get("content") if isinstance(message, Mapping) else None
    fenced = re.fullmatch(r"\s*(?:```(?:json)?\s*)?(\{.*\})\s*(?:```)?\s*", text, re.DOTALL) if isinstance(text, str) else None
    try:
        score = json.loads(fenced[1])["score"] if fenced else None
    except (ValueError, KeyError, TypeError, RecursionError):
        score = None
    if isinstance(score, bool) or not isinstance(score, int | float) or not low <= score <= high:
        return math.nan
    return (score - low) / (high - low)


def yes_share(choice: Mapping[str, Any], low: float = 0, high: float = 1) -> float:
    """Return P(yes) / (P(yes) + P(no)) over the spellings of the first token; NaN where neither is among the log-probabilities.

    Examples:
        >>> tokens = [{"token": "Yes", "logprob": -0.2}, {"token": " no", "logprob": -1.8}]
        >>> round(yes_share({"logprobs": {"content": [{"top_logprobs": tokens}]}}), 5)
        0.83202
    """
    mass = {"yes": 0.0, "no": 0.0}
    try:
        for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
            word = str(entry["token"]).replace("\u2581", " ").replace("\u0120", " ").strip().lower()
            if word in mass:
                mass[word] += math.exp(float(entry["logprob"]))
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return math.nan
    total = mass["yes"] + mass["no"]
    return mass["yes"] / total if total > 0 and math.isfinite(total) else math.nan
