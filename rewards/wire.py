"""The wire format of reward servers: images and prompts in one safetensors blob, scores in JSON. Nothing that can run code is ever read.

A request's body is a safetensors file with one tensor, ``images`` uint8 ``[batch, 3, h, w]``, whose ``__metadata__`` holds one JSON text under
"request". It is checked before anything is allocated: lengths, kind, shape and limits all come from a header of bounded size.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PROTOCOL = 1
CONTENT_TYPE = "application/x-safetensors"
SCORE_PATH = "/v1/score"
REWARDS_PATH = "/v1/rewards"
MAX_HEADER_BYTES = 2**20
_ID = re.compile("[ -~]{1,100}")


class Malformed(ValueError):
    """A body that is no request of this protocol, or breaks a limit."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes in one request."""

    max_bytes: int = 64 * 2**20
    max_images: int = 256
    max_side: int = 2048
    max_prompt_chars: int = 10_000


@dataclass(frozen=True, kw_only=True)
class Request:
    """Images to score.

    Attributes:
        request_id: The same in every repetition of a request, so that it is scored once; 1 to 100 printable characters of ASCII.
        images: uint8 ``[batch, 3, h, w]``.
        prompts: One for each image.
        metadata: One record for each image.
        rewards: Names at the server; empty for all.
        deadline_s: The client waits no longer than this.
    """

    request_id: str
    images: Tensor
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]
    rewards: Sequence[str] = ()
    deadline_s: float = 120.0


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Scores by reward: a number for each image, None where it could not be computed; sub-checks of the first reward that has some."""

    request_id: str
    scores: Mapping[str, Sequence[float | None]]
    clauses: Sequence[Sequence[float | None]] | None = None
    clauses_valid: Sequence[Sequence[bool]] | None = None
    timing: Mapping[str, float] = field(default_factory=dict)


def parts(request: Request) -> tuple[bytes, memoryview]:
    """Return a request as what stands before the images, and the images' own memory, which is not copied."""
    head = {
        "protocol": PROTOCOL,
        "request_id": request.request_id,
        "prompts": list(request.prompts),
        "metadata": [dict(record) for record in request.metadata],
        "rewards": list(request.rewards),
        "deadline_s": request.deadline_s,
    }
    images = request.images.cpu().contiguous()
    entry = {"dtype": "U8", "shape": list(images.shape), "data_offsets": [0, images.numel()]}
    header = json.dumps({"__metadata__": {"request": json.dumps(head)}, "images": entry}).encode()
    # Written here, not by the library, which copies the images several times; the format is two lines.
    return len(header).to_bytes(8, "little") + header, images.numpy().data.cast("B")


def encode(request: Request) -> bytes:
    """Return a request as bytes."""
    return b"".join(parts(request))


def decode(body: bytes, limits: Limits) -> Request:
    """Read a request, checking everything.

    Raises:
        Malformed: Says what is wrong.
    """
    if len(body) > limits.max_bytes:
        raise Malformed(f"body: {len(body)} bytes, needed at most {limits.max_bytes}")
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, len(body) - 8):
        raise Malformed("body: not a safetensors file with a header of at most 1 MiB")
    header = _json(body[8 : 8 + length], "header")
    if not isinstance(header, dict) or set(header) != {"images", "__metadata__"} or not isinstance(header["__metadata__"], dict):
        raise Malformed("header: needs exactly one tensor 'images' and '__metadata__'")
    count, height, width = _shape(header["images"], len(body) - 8 - length, limits)
    asked = _json(str(header["__metadata__"].get("request", "")).encode(), "request")
    fields = _fields(asked, count, limits)
    images = torch.frombuffer(bytearray(body[8 + length :]), dtype=torch.uint8).reshape(count, 3, height, width)
    return Request(images=images, **fields)


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{where}: not JSON") from error


def _shape(entry: Any, num_bytes: int, limits: Limits) -> tuple[int, int, int]:
    if not isinstance(entry, dict) or entry.get("dtype") != "U8":
        raise Malformed("images: needed dtype U8 (round images in [0, 1] times 255)")
    shape = entry.get("shape")
    if not isinstance(shape, list) or len(shape) != 4 or not all(type(size) is int and size > 0 for size in shape) or shape[1] != 3:
        raise Malformed("images: needed the shape [batch, 3, height, width]")
    if shape[0] > limits.max_images or max(shape[2:]) > limits.max_side:
        raise Malformed(f"images: {shape}, needed at most {limits.max_images} images of at most {limits.max_side} pixels a side")
    size = math.prod(shape)
    if entry.get("data_offsets") != [0, size] or num_bytes != size:
        raise Malformed(f"images: {num_bytes} bytes of data, needed {size} for the shape {shape}")
    return shape[0], shape[2], shape[3]


def _fields(asked: Any, count: int, limits: Limits) -> dict[str, Any]:
    if not isinstance(asked, dict) or asked.get("protocol") != PROTOCOL:
        raise Malformed(f"request: needed an object with protocol {PROTOCOL}")
    prompts, metadata, rewards = asked.get("prompts"), asked.get("metadata"), asked.get("rewards")
    if not isinstance(prompts, list) or len(prompts) != count or not all(isinstance(text, str) for text in prompts):
        raise Malformed(f"prompts: needed {count} texts, one for each image")
    if max(map(len, prompts)) > limits.max_prompt_chars:
        raise Malformed(f"prompts: one has more than {limits.max_prompt_chars} characters")
    if not isinstance(metadata, list) or len(metadata) != count or not all(isinstance(record, dict) for record in metadata):
        raise Malformed(f"metadata: needed {count} objects, one for each image")
    if not isinstance(rewards, list) or not all(isinstance(name, str) for name in rewards):
        raise Malformed("rewards: needed a list of names")
    if len(set(rewards)) < len(rewards):
        raise Malformed(f"rewards: {len(rewards)} names, but {len(set(rewards))} different ones; needed each once")
    request_id = asked.get("request_id")
    deadline: Any = asked.get("deadline_s")
    # It is sent back, and stands in logs: a character that no reply can hold must not come so far.
    if not isinstance(request_id, str) or not _ID.fullmatch(request_id):
        raise Malformed("request_id: needed 1 to 100 printable characters of ASCII")
    if not _is_finite(deadline) or not deadline > 0:
        raise Malformed("deadline_s: needed a positive number")
    return {"request_id": request_id, "prompts": prompts, "metadata": metadata, "rewards": rewards, "deadline_s": float(deadline)}


def read_reply(body: Any, request_id: str, name: str | None, count: int) -> tuple[str, list[float], Reply]:
    """Check a server's reply, which may lie.

    Args:
        body: The decoded JSON.
        request_id: What was sent.
        name: The reward that was asked for; None for the only one there is.
        count: How many images were sent.

    Returns:
        The reward's name, its values (NaN where the server could not compute one), and the reply.

    Raises:
        Malformed: If it answers another request, lacks the reward, or has another number of values or ones that are no finite numbers.
    """
    if not isinstance(body, dict) or body.get("request_id") != request_id:
        raise Malformed("the reply is to another request")
    scores = body.get("scores")
    if not isinstance(scores, dict) or (name is not None and name not in scores) or (name is None and len(scores) != 1):
        found = ", ".join(map(str, scores)) if isinstance(scores, dict) else "none"
        raise Malformed(f"the reply has the scores of {found}; needed {name or 'exactly one reward (set reward)'}")
    chosen = name if name is not None else next(iter(scores))
    values = scores[chosen]
    if not isinstance(values, list) or len(values) != count:
        raise Malformed(f"the reply has {len(values) if isinstance(values, list) else 'no'} scores for {count} images")
    bad = next((value for value in values if value is not None and not _is_finite(value)), None)
    if bad is not None:
        raise Malformed(f"the reply holds a score {bad!r}, needed finite numbers or null")
    clauses, valid = body.get("clauses"), body.get("clauses_valid")
    if clauses is not None:
        _check_clauses(clauses, valid, count)
    reply = Reply(request_id=request_id, scores=scores, clauses=clauses, clauses_valid=valid)
    return chosen, [math.nan if value is None else float(value) for value in values], reply


def read_listing(body: Any, name: str | None) -> bool:
    """Read from what a server tells of its rewards whether one scores each image by itself.

    Args:
        body: The decoded JSON.
        name: The reward; None for all there are.

    Raises:
        Malformed: If it is no such listing.
    """
    served, alone = (body.get("rewards"), body.get("scores_alone", [])) if isinstance(body, dict) else (None, None)
    if not isinstance(served, list) or not isinstance(alone, list):
        raise Malformed("the reply is no listing of rewards")
    asked = served if name is None else [name]
    return all(entry in alone for entry in asked)


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # JSON's integers have no end
        return False


def _check_clauses(clauses: Any, valid: Any, count: int) -> None:
    for rows, kind in ((clauses, "clauses"), (valid, "clauses_valid")):
        if (
            not isinstance(rows, list)
            or len(rows) != count
            or not all(isinstance(row, list) and len(row) == len(clauses[0]) for row in rows)
        ):
            raise Malformed(f"the reply's {kind} are no table with a row for each of {count} images")
    if not all(isinstance(flag, bool) for row in valid for flag in row):
        raise Malformed("the reply's clauses_valid hold something else than true and false")
    if not all(value is None or _is_finite(value) for row in clauses for value in row):
        raise Malformed("the reply's clauses hold something else than finite numbers and null")
