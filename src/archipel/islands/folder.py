"""A folder as a store: what obstore's client for disks leaves to us. Links, folders that go away, syncing, listing."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from archipel.errors import ArchipelError, DamagedError
from archipel.islands.keys import check_key


@dataclass(frozen=True)
class Entry:
    """A listed object: its key, size in bytes and the store's own timestamp (POSIX seconds)."""

    key: str
    size: int
    modified: float


Entries = list[Entry]


class FolderGoneError(Exception):
    """The store's folder is away: it may come back."""


class Folder:
    """The folder that was opened, known by its place on the disk and not only by its name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._opened = _identity(root)

    def look(self, key: str) -> None:
        """Raise FolderGoneError for another folder than was opened, DamagedError where a part of the key is a link.

        A link could lead out of the store. Under an unmounted disk lies an empty folder, which would look like a run
        that nobody has begun.
        """
        if self._opened != _identity(self.root):
            raise FolderGoneError(f"the folder {self.root} is not there any more, or is another one")
        path = self.root
        for part in key.split("/"):
            path = path / part
            if path.is_symlink():
                raise DamagedError(f"{path} is a link: a store holds files only; remove it")

    def walk(self, prefix: str, most: int) -> Entries | None:
        """The files below a prefix, or None where it holds more than ``most`` names.

        Links are passed over, not followed (the disk's client would, in circles).
        """
        entries: Entries = []
        seen = 0
        for place, folders, names in os.walk(self.root / prefix):
            seen += len(folders) + len(names)
            if seen > most:
                return None
            for name in names:
                path = Path(place, name)
                key = path.relative_to(self.root).as_posix()
                with contextlib.suppress(FileNotFoundError, ArchipelError):  # removed just now; no name of ours
                    status = path.lstat()
                    if stat.S_ISREG(status.st_mode):
                        entries.append(Entry(check_key(key), status.st_size, status.st_mtime))
        return sorted(entries, key=lambda entry: entry.key)

    def sync(self, key: str) -> None:
        """Make an object survive a power cut: the file and the folders above it, up to the root."""
        path = self.root / key
        for place in (path, *path.parents):
            with contextlib.suppress(FileNotFoundError):  # replaced by another writer just now
                handle = os.open(place, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
            if place == self.root:
                return

    def now(self) -> float | None:
        """The disk's time (POSIX seconds), by a file made for it; None where none can be made."""
        with contextlib.suppress(OSError):
            mark = self.root / f".clock-{os.urandom(6).hex()}"
            mark.touch()
            try:
                return mark.stat().st_mtime
            finally:
                mark.unlink(missing_ok=True)
        return None


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
