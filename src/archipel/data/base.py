"""What every source of clips looks like: a list of items, their bytes, and how bytes become a window of frames."""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from archipel.config import Clips
from archipel.errors import ArchipelError

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".gif", ".webp", ".png")
MAX_CLIP_BYTES = 2 << 30  # a clip is read whole; films have to be cut first
MAX_CAPTION_BYTES = 64 << 10

_SPACES = re.compile(r"\s+")


class Rejected(Exception):  # noqa: N818 - an outcome of every day, not an error
    """A clip cannot be used. The reason is one line, ``category`` or ``category: detail``, the same on every machine."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def category(reason: str) -> str:
    """The part of a reason that is counted: what stands before the first colon."""
    return reason.partition(":")[0]


@dataclass(frozen=True)
class Item:
    """One candidate clip of a source.

    key: its name within the source, unique; caption: cleaned text or None; group: content group; split: only where
    the source fixes it; error: why it is already known to be unusable. ``tolerated``: a source announces that this
    kind of rejection is normal for it (the stills among the emoji), so it does not count against clips.max_rejected.
    """

    key: str
    caption: str | None
    group: str
    split: str | None = None
    error: str | None = None
    tolerated: bool = False


@dataclass(frozen=True)
class Window:
    """Which frames of a source become a clip, and how they become square.

    frames F at fps (both > 0), from ``start`` seconds; size H = W in pixels; crop center, pad or stretch;
    background (red, green, blue) in 0..255. ``phases`` P > 1 asks for P windows, shifted evenly around the loop: a
    decoder then gives P * F frames, window after window (what does not loop gives its one window P times).
    """

    frames: int
    fps: float
    start: float
    size: int
    crop: str
    background: tuple[int, int, int]
    phases: int = 1

    @classmethod
    def from_config(cls, clips: Clips) -> Window:
        colour = clips.background.lstrip("#")
        red, green, blue = (int(colour[i : i + 2], 16) for i in (0, 2, 4))
        return cls(clips.frames, clips.fps, clips.start, clips.size, clips.crop, (red, green, blue), clips.phases)

    def times(self) -> list[Fraction]:
        """The F times in seconds, exact: start + i / fps."""
        start = Fraction(self.start).limit_denominator(10**6)
        rate = Fraction(self.fps).limit_denominator(10**6)
        return [start + Fraction(i) / rate for i in range(self.frames)]

    def spec(self) -> dict[str, Any]:
        """What of the window enters a cache key."""
        return {**asdict(self), "background": list(self.background)}


class Source(Protocol):
    """Where clips come from. ``items`` always gives the same items in the same order for the same source."""

    name: str
    license: str

    def items(self) -> Sequence[Item]: ...

    def read(self, item: Item) -> bytes:
        """The clip's bytes. Raises Rejected where they cannot be had."""
        ...

    def decode(self, item: Item, data: bytes, window: Window) -> np.ndarray:
        """uint8 (P * F, H, W, 3). Raises Rejected. Safe to call from several threads."""
        ...

    def provenance(self) -> dict[str, Any]:
        """JSON-able facts for cards: where the clips come from, versions, hashes; no paths of this machine."""
        ...


# --- captions --------------------------------------------------------------------------------------------------------


def clean_caption(text: str | None) -> str | None:
    """One line without control characters and doubled spaces; None where nothing is left.

    Raises Rejected for text that is not Unicode (lone surrogates, as JSON escapes can spell them).
    """
    if text is None:
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Rejected("undecodable text: the caption holds lone surrogates") from error
    kept = "".join(" " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)
    return _SPACES.sub(" ", kept).strip() or None


def caption_from_bytes(data: bytes) -> str | None:
    """A caption file's text: UTF-8, with or without a byte order mark. Raises Rejected where it is anything else."""
    if len(data) > MAX_CAPTION_BYTES:
        raise Rejected(f"undecodable text: the caption is longer than {MAX_CAPTION_BYTES >> 10} KiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected(f"undecodable text: the caption is not UTF-8 (byte {error.start})") from error
    if "\0" in text:
        raise Rejected("undecodable text: the caption holds NUL bytes")
    return clean_caption(text)


SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def make_item(key: str, caption: Any, group: Any = None, split: Any = None) -> Item:
    """An item from what a table or a JSON caption says; whatever cannot be used becomes its ``error``.

    Without a group every clip is a group of its own.
    """
    text = None if caption is None else caption
    try:
        if text is not None and not isinstance(text, str):
            raise Rejected(f"undecodable text: the caption is {type(text).__name__}, not text")
        cleaned = clean_caption(text)
        name = clean_caption(str(group)) if group is not None and group != "" else None
        place = None if split is None or split == "" else SPLIT_NAMES.get(str(split).strip().lower())
        if split not in (None, "") and place is None:
            raise Rejected(f"unknown split: {str(split)[:40]!r} is not train, validation or test")
    except Rejected as rejection:
        return Item(key, None, key, error=rejection.reason)
    return Item(key, cleaned, name or key, place)


# --- names from outside ----------------------------------------------------------------------------------------------


def inside(name: str) -> PurePosixPath | None:
    """A relative path that stays where it is put, or None for absolute paths, ``..``, drives and NUL."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts or re.match(r"^[A-Za-z]:", name):
        return None
    return path if path.parts else None


def printable(name: str) -> str:
    """A file name as text that can be stored: undecodable bytes become backslash escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def is_url(text: str) -> bool:
    """Whether a path is really a command or a remote address (``pipe:``, ``http://``, ``s3://``, ``file:``, ...)."""
    return re.match(r"^[A-Za-z][A-Za-z0-9+.-]+:", text) is not None


def existing_folder(path: str, key: str = "clips.path") -> Path:
    """The folder that ``clips.path`` names. Raises ArchipelError where there is none."""
    if is_url(path):
        raise ArchipelError(f"{key} = {path!r} is a command or a remote address: give a local path")
    folder = Path(path).expanduser()
    if not folder.exists():
        raise ArchipelError(f"{key} = {path!r}: there is no such folder")
    if not folder.is_dir():
        raise ArchipelError(f"{key} = {path!r} is a file: give the folder that holds the clips")
    return folder


def require(module: str, extra: str = "data") -> Any:
    """Import an optional module. Raises ArchipelError that says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ArchipelError(f"this needs the package {module}: pip install 'archipel[{extra}]'") from error
