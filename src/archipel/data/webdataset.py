"""WebDataset tars on the local disk: members that share a stem are a sample, a clip beside its ``.txt`` or ``.json``.

The tars are read in place and nothing is unpacked. A tar with links, devices, absolute names or ``..`` is refused, and
so are commands and remote addresses where webdataset would run or fetch them (``pipe:``, ``http:``, ...).
"""

from __future__ import annotations

import json
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from archipel.data.base import (
    MAX_CAPTION_BYTES,
    MAX_CLIP_BYTES,
    VIDEO_SUFFIXES,
    Item,
    Rejected,
    Window,
    caption_from_bytes,
    inside,
    is_url,
    make_item,
    printable,
)
from archipel.data.decode import decode_clip
from archipel.errors import ArchipelError, DamagedError
from archipel.progress import Progress

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_MAX_TARS = 100_000


def expand(pattern: str) -> list[Path]:
    """The tars that a path, folder, glob or ``shard-{000..003}.tar`` names. Raises ArchipelError where one is not
    there, or where the pattern is a command or an address."""
    if is_url(pattern) or "::" in pattern:
        raise ArchipelError(
            f"clips.path = {pattern!r} is a command or a remote address: it is refused. Fetch the tars first and give "
            "their local path, such as data/shard-{000..003}.tar"
        )
    path = Path(pattern).expanduser()
    if path.is_dir():
        tars = sorted(p for p in path.iterdir() if p.name.lower().endswith(_TAR_SUFFIXES))
        if not tars:
            raise ArchipelError(f"clips.path = {pattern!r}: the folder holds no .tar files")
        return tars
    names = _expand_ranges(str(path))
    tars = []
    for name in names:
        one = Path(name)
        if any(letter in name for letter in "*?["):
            tars += sorted(one.parent.glob(one.name))
        else:
            tars.append(one)
    if not tars:
        raise ArchipelError(f"clips.path = {pattern!r}: no file has such a name")
    missing = [tar for tar in tars if not tar.is_file()]
    if missing:
        raise ArchipelError(f"clips.path = {pattern!r}: there is no file {missing[0]}" + _more(len(missing) - 1))
    return tars


def _more(count: int) -> str:
    return f" (and {count} more are missing)" if count > 0 else ""


def _expand_ranges(text: str) -> list[str]:
    match = _RANGE.search(text)
    if match is None:
        return [text]
    first, last = int(match[1]), int(match[2])
    if last < first or last - first >= _MAX_TARS:
        raise ArchipelError(f"clips.path: the range {match[0]} is not first..last of at most {_MAX_TARS} tars")
    made = []
    for number in range(first, last + 1):
        made += _expand_ranges(f"{text[: match.start()]}{number:0{len(match[1])}d}{text[match.end() :]}")
        if len(made) > _MAX_TARS:
            raise ArchipelError(f"clips.path: the pattern names more than {_MAX_TARS} tars")
    return made


@dataclass
class _Sample:
    tar: int
    parts: dict[str, tarfile.TarInfo] = field(default_factory=dict)  # by what follows the stem: mp4, txt, json
    error: str | None = None


class WebDataset:
    """The ``webdataset`` source. A JSON caption is an object with ``caption`` (or ``text``), ``group``, ``split``."""

    name = "webdataset"

    def __init__(self, pattern: str, license_text: str = "") -> None:
        self._paths = expand(pattern)
        self.license = license_text or "not stated: set clips.license"
        self._clips: dict[str, tuple[int, tarfile.TarInfo]] = {}
        self._opened: tuple[int, tarfile.TarFile] | None = None

    def items(self) -> list[Item]:
        items = []
        with Progress("prepare: tars", len(self._paths)) as bar:
            for number in range(len(self._paths)):
                items += self._items_of(number)
                bar.advance()
        return items

    def _items_of(self, number: int) -> list[Item]:
        items = []
        for stem, sample in self._samples(number).items():
            clips = [part for part in sample.parts if f".{part.rpartition('.')[2]}" in VIDEO_SUFFIXES]
            if not clips:
                continue  # a sample without a clip is somebody else's
            key = f"{self._label(number)}/{printable(stem)}.{clips[0]}"
            self._clips[key] = (number, sample.parts[clips[0]])
            if sample.error:
                items.append(Item(key, None, key, error=sample.error))
            else:
                items.append(self._item(key, sample))
        return items

    def _item(self, key: str, sample: _Sample) -> Item:
        try:
            for part in ("txt", "caption.txt", "caption", "text"):
                if part in sample.parts:
                    return Item(key, caption_from_bytes(self._contents(sample.tar, sample.parts[part])), key)
            if "json" in sample.parts:
                return self._from_json(key, self._contents(sample.tar, sample.parts["json"]))
        except Rejected as rejection:
            return Item(key, None, key, error=rejection.reason)
        return Item(key, None, key)

    def _from_json(self, key: str, data: bytes) -> Item:
        if len(data) > MAX_CAPTION_BYTES:
            raise Rejected(f"undecodable text: the JSON is longer than {MAX_CAPTION_BYTES >> 10} KiB")
        try:
            values = json.loads(data.decode("utf-8-sig"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise Rejected("undecodable text: the JSON cannot be read") from error
        if not isinstance(values, dict):
            raise Rejected("undecodable text: the JSON is not an object")
        return make_item(key, values.get("caption", values.get("text")), values.get("group"), values.get("split"))

    def _samples(self, number: int) -> dict[str, _Sample]:
        path, samples = self._paths[number], dict[str, _Sample]()
        size = path.stat().st_size
        tar = self._open(number)
        plain = path.name.lower().endswith(".tar")
        try:
            for member in tar:
                self._refuse_hostile(path, member)
                if not member.isreg():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, rest = base.partition(".")
                if not stem or not rest:
                    continue
                sample = samples.setdefault(f"{folder}/{stem}".lstrip("./"), _Sample(number))
                sample.parts.setdefault(rest.lower(), member)
                if plain and member.offset_data + member.size > size:
                    sample.error = "truncated: the tar ends inside this sample"
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            if not samples:
                raise DamagedError(f"{path} is not a readable tar ({type(error).__name__})") from error
            last = samples[next(reversed(samples))]  # a tar that breaks off keeps what came before
            last.error = last.error or "truncated: the tar ends inside this sample"
        return samples

    def _refuse_hostile(self, path: Path, member: tarfile.TarInfo) -> None:
        what = None
        if member.islnk() or member.issym():
            what = "a link"
        elif not (member.isreg() or member.isdir()):
            what = "a device or another special file"
        elif inside(member.name) is None and member.name.rstrip("/") not in (".", ""):
            what = "a name that leads out of the archive"
        elif member.issparse():
            what = "a sparse file"
        if what:
            raise ArchipelError(
                f"{path}: member {printable(member.name)!r} is {what}. Such archives are refused and nothing of it was "
                "read: pack the clips again as plain files with relative names"
            )

    def _label(self, number: int) -> str:
        names = [path.name for path in self._paths]
        return names[number] if names.count(names[number]) == 1 else f"{number:05d}-{names[number]}"

    def _open(self, number: int) -> tarfile.TarFile:
        if self._opened is not None and self._opened[0] == number:
            return self._opened[1]
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None
        path = self._paths[number]
        try:  # stays open between members
            if path.name.lower().endswith(".tar"):
                tar = tarfile.TarFile.open(path, "r:")
            else:
                tar = tarfile.TarFile.open(path, "r:gz")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DamagedError(f"{path} is not a readable tar ({type(error).__name__})") from error
        self._opened = (number, tar)
        return tar

    def _contents(self, number: int, member: tarfile.TarInfo) -> bytes:
        if member.size > MAX_CLIP_BYTES:
            raise Rejected("too large: over 2 GiB; cut it into clips first")
        try:
            file = self._open(number).extractfile(member)
            data = file.read() if file is not None else b""
        except (tarfile.TarError, OSError, EOFError) as error:
            raise Rejected("truncated: the tar ends inside this sample") from error
        if len(data) != member.size:
            raise Rejected("truncated: the tar ends inside this sample")
        return data

    def read(self, item: Item) -> bytes:
        return self._contents(*self._clips[item.key])

    def decode(self, item: Item, data: bytes, window: Window) -> np.ndarray:
        return decode_clip(data, window)

    def provenance(self) -> dict[str, Any]:
        return {"tars": {self._label(n): path.stat().st_size for n, path in enumerate(self._paths)}}
