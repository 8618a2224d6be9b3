"""A folder of videos with ``.txt`` sidecars, or with one table of ``file, caption[, group, split]``.

Nothing outside the folder is read: neither by a name in the table nor through a link.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from archipel import store
from archipel.data.base import (
    MAX_CAPTION_BYTES,
    MAX_CLIP_BYTES,
    VIDEO_SUFFIXES,
    Item,
    Rejected,
    Window,
    caption_from_bytes,
    existing_folder,
    inside,
    make_item,
    printable,
)
from archipel.data.decode import decode_clip
from archipel.data.tables import TABLE_SUFFIXES, read_table
from archipel.errors import ArchipelError


def find_videos(root: Path, suffixes: tuple[str, ...] = VIDEO_SUFFIXES) -> list[Path]:
    """Clips anywhere below ``root``, by suffix, in the order of their names; hidden files are left out."""
    found = []
    for path in root.rglob("*"):
        relative = path.relative_to(root)
        if path.suffix.lower() in suffixes and not any(part.startswith(".") for part in relative.parts):
            found.append(relative)
    return sorted(found, key=lambda path: printable(path.as_posix()))


def find_table(root: Path) -> Path | None:
    """The one table at the top of the folder. Raises ArchipelError where there are several."""
    tables = sorted(path for path in root.iterdir() if path.suffix.lower() in TABLE_SUFFIXES and path.is_file())
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise ArchipelError(f"{root} holds several tables ({names}): keep the one that names the clips")
    return tables[0] if tables else None


def read_inside(root: Path, relative: Path, limit: int) -> bytes:
    """At most ``limit`` bytes of a file that really lies in the folder. Raises Rejected where they cannot be had."""
    path = root / relative
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            raise Rejected("outside the folder: a link leads elsewhere, and is not followed")
        if not path.exists():
            raise Rejected("missing: there is no such file")
        if not path.is_file():
            raise Rejected("not a clip: not a regular file")
        with open(path, "rb") as file:
            return file.read(limit)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links
        raise Rejected(f"unreadable: {type(error).__name__}") from error


def read_clip(root: Path, relative: Path) -> bytes:
    """The bytes of a clip that really lies in the folder. Raises Rejected where they cannot be had."""
    data = read_inside(root, relative, MAX_CLIP_BYTES + 1)
    if len(data) > MAX_CLIP_BYTES:
        raise Rejected("too large: over 2 GiB; cut it into clips first")
    return data


class Folder:
    """The ``folder`` source. Without a group column every clip is a group of its own."""

    name = "folder"

    def __init__(self, path: str, license_text: str = "") -> None:
        self.root = existing_folder(path)
        self.license = license_text or "not stated: set clips.license"
        self._table = find_table(self.root)
        self._paths: dict[str, Path] = {}

    def items(self) -> list[Item]:
        return self._from_table(self._table) if self._table else self._from_sidecars()

    def count(self) -> int:
        return len(read_table(self._table)) if self._table else len(find_videos(self.root))

    def _from_sidecars(self) -> list[Item]:
        items = []
        for relative in find_videos(self.root):
            key = printable(relative.as_posix())
            self._paths[key] = relative
            try:
                sidecar = relative.with_suffix(".txt")
                if not (self.root / sidecar).exists():
                    raise Rejected(f"no caption: {printable(sidecar.as_posix())} is missing")
                caption = caption_from_bytes(self._contents(sidecar, MAX_CAPTION_BYTES + 1))
            except Rejected as rejection:
                items.append(Item(key, None, key, error=rejection.reason))
            else:
                items.append(Item(key, caption, key))
        return items

    def _from_table(self, table: Path) -> list[Item]:
        items: list[Item] = []
        for where, cells in read_table(table):
            if isinstance(cells, Rejected):
                items.append(Item(f"{table.name} {where}", None, "", error=cells.reason))
                continue
            name = cells.get("file")
            if not isinstance(name, str) or not name.strip():
                items.append(Item(f"{table.name} {where}", None, "", error="no file: the cell is empty or not text"))
                continue
            relative = inside(name.strip())
            if relative is None:
                raise ArchipelError(
                    f"{table}, {where}: file {name!r} leads out of the folder. Names are relative to {self.root} and "
                    "stay inside it; nothing was read"
                )
            key = printable(relative.as_posix())
            if key in self._paths:
                items.append(Item(f"{table.name} {where}", None, "", error=f"duplicate: {key} has a row already"))
                continue
            self._paths[key] = Path(relative)
            caption = cells.get("caption")
            if isinstance(caption, Rejected):
                items.append(Item(key, None, key, error=caption.reason))
            else:
                items.append(make_item(key, caption, cells.get("group"), cells.get("split")))
        return items

    def _contents(self, relative: Path, limit: int) -> bytes:
        return read_inside(self.root, relative, limit)

    def read(self, item: Item) -> bytes:
        return read_clip(self.root, self._paths[item.key])

    def decode(self, item: Item, data: bytes, window: Window) -> np.ndarray:
        return decode_clip(data, window)

    def provenance(self) -> dict[str, Any]:
        # The folder's own path stays out: cards travel, and name no paths of a machine.
        if self._table is None:
            return {"folder": self.root.name, "captions": "sidecars"}
        return {"folder": self.root.name, "captions": self._table.name, "table_sha256": store.sha256_file(self._table)}
