"""Tables of ``file, caption[, group, split]`` beside clips: CSV, JSONL or parquet. A cell that cannot be text rejects
its row; a table that cannot be a table is an error."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from archipel.data.base import Rejected, require
from archipel.errors import ArchipelError, DamagedError

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
Row = tuple[str, dict[str, Any] | Rejected]  # ("row 3", its cells or why it has none)


def read_table(path: Path) -> list[Row]:
    """All rows in order. Raises ArchipelError where the columns ``file`` and ``caption`` are missing, or the table
    cannot be read at all."""
    reader = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}[path.suffix.lower()]
    return list(reader(path))


def count_rows(path: Path) -> int:
    return len(read_table(path))


def _need_columns(path: Path, columns: list[str]) -> None:
    missing = [name for name in ("file", "caption") if name not in columns]
    if missing:
        raise ArchipelError(
            f"{path} has no column {' and no column '.join(missing)} (it has {', '.join(map(str, columns)) or 'none'}): "
            "a table of clips has the columns file, caption and, if wanted, group and split"
        )


def _text(data: bytes) -> str | Rejected:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Rejected(f"undecodable text: the row is not UTF-8 (byte {error.start})")


def _csv_rows(path: Path) -> Iterator[Row]:
    # Undecodable bytes are kept through the parser, so that they spoil their own row and no other.
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        columns = [str(name).strip() for name in reader.fieldnames or []]
        _need_columns(path, columns)
        reader.fieldnames = columns
        for row in reader:
            where = f"row {reader.line_num}"
            cells = {name: value for name, value in row.items() if name is not None}
            broken = any(isinstance(v, str) and any("\udc80" <= c <= "\udcff" for c in v) for v in cells.values())
            if broken and isinstance(cells.get("file"), str):
                cells["caption"] = Rejected("undecodable text: the caption is not UTF-8")
            yield where, cells
    except csv.Error as error:
        raise DamagedError(f"{path} is not readable CSV ({error})") from error


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        text = _text(line)
        if isinstance(text, Rejected):
            yield f"row {number}", text
            continue
        try:
            cells = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            yield f"row {number}", Rejected("undecodable text: the row is not JSON")
            continue
        if not isinstance(cells, dict):
            yield f"row {number}", Rejected("undecodable text: the row is not a JSON object")
            continue
        if number == 1:
            _need_columns(path, list(cells))
        yield f"row {number}", cells


def _parquet_rows(path: Path) -> Iterator[Row]:
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    try:
        table = parquet.read_table(path)
    except (arrow.ArrowException, OSError) as error:
        raise DamagedError(f"{path} is not a readable parquet file ({error})") from error
    _need_columns(path, table.column_names)
    columns = [name for name in ("file", "caption", "group", "split") if name in table.column_names]
    for number in range(table.num_rows):
        cells: dict[str, Any] = {}
        for name in columns:
            try:
                cells[name] = table[name][number].as_py()
            except UnicodeDecodeError:
                cells[name] = Rejected("undecodable text: the caption is not UTF-8")
        yield f"row {number + 1}", cells
