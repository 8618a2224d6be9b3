"""Animated Fluent emoji: 256 x 256 loops of 3 s with transparency, from four npm packages, named by Unicode.

Tarballs are read in place, member by member; nothing is unpacked to disk.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from archipel.config import Clips
from archipel.data.base import Item, Rejected, Window
from archipel.data.decode import decode_clip
from archipel.data.fetch import Package, fetch
from archipel.errors import DamagedError
from archipel.progress import Progress, StopFlag

NAMES = Package(
    "unicode-emoji-json",
    "0.9.0",
    "HdrQW/7SdbXUsTd8uTATv7LvQJkCSgbAgRCDCtOhQ6xn3EAx+xZHQtRniOXWJK3ywIqPegkNhP4U4EbuFsiQng==",
    71855,
)
PACKAGES: dict[int, Package] = {
    number: Package(f"@lobehub/fluent-emoji-anim-{number}", "1.0.0", sha512, size)
    for number, (sha512, size) in {
        1: ("/4m31vAuZEQ4aUJ5pxcOU5PVkuJya55GRxUZL7+zgLlxZXpzzE8jPqpDyhZICE3n47nS/Y9M5/vLdizi8201QA==", 164966217),
        2: ("S6yzf0RZXrQbXdxCWuHA9BAoLdBRk2flX+ne4TPGEH/qApwisCAKHoAAGjKSlTY3OVeZ9b7t/NEbmpjawnQYJA==", 181915962),
        3: ("UzRSUDMjdfdt9vER5bhjHkPqgc3EEgfGtYs6ndvizOTvQOxYQ57ow2RTkWSDZxwW30X4EYBi2eWTS7CXDDoFsg==", 197000910),
        4: ("IIkl5ztSd1HrzvIDt/uGsFoC1WODXRdYq5uROrnkyqi9DbToEcJ1nlY86PnoUXeFS9nBCnHfiYk3ouSEGThFmA==", 185915894),
    }.items()
}

_ASSET = re.compile(r"package/assets/([0-9a-f]+(?:[-_][0-9a-f]+)*)\.webp")
_TONES = {
    "1f3fb": "light skin tone",
    "1f3fc": "medium-light skin tone",
    "1f3fd": "medium skin tone",
    "1f3fe": "medium-dark skin tone",
    "1f3ff": "dark skin tone",
}
_SILENT = {"fe0f", "e007f"}  # presentation selector, end of a tag sequence: spelled or not, the same emoji
# Code points that draw the same thing with another gender; the first of each line stands for all.
_SAME = {
    other: line[0]
    for line in (
        ("1f9d1", "1f468", "1f469"),  # person, man, woman
        ("1f9d2", "1f466", "1f467"),  # child, boy, girl
        ("1f9d3", "1f474", "1f475"),  # older person, old man, old woman
        ("1fac5", "1f934", "1f478"),  # person with crown, prince, princess
        ("1fac4", "1fac3", "1f930"),  # pregnant person, man, woman
        ("1f57a", "1f483"),  # man dancing, woman dancing
        ("1f385", "1f936"),  # Santa Claus, Mrs. Claus
        ("1f46b", "1f46c", "1f46d"),  # two holding hands
    )
    for other in line
}
_JOIN, _FEMALE, _MALE, _RIGHT = "200d", "2640", "2642", "27a1"
_WHOLE = {  # sequences that have a code point of their own, after genders and tones are gone
    ("1f9d1", "1f91d", "1f9d1"): "1f46b",
    ("1f9d1", "2764", "1f9d1"): "1f491",
    ("1f9d1", "2764", "1f48b", "1f9d1"): "1f48f",
    ("1faf1", "1faf2"): "1f91d",
    ("1f9d1", "1f384"): "1f385",
}


# Files in each package: without skin tones, with them; and of those that move: without, with.
_KNOWN = {1: (699, 999, 187, 477), 2: (377, 767, 176, 526), 3: (351, 706, 223, 568), 4: (444, 919, 148, 538)}


def known_count(clips: Clips) -> int:
    """How many clips the chosen packages hold, known without fetching them."""
    place = 2 * (clips.min_motion > 0) + (clips.variants == "all")
    return sum(_KNOWN[number][place] for number in set(clips.packages))


def split_code(stem: str) -> tuple[str, ...]:
    """``1f44b-1f3fd`` -> its code points, without those that change nothing."""
    parts = (part.lstrip("0") for part in re.split("[-_]", stem))  # keycaps are padded: 0023-fe0f-20e3
    return tuple(part for part in parts if part not in _SILENT)


def group_of(stem: str) -> str:
    """The content group: one for all skin tones, genders and directions of one emoji."""
    parts = [_SAME.get(p, p) for p in split_code(stem) if p not in _TONES and p not in (_JOIN, _FEMALE, _MALE, _RIGHT)]
    if len(parts) > 1 and set(parts) <= {"1f9d1", "1f9d2"}:
        return "1f46a"  # families of every make
    return _WHOLE.get(tuple(parts)) or "-".join(parts) or stem


def caption_of(stem: str, names: dict[tuple[str, ...], str]) -> str | None:
    """``waving hand, medium skin tone``; None where Unicode has no such name."""
    parts = split_code(stem)
    plain = tuple(part for part in parts if part not in _TONES)
    name = names.get(plain)
    if name is None and len(plain) == 3 and plain[0] == "1faf1":
        name = names.get(("1f91d",))  # two hands of different tones are spelled as two hands
    if name is None:
        return None
    tones = dict.fromkeys(_TONES[part] for part in parts if part in _TONES)
    return ", ".join([name.lower(), *tones])


def read_names(path: Path) -> dict[tuple[str, ...], str]:
    """Code points -> Unicode name, from the tarball of unicode-emoji-json."""
    with _open(path) as tar:
        member = tar.extractfile("package/data-by-emoji.json")
        assert member is not None
        table = json.load(member)
    return {split_code("-".join(f"{ord(c):x}" for c in emoji)): str(entry["name"]) for emoji, entry in table.items()}


def _open(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:gz")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DamagedError(f"{path} is not a readable package: remove it to have it fetched again") from error


class _Tarball:
    """The clips of one package in the order of the tarball, which is the order that is cheap to read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tar = _open(path)
        self.members: dict[str, tarfile.TarInfo] = {}
        self.stills: set[str] = set()
        for member, stem in self._walk():
            head = self._tar.extractfile(member)
            assert head is not None
            # Byte 20 of a WebP with an extended header holds its flags; bit 1 says that it is animated.
            first = head.read(21)
            if not (first[12:16] == b"VP8X" and first[20] & 2):
                self.stills.add(stem)
            self.members[stem] = member

    def _walk(self) -> Iterator[tuple[tarfile.TarInfo, str]]:
        try:
            for member in self._tar:
                path = Path(member.name)
                if not (member.isreg() or member.isdir()) or path.is_absolute() or ".." in path.parts:
                    raise DamagedError(f"{self.path} holds {member.name!r}, a link or a path outside: it is not used")
                match = _ASSET.fullmatch(member.name)
                if match and member.isreg():
                    yield member, match[1]
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DamagedError(f"{self.path} breaks off: remove it to have it fetched again") from error

    def read(self, stem: str) -> bytes:
        file = self._tar.extractfile(self.members[stem])
        assert file is not None
        return file.read()


class FluentEmoji:
    """The ``fluent-emoji`` source. Packages are fetched on the first call of ``items``."""

    name = "fluent-emoji"
    license = "MIT by package.json; no licence file inside"

    def __init__(self, clips: Clips, stop: StopFlag | None = None) -> None:
        self._numbers = tuple(dict.fromkeys(clips.packages))
        self._all = clips.variants == "all"
        self._motion = clips.min_motion > 0
        self._stop = stop
        self._tarballs: dict[int, _Tarball] = {}

    def items(self) -> list[Item]:
        paths = [fetch(PACKAGES[number], self._stop) for number in self._numbers]
        names = read_names(fetch(NAMES, self._stop))
        items = []
        with Progress("prepare: packages", len(paths)) as bar:
            for number, path in zip(self._numbers, paths, strict=True):
                if number not in self._tarballs:
                    self._tarballs[number] = _Tarball(path)
                items += self._items_of(number, names)
                bar.advance()
        return items

    def _items_of(self, number: int, names: dict[tuple[str, ...], str]) -> list[Item]:
        tarball, items = self._tarballs[number], []
        for stem in tarball.members:
            if not self._all and any(part in _TONES for part in split_code(stem)):
                continue
            still = stem in tarball.stills and self._motion
            items.append(
                Item(
                    f"anim-{number}/{stem}.webp",
                    caption_of(stem, names),
                    group_of(stem),
                    error="static: a still picture of one frame" if still else None,
                    tolerated=still,
                )
            )
        return items

    def read(self, item: Item) -> bytes:
        package, _, name = item.key.partition("/")
        try:
            return self._tarballs[int(package.rpartition("-")[2])].read(name.removesuffix(".webp"))
        except (tarfile.TarError, OSError, EOFError) as error:
            raise Rejected("truncated: the package breaks off here") from error

    def decode(self, item: Item, data: bytes, window: Window) -> np.ndarray:
        return decode_clip(data, window)

    def provenance(self) -> dict[str, Any]:
        used = [PACKAGES[number] for number in self._numbers]
        return {
            "packages": {p.label: f"sha512-{p.sha512}" for p in [*used, NAMES]},
            "variants": "all" if self._all else "base",
        }
