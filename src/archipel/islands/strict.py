"""Reading a stranger's files: every bound is checked before the bytes behind it are read, parsed or allocated.

JSON without duplicate keys, NaN or depth; safetensors whose header describes exactly the bytes that follow; and the marks
of formats that would execute when loaded. No torch here, and nothing of what is read is ever run.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DEPTH = 16  # levels of brackets in any JSON that we accept
_ELEMENTS = 1 << 20  # numbers looked at at a time
_TENSOR_HEADER = 512  # bytes of header that one tensor may take: name, type, shape, offsets
_MAGIC = {
    b"PK\x03\x04": "a zip archive (torch.save writes one with a pickle inside)",
    b"PK\x05\x06": "an empty zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\x7fELF": "a program",
    b"MZ": "a program",
    b"\x93NUMPY": "a numpy file (which may hold a pickle)",
    b"\x89HDF": "an HDF5 file",
    b"#!": "a script",
}


class Refusal(Exception):  # noqa: N818 - an answer, not a fault
    """An expert is not admitted: ``rule`` is the rule that it breaks, ``detail`` says where and how."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule, self.detail = rule, detail


def shown(value: Any) -> str:
    """A stranger's value for a message: ASCII, no control characters, at most 80 characters."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- files -----------------------------------------------------------------------------------------------------------


def check_file(path: Path, limit: int) -> int:
    """Size in bytes of a regular file of at most ``limit`` bytes, without opening it. Raises Refusal."""
    try:
        info = path.lstat()
    except FileNotFoundError as error:
        raise Refusal("format", f"{path.name} is missing") from error
    if stat.S_ISLNK(info.st_mode):
        raise Refusal("path", f"{path.name} is a link: a bundle holds files only")
    if not stat.S_ISREG(info.st_mode):
        raise Refusal("path", f"{path.name} is no regular file")
    if info.st_size > limit:
        raise Refusal("size", f"{path.name} has {info.st_size} bytes, at most {limit} are read")
    return info.st_size


def read_bounded(path: Path, limit: int) -> bytes:
    """A regular file's bytes, at most ``limit``; links are not followed. Raises Refusal."""
    check_file(path, limit)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with open(handle, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Refusal("size", f"{path.name} grew beyond {limit} bytes while it was read")
    return data


def check_magic(name: str, head: bytes) -> None:
    """Refuse what starts like an archive, a program or a pickle, whatever its name says. ``head``: 512 bytes or so.

    The first bytes of a safetensors file are a number, which may happen to look like a mark: it is let through here.
    """
    if head[3:9] == b"\0\0\0\0\0{":
        return
    for mark, what in _MAGIC.items():
        if head.startswith(mark):
            raise Refusal("format", f"{name} is {what}: only safetensors and JSON are admitted")
    if head[257:262] == b"ustar":
        raise Refusal("format", f"{name} is a tar archive: only safetensors and JSON are admitted")
    if len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5:
        raise Refusal("format", f"{name} is a Python pickle: only safetensors and JSON are admitted")


def check_tail(name: str, size: int, tail: bytes) -> None:
    """Refuse a file that is a zip archive when read from its end. ``tail``: the last 64 KiB or so of ``size`` bytes."""
    at = tail.rfind(b"PK\x05\x06")
    while at >= 0:
        comment = int.from_bytes(tail[at + 20 : at + 22], "little")
        if at + 22 + comment == len(tail) and len(tail) - at >= 22:
            raise Refusal("format", f"{name} ends as a zip archive: only safetensors and JSON are admitted")
        at = tail.rfind(b"PK\x05\x06", 0, at)


# --- JSON ------------------------------------------------------------------------------------------------------------


def parse_json(data: bytes, name: str, *, numbers: str = "config") -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or Infinity, at most ``DEPTH`` levels, finite numbers.

    ``numbers`` is the rule named for a number that is not finite. Raises Refusal ("format", "size" or ``numbers``).
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal("format", f"{name} is not UTF-8 text") from error
    _check_depth(text, name)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise Refusal("format", f"{name} has the key {shown(twice)} twice: which of them counts would be a guess")
        return found

    def constant(word: str) -> Any:
        raise Refusal(numbers, f"{name} holds {word}, which is no number")

    def number(word: str) -> float:
        value = float(word)
        if not math.isfinite(value):
            raise Refusal(numbers, f"{name} holds {shown(word)}, which is not finite")
        return value

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number)
    except (ValueError, RecursionError) as error:
        raise Refusal("format", f"{name} is not JSON ({shown(str(error))})") from error


def _check_depth(text: str, name: str) -> None:
    depth, quoted, escaped = 0, False, False
    for letter in text:
        if quoted:
            quoted = escaped or letter != '"'
            escaped = letter == "\\" and not escaped
        elif letter == '"':
            quoted = True
        elif letter in "[{":
            depth += 1
            if depth > DEPTH:
                raise Refusal("size", f"{name} is nested deeper than {DEPTH} levels")
        elif letter in "]}":
            depth -= 1


# --- safetensors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """Where each tensor of a file lies: ``tensors[name]`` is (shape, begin, end), offsets from ``data`` in bytes."""

    data: int
    tensors: dict[str, tuple[tuple[int, ...], int, int]]


def read_header(path: Path, *, tensors: int, limit: int) -> Header:
    """The header of a float32 safetensors file, held to the strictest reading of the format.

    ``tensors``: how many are expected, which bounds the header; ``limit``: bytes of the file. Raises Refusal: "size" for
    a header that is longer than the file or than so many tensors need, "format" for anything else that is not right.
    """
    name, size = path.name, check_file(path, limit)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with open(handle, "rb") as file:
        head = file.read(512)
        check_magic(name, head)
        file.seek(max(0, size - (1 << 16) - 22))
        check_tail(name, size, file.read())
        if size < 10:
            raise Refusal("format", f"{name} has {size} bytes, which is no safetensors file")
        length, most = int.from_bytes(head[:8], "little"), 4096 + _TENSOR_HEADER * (tensors + 1)
        if length > size - 8:
            raise Refusal("size", f"{name} claims a header of {length} bytes in a file of {size}")
        if length > most:
            raise Refusal("size", f"{name} has a header of {length} bytes, {tensors} tensors need at most {most}")
        file.seek(8)
        text = file.read(length)
    if not text.startswith(b"{"):
        raise Refusal("format", f"{name} is no safetensors file: its header is no JSON object")
    header = parse_json(text.rstrip(b" "), name, numbers="format")
    if not isinstance(header, dict):
        raise Refusal("format", f"{name} is no safetensors file: its header is no JSON object")
    _check_metadata(header.pop("__metadata__", None), name)
    if len(header) > tensors + 16:  # a few odd ones are named by the shape rule
        raise Refusal("size", f"{name} lists {len(header)} tensors, the network has {tensors}")
    found = {key: _entry(name, key, entry) for key, entry in header.items()}
    _check_layout(name, found, size - 8 - length)
    return Header(8 + length, found)


def _check_metadata(value: Any, name: str) -> None:
    if value is not None and value != {"format": "pt"}:
        raise Refusal("format", f'{name}: metadata is {shown(value)}, expected {{"format": "pt"}} or none')


def _entry(name: str, key: str, entry: Any) -> tuple[tuple[int, ...], int, int]:
    where = f"{name}: tensor {shown(key)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Refusal("format", f"{where} does not have exactly dtype, shape and data_offsets")
    if entry["dtype"] != "F32":
        raise Refusal("format", f"{where} has dtype {shown(entry['dtype'])}, only F32 is admitted")
    shape, offsets = entry["shape"], entry["data_offsets"]
    whole = all(isinstance(part, list) and all(type(n) is int and n >= 0 for n in part) for part in (shape, offsets))
    if not whole or len(shape) > 8 or len(offsets) != 2:
        raise Refusal("format", f"{where} has shape {shown(shape)} and offsets {shown(offsets)}")
    if math.prod(shape) * 4 != offsets[1] - offsets[0]:
        raise Refusal("format", f"{where}: shape {shown(shape)} does not take bytes {shown(offsets)}")
    return tuple(shape), offsets[0], offsets[1]


def _check_layout(name: str, found: Mapping[str, tuple[tuple[int, ...], int, int]], size: int) -> None:
    """Tensors must fill the data from its first byte to its last, one after another."""
    at = 0
    for key, (_, begin, end) in sorted(found.items(), key=lambda item: item[1][1:]):
        if begin != at:
            kind = "overlaps the one before it" if begin < at else "leaves a gap before it"
            raise Refusal("format", f"{name}: tensor {shown(key)} at {begin} {kind} (expected {at})")
        at = end
    if at != size:
        raise Refusal("format", f"{name}: its tensors end at {at}, its data at {size}")


def check_finite(path: Path, header: Header, magnitude: float) -> None:
    """Look at every number of every tensor. Raises Refusal("finite") naming the first tensor with NaN, an infinity or
    a number beyond ``magnitude``. Reads through a map, a piece at a time."""
    for name, (_, begin, end) in header.tensors.items():
        if begin == end:
            continue
        numbers = np.memmap(path, np.dtype("<f4"), "r", header.data + begin, ((end - begin) // 4,))
        for start in range(0, len(numbers), _ELEMENTS):
            part = numbers[start : start + _ELEMENTS]
            largest = float(np.abs(part).max())
            if math.isfinite(largest) and largest <= magnitude:
                continue
            if not math.isfinite(largest):
                count = int((~np.isfinite(part)).sum())
                raise Refusal("finite", f"{path.name}: tensor {name} holds {count} numbers that are not finite")
            raise Refusal(
                "finite", f"{path.name}: tensor {name} holds {largest:.3g}, larger than magnitude = {magnitude:g}"
            )
