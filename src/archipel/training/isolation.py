"""What a training process touched, seen through Python's audit events (PEP 578), in names relative to the run."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

EVIDENCE = (
    "Python audit events open and socket.connect of this process, from the start of the job; "
    "native code that opens files or connects by itself is not seen"
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND
_STEP = re.compile(r"(^|/)\d{8}(/|$)")
_ASIDE = re.compile(r"^\.(.+)\.[^.]+\.tmp(\.[^.]+)?$")  # what is written aside is listed by its final name
_watching: list[Touched] = []
_hooked = False


class Touched:
    """Files opened below ``root`` and addresses connected to. ``before`` is what earlier processes of the job touched."""

    def __init__(self, root: Path, before: Mapping[str, Any] | None = None) -> None:
        # As named and with links followed; Path.resolve alone would lose the first.
        self._roots = {os.path.abspath(root) + os.sep, os.path.realpath(root) + os.sep}  # noqa: PTH100
        old = before or {}
        self.read: set[str] = set(_strings(old.get("read")))
        self.wrote: set[str] = set(_strings(old.get("wrote")))
        self.connected: set[str] = set(_strings(old.get("connected")))

    def on_open(self, path: Any, flags: Any) -> None:
        if isinstance(path, int):
            return
        full = os.path.abspath(os.fsdecode(path))  # noqa: PTH100
        root = next((root for root in self._roots if full.startswith(root)), None)
        if root is None or Path(full).is_dir():
            return
        folder, _, file = full[len(root) :].replace(os.sep, "/").rpartition("/")
        file = _ASIDE.sub(r"\1\2", file)
        name = _STEP.sub(r"\1*\2", f"{folder}/{file}" if folder else file)
        (self.wrote if isinstance(flags, int) and flags & _WRITING else self.read).add(name)

    def on_connect(self, address: Any) -> None:
        """An internet address as host:port; a local socket without its path, which may name a user."""
        inet = isinstance(address, tuple) and len(address) >= 2
        self.connected.add(f"{address[0]}:{address[1]}" if inet else "a local socket")

    def as_dict(self) -> dict[str, Any]:
        """For a card: sorted names, and what the evidence covers. What the job wrote itself is not listed as read."""
        return {
            "read": sorted(self.read - self.wrote),
            "wrote": sorted(self.wrote),
            "connected": sorted(self.connected),
            "evidence": EVIDENCE,
        }


@contextlib.contextmanager
def watch(root: Path, before: Mapping[str, Any] | None = None) -> Iterator[Touched]:
    """Record for as long as the block runs. Hooks cannot be taken out of Python again: one is shared by all blocks."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    touched = Touched(root, before)
    _watching.append(touched)
    try:
        yield touched
    finally:
        _watching.remove(touched)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or event not in ("open", "socket.connect"):
        return
    with contextlib.suppress(Exception):  # an observer must not change what it observes
        for touched in _watching:
            if event == "open":
                touched.on_open(arguments[0], arguments[2])
            else:
                touched.on_connect(arguments[1])


def _strings(values: Iterable[Any] | None) -> list[str]:
    return [value for value in values or () if isinstance(value, str)]
