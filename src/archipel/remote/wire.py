"""What an ensemble and a remote expert say to each other: bodies in safetensors, read strictly and without torch.

Request of ``/v1/velocity``: x (B, C, T, H, W), t (B,), a, b (B,), the text, and where frames are given, image (B, C + 1, T, H, W).
Answer: v like x, v = a v(c) + b v(null): both branches of guidance in one request.
Request of ``/v1/latents``: seeds (B,), the text (and image); how to sample stands in the metadata. Answer: latents.
The text is tokens (B, l, D), mask (B, l), pooled (B, P), where l tokens are those up to the last that no mask hides: the
network's answer does not depend on the others. Tensors are F32, or F16 where an ensemble wants half the bytes; t, a, b are F32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from archipel.errors import ArchipelError
from archipel.islands.strict import Refusal, parse_json, shown

MEDIA = "application/x-safetensors"
DESCRIBE, VELOCITY, LATENTS, HEALTH = "/v1/expert", "/v1/velocity", "/v1/latents", "/healthz"
VERSION = "Archipel-Version"  # header: sha256 of the expert's card, in requests as wanted and in answers as given
HEADER = 16 << 10  # bytes of a body's header: names, types, shapes and offsets of a dozen tensors
KIND = "remote expert"
_TENSORS = 12
_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "BOOL": np.dtype("?"),
}
_NAMES: dict[np.dtype[Any], str] = {kind: name for name, kind in _TYPES.items()}


class MalformedError(ArchipelError):
    """A body that is not what it should be."""


@dataclass(frozen=True)
class Shapes:
    """What an expert reads and gives: latent (C, T, H, W), text (L, D, P), and whether it is told given frames."""

    latent: tuple[int, int, int, int]
    text: tuple[int, int, int]
    image: bool

    @classmethod
    def of(cls, network: Mapping[str, Any]) -> Shapes:
        """From ``network`` of a card. Raises MalformedError."""
        try:
            C, T, H, W = (int(n) for n in network["latent_shape"])
            L, D, P = (int(n) for n in network["text_shape"])
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedError("the card does not say which shapes its network reads") from error
        return cls((C, T, H, W), (L, D, P), bool(network.get("image", False)))

    @property
    def given(self) -> tuple[int, int, int, int]:
        """(C + 1, T, H, W)"""
        return (self.latent[0] + 1, *self.latent[1:])

    def row_bytes(self) -> int:
        """Most bytes of one clip in a request, in F32."""
        L, D, P = self.text
        numbers = math.prod(self.latent) + math.prod(self.given) * self.image + L * D + P + 8
        return 4 * numbers + L

    def body_bytes(self, rows: int) -> int:
        """Most bytes of a request of so many clips."""
        return rows * self.row_bytes() + HEADER + 8


def pack(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """A body of these tensors."""
    from safetensors.numpy import save

    ordered = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    return bytes(save(ordered, metadata=dict(metadata) if metadata else None))


def half(array: np.ndarray, name: str) -> np.ndarray:
    """As F16. Raises MalformedError where a number is too large for it."""
    with np.errstate(over="ignore"):
        small = array.astype(np.float16)
    if not bool(np.isfinite(small).all()):
        raise MalformedError(f"{name} holds numbers beyond 65504, which 16 bits cannot carry: leave fp16 off")
    return small


def unpack(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors (read-only views of ``data``) and metadata of a body. Raises MalformedError.

    The tensors must fill the body from its first byte to its last, without gap or overlap; nothing is executed.
    """
    if len(data) < 10:
        raise MalformedError(f"a body of {len(data)} bytes is no safetensors")
    length = int.from_bytes(data[:8], "little")
    if length > min(HEADER, len(data) - 8):
        raise MalformedError(f"a header of {length} bytes is claimed; at most {HEADER} are read")
    try:
        header = parse_json(data[8 : 8 + length].rstrip(b" "), "the header", numbers="format")
    except Refusal as refusal:
        raise MalformedError(refusal.detail) from None
    if not isinstance(header, dict):
        raise MalformedError("the header is no JSON object")
    told = header.pop("__metadata__", {})
    if not isinstance(told, dict) or not all(isinstance(value, str) for value in told.values()):
        raise MalformedError("the metadata are not texts")
    if len(header) > _TENSORS:
        raise MalformedError(f"{len(header)} tensors, at most {_TENSORS} belong into a body")
    entries = sorted(((name, *_entry(name, entry)) for name, entry in header.items()), key=lambda one: one[3:])
    found, at = {}, 0
    for name, kind, shape, begin, end in entries:
        if begin != at:
            raise MalformedError(f"tensor {shown(name)} begins at {begin}, expected {at}")
        whole = data[8 + length + begin : 8 + length + end]
        if len(whole) != end - begin:
            raise MalformedError(f"tensor {shown(name)} ends behind the body")
        if kind == "BOOL" and not set(whole) <= {0, 1}:
            raise MalformedError(f"tensor {shown(name)} holds bytes that are neither 0 nor 1")
        found[name] = np.frombuffer(whole, _TYPES[kind]).reshape(shape) if whole else np.empty(shape, _TYPES[kind])
        at = end
    if 8 + length + at != len(data):
        raise MalformedError(f"the tensors end at {at}, their data at {len(data) - 8 - length}")
    return found, told


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    where = f"tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise MalformedError(f"{where} does not have exactly dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in _TYPES:
        raise MalformedError(f"{where} has dtype {shown(kind)}, known are {', '.join(_TYPES)}")
    whole = all(isinstance(part, list) and all(type(n) is int and n >= 0 for n in part) for part in (shape, offsets))
    if not whole or len(shape) > 8 or len(offsets) != 2:
        raise MalformedError(f"{where} has shape {shown(shape)} and offsets {shown(offsets)}")
    if math.prod(shape) * _TYPES[kind].itemsize != offsets[1] - offsets[0]:
        raise MalformedError(f"{where}: shape {shown(shape)} does not take bytes {shown(offsets)}")
    return kind, tuple(shape), offsets[0], offsets[1]


def expect(found: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], *kinds: str) -> np.ndarray:
    """The tensor of that name. Raises MalformedError where it is missing or has another shape or none of the types."""
    array = found.get(name)
    if array is None:
        raise MalformedError(f"tensor {name} is missing")
    if array.shape != shape or _NAMES[array.dtype] not in kinds:
        got = f"{_NAMES[array.dtype]} {list(array.shape)}"
        raise MalformedError(f"tensor {name} is {got}, expected {' or '.join(kinds)} {list(shape)}")
    if array.dtype.kind == "f" and not bool(np.isfinite(array).all()):
        raise MalformedError(f"tensor {name} holds numbers that are not finite")
    return array


def only(found: Mapping[str, np.ndarray], *names: str) -> None:
    """Raise MalformedError where there are other tensors than these."""
    if odd := sorted(set(found) - set(names)):
        raise MalformedError(f"tensor {shown(odd[0])} does not belong here: {', '.join(names)} do")


def text_of(found: Mapping[str, np.ndarray], rows: int, shapes: Shapes) -> dict[str, np.ndarray]:
    """tokens (B, L, D) float32, mask (B, L), pooled (B, P) float32 of a request, padded to L. Raises MalformedError."""
    L, D, P = shapes.text
    mask = found.get("mask")
    most = mask.shape[1] if mask is not None and mask.ndim == 2 else 0
    if most > L:
        raise MalformedError(f"a mask of {most} tokens: this run's texts have {L}")
    mask = expect(found, "mask", (rows, most), "BOOL")
    tokens = expect(found, "tokens", (rows, most, D), "F32", "F16")
    pooled = expect(found, "pooled", (rows, P), "F32", "F16")
    full = {"tokens": np.zeros((rows, L, D), np.float32), "mask": np.zeros((rows, L), np.bool_)}
    full["tokens"][:, :most], full["mask"][:, :most] = tokens, mask
    return {**full, "pooled": pooled.astype(np.float32)}
