"""Full training state on disk: data first, a manifest with its sha256 last, the newest two kept.

``<folder>/<step>/state.safetensors`` holds parameters, their average and AdamW's moments; everything else (order,
noise, rate, average's weight) is a function of the step. A folder without a whole manifest, or whose data is not what
the manifest says, is recognised, named in the log and skipped for an older one.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from archipel import FORMAT, store
from archipel.errors import ArchipelError, DamagedError

logger = logging.getLogger("archipel")
STATE = "state.safetensors"
MANIFEST = "manifest.json"
KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """A good checkpoint: finished steps, memory-mapped arrays by name, and what the manifest holds besides."""

    step: int
    arrays: dict[str, np.ndarray]
    manifest: dict[str, Any]


def save(folder: Path, step: int, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Path:
    """Commit the state after ``step`` steps, then drop all but the newest two; gives the new one's folder.

    ``facts`` are JSON-able and come back in the manifest. After an OSError (a full disk) nothing older is lost.
    """
    from safetensors.numpy import save as encode

    target = folder / f"{step:08d}"
    data = encode({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)})
    try:
        (target / MANIFEST).unlink(missing_ok=True)  # being replaced: unfinished until the new manifest is there
        store.write_bytes(target / STATE, data)
        files = {STATE: {"sha256": store.sha256_bytes(data), "bytes": len(data)}}
        store.write_sealed(target / MANIFEST, {"format": FORMAT, "step": step, **facts, "files": files})
    except OSError:
        shutil.rmtree(target, ignore_errors=True)
        raise
    for old in _folders(folder)[KEEP:]:
        with contextlib.suppress(OSError):
            (old / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(old)
    return target


def latest(folder: Path, run_id: str, name: str | None = None) -> Checkpoint | None:
    """The newest good checkpoint (of job ``name``), or None. Damaged ones are named in the log and passed over.

    Raises ArchipelError for one of another run or of a newer format.
    """
    for path in _folders(folder):
        try:
            return _read(path, run_id, name)
        except (DamagedError, OSError) as error:
            logger.warning("checkpoint %s is passed over: %s", path.name, error)
    return None


def at(folder: Path, step: int, run_id: str) -> Checkpoint:
    """The checkpoint of a step that another process of this training has just found good: it is not hashed again."""
    return _read(folder / f"{step:08d}", run_id, None, hashed=False)


def _folders(folder: Path) -> list[Path]:
    """Step folders, newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.name.isdigit() and path.is_dir()), reverse=True)


def _read(path: Path, run_id: str, name: str | None, *, hashed: bool = True) -> Checkpoint:
    if not (path / MANIFEST).is_file():
        raise DamagedError("it has no manifest (its writer was stopped)")
    manifest = store.read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise DamagedError("its manifest is not one")
    if not store.sealed(manifest):
        raise DamagedError("its manifest is damaged: its content is not what was written")
    if manifest["format"] > FORMAT:
        raise ArchipelError(
            f"{path / MANIFEST} has format {manifest['format']}, this Archipel reads format {FORMAT}: "
            f"install a newer Archipel (one that writes format {manifest['format']})"
        )
    if manifest.get("run") != run_id:
        raise ArchipelError(
            f"{path} belongs to another run.toml (run {str(manifest.get('run'))[:12]}, this is {run_id[:12]}): "
            f"put the old run.toml back, or remove {path.parent} to train anew"
        )
    if name is not None and manifest.get("name", name) != name:
        raise DamagedError(f"it is of job {str(manifest['name'])[:40]!r}")
    try:
        wanted, step = manifest["files"][STATE], int(manifest["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"its manifest lacks {error}") from error
    if path.name != f"{step:08d}":
        raise DamagedError(f"its manifest is that of step {step}")
    if not (path / STATE).is_file():
        raise DamagedError(f"{STATE} is missing")
    size = (path / STATE).stat().st_size
    if size != wanted["bytes"]:
        raise DamagedError(f"{STATE} has {size} bytes, its manifest says {wanted['bytes']}")
    if hashed and store.sha256_file(path / STATE) != wanted["sha256"]:
        raise DamagedError(f"{STATE} is damaged: its sha256 is not the manifest's")
    return Checkpoint(step, store.map_tensors(path / STATE), manifest)
