"""Hugging Face data sets: a folder saved by ``save_to_disk``, a folder of parquet files, or a hub id.

Local data is read with pyarrow alone, and only files inside the folder. Hub ids go through ``datasets`` with remote
code never trusted and telemetry off. The video column holds ``{"bytes", "path"}`` or raw bytes; torchcodec is not
needed, since the bytes never reach a decoding feature.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from archipel import store
from archipel.config import Clips
from archipel.data.base import (
    MAX_CLIP_BYTES,
    SPLIT_NAMES,
    Item,
    Rejected,
    Window,
    inside,
    is_url,
    make_item,
    require,
)
from archipel.data.decode import decode_clip
from archipel.errors import ArchipelError, DamagedError

_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?(?:@[\w./-]+)?")
_BATCH = 1024


class _Table(Protocol):
    """Rows of one file or split: what is needed of them, without holding the clips in memory."""

    columns: list[str]
    rows: int

    def texts(self, names: list[str]) -> Iterator[dict[str, Any]]: ...

    def cell(self, name: str, row: int) -> Any: ...


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Rejected("undecodable text: the caption is not UTF-8")


class _Arrow:
    """A memory-mapped Arrow table."""

    def __init__(self, table: Any) -> None:
        self._table, self.columns, self.rows = table, list(table.column_names), int(table.num_rows)

    def texts(self, names: list[str]) -> Iterator[dict[str, Any]]:
        for row in range(self.rows):
            yield {name: _value(self._table[name][row]) for name in names}

    def cell(self, name: str, row: int) -> Any:
        return _value(self._table[name][row])


class _Parquet:
    """A parquet file, read one row group at a time."""

    def __init__(self, path: Path) -> None:
        arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
        try:
            self._file = parquet.ParquetFile(path)
        except (arrow.ArrowException, OSError) as error:
            raise DamagedError(f"{path} is not a readable parquet file ({type(error).__name__})") from error
        self.columns, self.rows = list(self._file.schema_arrow.names), int(self._file.metadata.num_rows)
        groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.metadata.num_row_groups)]
        self._ends = np.cumsum([0, *groups])
        self._held: tuple[int, str, Any] | None = None

    def texts(self, names: list[str]) -> Iterator[dict[str, Any]]:
        for batch in self._file.iter_batches(_BATCH, columns=names):
            for row in range(batch.num_rows):
                yield {name: _value(batch.column(name)[row]) for name in names}

    def cell(self, name: str, row: int) -> Any:
        group = int(np.searchsorted(self._ends, row, side="right")) - 1
        if self._held is None or self._held[:2] != (group, name):
            self._held = (group, name, self._file.read_row_group(group, columns=[name])[name])
        return _value(self._held[2][row - int(self._ends[group])])


def _saved_tables(root: Path) -> list[tuple[str, _Table]]:
    """The tables of ``save_to_disk``: a DatasetDict has a folder per split, a Dataset is one folder."""
    if (root / "dataset_dict.json").exists():
        names = store.read_json(root / "dataset_dict.json").get("splits", [])
        found: list[tuple[str, _Table]] = []
        for name in names:
            if inside(str(name)) is None:
                raise ArchipelError(f"{root / 'dataset_dict.json'} names a split outside its folder: {name!r}")
            found += [(str(name), table) for _, table in _saved_tables(root / str(name))]
        return found
    arrow = require("pyarrow")
    found = []
    for entry in store.read_json(root / "state.json").get("_data_files", []):
        name = str(entry.get("filename", ""))
        path = root / name
        if inside(name) is None or not path.resolve().is_relative_to(root.resolve()):
            raise ArchipelError(f"{root / 'state.json'} names a file outside its folder: {name!r}")
        try:
            table = arrow.ipc.open_stream(arrow.memory_map(str(path))).read_all()
        except (arrow.ArrowException, OSError) as error:
            raise DamagedError(f"{path} is not a readable Arrow file ({type(error).__name__})") from error
        found.append(("", _Arrow(table)))
    return found


def _parquet_tables(root: Path) -> list[tuple[str, _Table]]:
    """Parquet files below ``root``; ``train-00000-of-00001.parquet`` and ``test/x.parquet`` name their split."""
    found: list[tuple[str, _Table]] = []
    for path in sorted(root.rglob("*.parquet")):
        if not path.resolve().is_relative_to(root.resolve()):
            raise ArchipelError(f"{path} is a link that leads out of {root}: it is not followed")
        words = [*path.relative_to(root).parts[:-1], re.split(r"[-_.]", path.name)[0]]
        found.append((next((word for word in reversed(words) if word.lower() in SPLIT_NAMES), ""), _Parquet(path)))
    return found


def quiet_hub() -> None:
    """Switch off telemetry, download counting and remote code of the hub's libraries, also where they are imported."""
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "HF_DATASETS_TRUST_REMOTE_CODE": "0",
    }.items():
        os.environ[name] = value
    constants = require("huggingface_hub.constants")
    constants.HF_HUB_DISABLE_TELEMETRY = True
    config = require("datasets").config
    config.HF_UPDATE_DOWNLOAD_COUNTS = False


def _hub_tables(name: str) -> tuple[list[tuple[str, _Table]], str, str]:
    """(tables by split, licence, fingerprint) of a hub id, which may carry ``@revision``."""
    quiet_hub()
    datasets = require("datasets")
    where, _, revision = name.partition("@")
    # Since version 4 there are no script data sets at all, and the argument is gone with them.
    legacy = {"trust_remote_code": False} if int(datasets.__version__.split(".")[0]) < 4 else {}
    try:
        loaded = datasets.load_dataset(where, revision=revision or None, **legacy)
    except Exception as error:  # the hub's libraries raise whatever their HTTP stack raises
        raise _explain_hub(name, error) from error
    tables: list[tuple[str, _Table]] = [(str(split), _Arrow(part.data.table)) for split, part in loaded.items()]
    first = next(iter(loaded.values()))
    prints = "-".join(str(part._fingerprint) for part in loaded.values())
    return tables, str(first.info.license or ""), prints


def _explain_hub(name: str, error: Exception) -> ArchipelError:
    said = f"{type(error).__name__}: {error}"
    chain, cause = said, error.__cause__ or error.__context__
    while cause is not None:
        chain, cause = f"{chain} {type(cause).__name__}: {cause}", cause.__cause__ or cause.__context__
    if re.search(r"script|trust_remote_code|custom code", said, re.IGNORECASE):
        return ArchipelError(
            f"{name} is a data set with code of its own, which Archipel never runs: convert it to parquet"
        )
    if re.search(r"Connect|Offline|Timeout|resolve|unreachable|Max retries|LocalEntryNotFound", chain):
        return ArchipelError(
            f"no network: the data set {name} could not be fetched ({type(error).__name__}). Try `--source shapes`, "
            "which needs no network, or give a local folder saved with save_to_disk"
        )
    return ArchipelError(f"the data set {name} cannot be loaded: {said.splitlines()[0][:300]}")


class HuggingFace:
    """The ``huggingface`` source. Splits named train, validation (dev) and test are kept where there are several."""

    name = "huggingface"

    def __init__(self, clips: Clips) -> None:
        if is_url(clips.path):
            raise ArchipelError(
                f"clips.path = {clips.path!r} is a command or an address: give a local folder or a hub id"
            )
        self._path, self._clips = clips.path, clips
        self._root: Path | None = Path(clips.path).expanduser()
        if not self._root.exists():
            if not _HUB_ID.fullmatch(clips.path):
                raise ArchipelError(
                    f"clips.path = {clips.path!r} is neither a folder here nor a hub id such as user/name"
                )
            self._root = None
        elif not self._root.is_dir():
            raise ArchipelError(f"clips.path = {clips.path!r} is a file: give the folder that holds the data set")
        self.license = clips.license or "not stated: set clips.license"
        self._tables: list[tuple[str, _Table]] | None = None
        self._where: dict[str, tuple[int, int]] = {}
        self._fingerprint = ""

    def _load(self) -> list[tuple[str, _Table]]:
        if self._tables is not None:
            return self._tables
        root = self._root
        if root is None:
            self._tables, stated, self._fingerprint = _hub_tables(self._path)
            self.license = self._clips.license or stated or self.license
        elif (root / "state.json").exists() or (root / "dataset_dict.json").exists():
            self._tables = _saved_tables(root)
        else:
            self._tables = _parquet_tables(root)
        if not self._tables:
            raise ArchipelError(f"{self._path} holds no data set: neither save_to_disk's files nor parquet")
        for column in (self._clips.video_column, self._clips.caption_column):
            for _, table in self._tables:
                if column not in table.columns:
                    key = "clips.video_column" if column == self._clips.video_column else "clips.caption_column"
                    raise ArchipelError(
                        f"{key} = {column!r} is not a column of {self._path}: it has {', '.join(table.columns)}"
                    )
        return self._tables

    def items(self) -> list[Item]:
        tables = self._load()
        split_names = {split for split, _ in tables}
        items = []
        counted: dict[str, int] = {}
        for number, (split, table) in enumerate(tables):
            extra = [name for name in ("group", "split") if name in table.columns]
            own = split if len(split_names) > 1 and split.lower() in SPLIT_NAMES else None
            for row, cells in enumerate(table.texts([self._clips.caption_column, *extra])):
                place = counted.get(split, 0)
                counted[split] = place + 1
                key = f"{split or 'rows'}/{place:07d}"
                self._where[key] = (number, row)
                bad = next((v for v in cells.values() if isinstance(v, Rejected)), None)
                if bad is not None:
                    items.append(Item(key, None, key, error=bad.reason))
                    continue
                caption = cells[self._clips.caption_column]
                items.append(make_item(key, caption, cells.get("group"), cells.get("split") or own))
        return items

    def read(self, item: Item) -> bytes:
        number, row = self._where[item.key]
        value = self._load()[number][1].cell(self._clips.video_column, row)
        if isinstance(value, dict):
            if isinstance(value.get("bytes"), bytes):
                value = value["bytes"]
            elif isinstance(value.get("path"), str):
                value = self._from_path(value["path"])
        if value is None:
            raise Rejected("no frames: the video cell is empty")
        if not isinstance(value, bytes):
            raise Rejected(f"not a clip: the video cell holds {type(value).__name__}, not bytes")
        return value

    def _from_path(self, name: str) -> bytes:
        """A clip that a cell names instead of holding it: only below the data set's folder or the hub's own cache."""
        if is_url(name):
            raise Rejected("outside the data set: the cell holds an address, which is not followed")
        if self._root is not None:
            root = self._root
        else:
            root = Path(require("datasets").config.HF_DATASETS_CACHE).parent
        path = root / name
        try:
            if not path.resolve().is_relative_to(root.resolve()):
                raise Rejected("outside the data set: the cell names a file elsewhere, which is not read")
            if path.stat().st_size > MAX_CLIP_BYTES:
                raise Rejected("too large: over 2 GiB; cut it into clips first")
            return path.read_bytes()
        except (OSError, ValueError) as error:
            raise Rejected(f"missing: the file that the cell names cannot be read ({type(error).__name__})") from error

    def decode(self, item: Item, data: bytes, window: Window) -> np.ndarray:
        return decode_clip(data, window)

    def provenance(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"rows": sum(table.rows for _, table in self._load())}
        if self._root is None:
            return {**facts, "hub": self._path, "fingerprint": self._fingerprint}
        return {**facts, "folder": self._root.name}
