"""Work in pieces that may be done on other machines: what a stage asks for, and an engine may offer.

A stage names a function of its own module and hands over what each piece needs as arrays; an engine decides where the
function runs and brings its arrays back in order. Without an engine the same function runs here, piece after piece.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Arrays = Mapping[str, np.ndarray]
Make = Callable[[Path, Arrays], Arrays]
"""``make(root, given)``: a function at the top of a module. ``root`` is a folder that holds the files it was promised,
under their names in the run: the run's own folder, or a copy of those files on another machine."""


class Spread(Protocol):
    """Runs ``make`` on each of ``given`` somewhere and yields what it returned, in order.

    ``needs`` are files and folders of ``root`` (relative names) that ``make`` reads. ``device`` is where it computes:
    an engine gives pieces for ``cuda`` a GPU each. ``given`` is read as far ahead as the engine can keep busy with.
    Closing the generator ends it: what was on its way is dropped.
    """

    def __call__(
        self, make: Make, given: Iterable[Arrays], root: Path, needs: Sequence[str], *, device: str = "cpu"
    ) -> Generator[Arrays, None, None]: ...


def over_ranges(
    spread: Spread,
    make: Make,
    give: Callable[[int, int], Arrays],
    ranges: Sequence[tuple[int, int]],
    root: Path,
    needs: Sequence[str],
) -> Generator[Arrays, None, None]:
    """What ``make`` gives for each range of items, in order; ``give(begin, end)`` says here what a range needs."""
    yield from spread(make, (give(begin, end) for begin, end in ranges), root, needs)


def pack_json(value: Any) -> np.ndarray:
    """A JSON-able value as uint8 (bytes,), so that it travels among arrays."""
    return np.frombuffer(json.dumps(value, ensure_ascii=False).encode(), np.uint8)


def unpack_json(packed: np.ndarray) -> Any:
    return json.loads(packed.tobytes().decode())
