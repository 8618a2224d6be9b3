"""``clips/manifest.parquet``: one row per usable clip, in a fixed order that every cache entry shares."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from archipel import store
from archipel.errors import ArchipelError, DamagedError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)  # a million of them: without a dictionary each
class Clip:
    """One usable clip.

    id: first 16 hex digits of ``sha256`` (of the clip's source bytes); file: its name within the source;
    group: content group (all variants of one thing share it, and it never straddles splits or clusters);
    motion: mean absolute difference of consecutive frames, in [0, 1].
    """

    id: str
    sha256: str
    file: str
    caption: str
    group: str
    split: Split
    motion: float


def write_manifest(path: Path, clips: list[Clip]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({field.name: [getattr(clip, field.name) for clip in clips] for field in fields(Clip)})
    with store.aside(path) as temporary:
        pq.write_table(table, temporary)


def read_manifest(path: Path) -> list[Clip]:
    """All rows in order. Raises ArchipelError where the stage has not run, DamagedError where it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        raise ArchipelError(f"{path} is not there yet: run `archipel prepare` first")
    try:
        table, names = pq.read_table(path), [field.name for field in fields(Clip)]
        if set(table.column_names) != set(names):
            raise TypeError(f"its columns are {', '.join(table.column_names)}, expected {', '.join(names)}")
        columns = [table[name].to_pylist() for name in names]
        same: dict[str, str] = {}  # one string for each content group and split, not one for each clip
        for name in ("group", "split"):
            columns[names.index(name)] = [same.setdefault(one, one) for one in columns[names.index(name)]]
        return [Clip(*row) for row in zip(*columns, strict=True)]
    except (pa.ArrowException, OSError, TypeError) as error:
        raise DamagedError(f"{path} cannot be read as a manifest ({error})") from error


def rows_of(clips: list[Clip], split: Split) -> list[int]:
    """Row numbers (also rows of every cache entry) of one split."""
    return [row for row, clip in enumerate(clips) if clip.split == split]
