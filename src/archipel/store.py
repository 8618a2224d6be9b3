"""Files of a run: written aside and renamed, hashed, listed in a card that is written last, locked while worked on.

Nothing here imports torch. Tensors are numpy arrays in safetensors files, read through a memory map.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from archipel import FORMAT
from archipel.errors import ArchipelError, DamagedError, LockedError

_CHUNK = 1 << 20
_MAX_HEADER = 100 << 20  # the safetensors reference implementation's own bound
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "BOOL": np.dtype("?"),
}


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON-able value in its canonical form (sorted keys, no spaces)."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on leaving without an error it is synced and renamed over ``path``.

    After an error ``path`` holds what it held before and the temporary file is gone. The temporary name keeps the
    suffix of ``path``, since writers of video choose the container by it. An OSError that names no file (a full disk,
    met while writing) comes out naming ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".tmp{path.suffix}", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
        _fsync_folder(path.parent)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    with aside(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises DamagedError naming the file where it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} is not readable JSON ({error}); restore it or remove it to make it anew") from error


def append_jsonl(path: Path, value: Mapping[str, Any]) -> None:
    """Append one object as one line; a single write, so that a kill leaves at most one torn last line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSONL file; a torn last line (a killed writer) is left out. Missing file: empty."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


# --- tensors ---------------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write numpy arrays as safetensors, aside and renamed. The order of names does not change the bytes."""
    from safetensors.numpy import save

    ordered = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    write_bytes(path, save(ordered, metadata=dict(metadata) if metadata else None))


def map_tensors(path: Path, only: Container[str] | None = None) -> dict[str, np.ndarray]:
    """Memory-map the tensors of a safetensors file (of ``only`` these names), read-only; nothing is read until it is touched.

    Every tensor that is mapped is an open file for as long as it is held.
    Raises DamagedError where the header or a tensor's extent does not fit the file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise DamagedError(f"{path} is not a whole safetensors file (header of {length} bytes in {size})")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is missing") from error
    except ValueError as error:
        raise DamagedError(f"{path} has an unreadable safetensors header ({error})") from error
    tensors: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        if name == "__metadata__" or (only is not None and name not in only):
            continue
        try:
            dtype, shape = _DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"{path}: tensor {name!r} has an unusable header entry ({error!r})") from error
        count = int(np.prod(shape, dtype=np.int64))
        if (
            min(shape, default=0) < 0
            or end - begin != count * dtype.itemsize
            or not 0 <= begin <= end <= size - 8 - length
        ):
            raise DamagedError(f"{path}: tensor {name!r} does not fit into the file")
        if count == 0:
            tensors[name] = np.empty(shape, dtype)
        else:
            tensors[name] = np.memmap(path, dtype, "r", 8 + length + begin, shape)
    return tensors


# --- cards: what a finished folder holds -----------------------------------------------------------------------------

CHECK = "check"


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with the sha256 of its own content as its last entry: what ``sealed`` looks at."""
    rest = json.loads(json.dumps({key: part for key, part in value.items() if key != CHECK}))
    write_json(path, {**rest, CHECK: sha256_json(rest)})


def sealed(value: Mapping[str, Any]) -> bool:
    """Whether a parsed JSON object is as it was written: sealed and whole, or an older one that has no seal."""
    last = next(reversed(list(value)), "")  # a seal is the last entry, also where a flipped bit has changed its name
    whole = value.get(last) == sha256_json({key: part for key, part in value.items() if key != last})
    return whole and last == CHECK if CHECK in value else not whole


def write_card(
    folder: Path,
    kind: str,
    run_id: str,
    files: Iterable[str],
    *,
    hashed: Mapping[str, str] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Commit a folder: hash ``files`` (paths relative to it) and write ``card.json`` last. ``hashed``: the sha256 of files that
    this process has hashed since they were written.

    A folder without a card is unfinished work; one with a card is done, and ``verify`` holds it to its checksums.
    """
    listed = {}
    for name in sorted(files):
        path = folder / name
        listed[name] = {"sha256": (hashed or {}).get(name) or sha256_file(path), "bytes": path.stat().st_size}
    card = {"format": FORMAT, "kind": kind, "run": run_id, **fields, "files": listed}
    write_sealed(folder / "card.json", card)
    return card


def read_card(folder: Path, kind: str | None = None) -> dict[str, Any] | None:
    """The card of a finished folder, or None where there is none. A newer format is refused, naming both versions."""
    path = folder / "card.json"
    if not path.exists():
        return None
    card = read_json(path)
    if not isinstance(card, dict) or not isinstance(card.get("format"), int):
        raise DamagedError(f"{path} is not a card (no integer 'format'); remove it to make the folder anew")
    if not sealed(card):
        raise DamagedError(f"{path} is damaged: its content is not what was written; remove it to make the folder anew")
    if card["format"] > FORMAT:
        raise ArchipelError(
            f"{path} has format {card['format']}, this Archipel reads format {FORMAT}: "
            f"install a newer Archipel (one that writes format {card['format']})"
        )
    if kind is not None and card.get("kind") != kind:
        raise DamagedError(f"{path} is a card of kind {card.get('kind')!r}, expected {kind!r}")
    if not _lists_files(card.get("files")):
        raise DamagedError(f"{path} does not list its files with sha256 and bytes; remove it to make the folder anew")
    return cast(dict[str, Any], card)


def _lists_files(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and isinstance(entry.get("bytes"), int)
        for entry in files.values()
    )


@dataclass(frozen=True)
class Problem:
    """One finding of ``verify``: the file and what is wrong with it."""

    path: Path
    reason: str


def check_card(folder: Path) -> list[Problem]:
    """Hold every file that a folder's card lists to its size and sha256. No card: no claim, no problem."""
    card = read_card(folder)
    if card is None:
        return []
    problems = []
    for name, entry in card["files"].items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            problems.append(Problem(folder / "card.json", f"lists a file outside its folder: {name!r}"))
        elif not path.is_file():
            problems.append(Problem(path, "is missing"))
        elif path.stat().st_size != entry["bytes"]:
            problems.append(Problem(path, f"has {path.stat().st_size} bytes, the card says {entry['bytes']}"))
        elif sha256_file(path) != entry["sha256"]:
            problems.append(Problem(path, "is damaged: its sha256 is not the one in the card"))
    return problems


# --- locks -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold an advisory lock on this machine for as long as the block runs; a dead holder's lock is free at once.

    Raises LockedError where another process holds it.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(str(path), timeout=0)
    try:
        held.acquire()
    except Timeout as error:
        raise LockedError(f"another process is working on {what} ({path} is locked): wait for it or stop it") from error
    try:
        yield
    finally:
        held.release()
