"""A run in a bucket, for whoever generates from it: what its owner admitted, brought into the user's cache folder.

    <cache>/runs/<run id>/run.toml, codec/          as published
    <cache>/runs/<run id>/admitted/<version>/       card.json (put there last), config.json, model.safetensors[, calibration.json]

A version is the sha256 of the card (and of the calibration), so nothing there is ever replaced, and processes share it. What
is fetched is bounded, held to its sha256 and looked at again whenever it is loaded. Only ``admitted/`` is read: what an
island committed is a stranger's until the owner's ``archipel admit`` has copied it there.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archipel import store
from archipel.data.fetch import cache_folder
from archipel.errors import ArchipelError, DamagedError, LockedError
from archipel.islands import keys
from archipel.islands.bucket import Bucket
from archipel.islands.claims import read_state
from archipel.islands.objects import Objects, StoreError, decode
from archipel.islands.trust import Bounds
from archipel.progress import Progress
from archipel.run import DAMAGED, Run

logger = logging.getLogger("archipel")
LOOK_EVERY = 30.0  # seconds: a long-lived process asks the bucket for late experts no more often by itself
PATIENCE = 60.0  # seconds that the store may stay away while something is fetched
_QUICK = 5.0  # the same where nothing depends on the answer
_WAIT = 3600.0  # seconds to wait for another process that fetches the same files
_POINTER = 1 << 20  # bytes
_CODEC = 4 << 30  # bytes of one file of a codec
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WEIGHTS, _CONFIG, _CALIBRATION = "model.safetensors", "config.json", "calibration.json"


def title(name: str) -> str:
    """ "expert 2", "the router": how a job is called in a sentence."""
    return f"expert {name}" if name.isdigit() else f"the {name}"


@dataclass(frozen=True)
class Admitted:
    """What ``admitted/<name>.json`` points to: the card's sha256, the attempt it came from, and the calibration's file."""

    name: str
    sha256: str
    fence: int
    files: Mapping[str, tuple[str, int]] = field(default_factory=dict)  # file -> sha256, bytes

    @property
    def version(self) -> str:
        calibration = self.files.get(_CALIBRATION)
        return self.sha256 + (f"-{calibration[0][:16]}" if calibration else "")


def read_admitted(objects: Objects, name: str) -> Admitted | None:
    """The admitted result of a job, or None where there is none. Raises DamagedError, StoreError."""
    data = objects.get(keys.admitted(name), _POINTER)
    if data is None:
        return None
    value, where = decode(data), f"{keys.admitted(name)} in {objects.url}"
    sha256, fence = value.get("sha256"), value.get("fence")
    if value.get("name") != name or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise DamagedError(f"{where} does not point to an admitted expert: admit it again")
    if not isinstance(fence, int) or isinstance(fence, bool) or not 0 < fence <= keys.MAX_FENCE:
        raise DamagedError(f"{where} has no fence: admit it again")
    return Admitted(name, sha256, fence, listed_files(value.get("files"), where))


def listed_files(value: Any, where: str) -> dict[str, tuple[str, int]]:
    """{file: (sha256, bytes)} of a card's or pointer's "files". Raises DamagedError naming the entry that is not right."""
    if not isinstance(value, dict):
        raise DamagedError(f"{where} does not list its files")
    found: dict[str, tuple[str, int]] = {}
    for name, entry in value.items():
        sha256, size = (entry.get("sha256"), entry.get("bytes")) if isinstance(entry, dict) else (None, None)
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise DamagedError(f"{where}: {str(name)[:80]!r} has no number of bytes")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise DamagedError(f"{where}: {str(name)[:80]!r} has no sha256")
        found[str(name)] = (sha256, size)
    return found


def read_card(objects: Objects, found: Admitted, run_id: str) -> bytes:
    """The admitted card's bytes: those that the pointer promises, of this run and job. Raises DamagedError."""
    key = keys.admitted(found.sha256, keys.CARD)
    data = objects.get(key, Bounds().card)
    if data is None or store.sha256_bytes(data) != found.sha256:
        state = "missing" if data is None else "damaged: it is not what its key says"
        raise DamagedError(f"{key} in {objects.url} is {state}; admit {title(found.name)} again")
    card = decode(data)
    if card.get("run") != run_id or card.get("name", found.name) != found.name:
        raise DamagedError(f"{key} in {objects.url} is the card of another run or job, not of {title(found.name)}")
    return data


def fetch_admitted(objects: Objects, found: Admitted, run_id: str, folder: Path) -> dict[str, tuple[str, int]]:
    """Bring an admitted part into ``folder``, its card last; continues what was interrupted. Returns the card's files.

    Raises DamagedError for bytes that are not those of the card, ArchipelError for what is too large for the bounds or
    the disk, StoreError.
    """
    card = read_card(objects, found, run_id)
    files = listed_files(decode(card).get("files"), f"the card of {title(found.name)} in {objects.url}")
    bounds = Bounds()
    wanted = {_CONFIG: bounds.config, _WEIGHTS: bounds.weights}
    absent = [name for name in wanted if name not in files]
    if absent:
        raise DamagedError(f"the card of {title(found.name)} in {objects.url} does not list {absent[0]}")
    todo = {name: (*files[name], limit) for name, limit in wanted.items()}
    if _CALIBRATION in found.files:
        todo[_CALIBRATION] = (*found.files[_CALIBRATION], bounds.config)
    for name, (_, size, limit) in todo.items():
        if size > limit:
            raise ArchipelError(
                f"{name} of {title(found.name)} in {objects.url} has {size} bytes, at most {limit} are read"
            )
    total = sum(size for _, size, _ in todo.values())
    check_space(folder, total)
    with Progress(f"fetch {title(found.name)} (kB)", max(1, total // 1000)) as bar:
        for name, (sha256, size, _) in todo.items():
            key = keys.admitted(found.sha256, name)
            objects.fetch(key, folder / name, sha256=sha256, size=size, on_bytes=lambda n: bar.advance(n // 1000))
        bar.update(bar.total)
    store.write_bytes(folder / keys.CARD, card)
    return files


def check_space(folder: Path, size: int) -> None:
    """Raise ArchipelError where ``size`` bytes do not fit on the folder's disk."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ArchipelError(
            f"{folder} has {free >> 20} MB free, {(size >> 20) + 1} MB are needed: make room, or use another disk "
            "(ARCHIPEL_CACHE says where the cache folder is)"
        )


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait for whoever fetches the same files; a dead process's lock is free at once."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(str(path), timeout=_WAIT)
    try:
        held.acquire()
    except Timeout as error:
        raise LockedError(f"another process has been fetching for an hour ({path}): stop it, or wait") from error
    try:
        yield
    finally:
        held.release()


class BucketRun:
    """The admitted parts of a run in a bucket: a ``Source`` for ``archipel.ensemble.parts.Parts``."""

    uncalibrated = True  # whoever generates has no clips to calibrate on; said in the warnings

    def __init__(self, bucket: Bucket, folder: Path) -> None:
        self.run, self.where = Run(folder, bucket.config, bucket.id), bucket.url
        self._bucket, self._objects = bucket, bucket.objects
        self._quick = Objects.open(bucket.url, patience=_QUICK)
        self._found: dict[str, str] | None = None
        self._pointers: dict[str, tuple[tuple[int, float], Admitted | DamagedError]] = {}
        self._looked = self._told_at = float("-inf")
        self._told: dict[str, str] = {}

    # --- what is there ------------------------------------------------------------------------------------------

    def look(self, *, fresh: bool = True) -> dict[str, str]:
        """One listing of ``admitted/`` and each new pointer. A store that is away is no error while nothing is needed."""
        if not fresh and self._found is not None and time.monotonic() - self._looked < LOOK_EVERY:
            return self._found
        try:
            self._found = self._list(self._objects if fresh or self._found is None else self._quick, fresh)
        except StoreError as error:
            if fresh or self._found is None:
                raise
            logger.warning("late experts cannot be looked for: %s", error)
        self._looked = time.monotonic()
        return self._found

    def _list(self, objects: Objects, fresh: bool) -> dict[str, str]:
        there = {entry.key: (entry.size, entry.modified) for entry in objects.list(keys.ADMITTED)}
        found = {}
        for name in self._bucket.jobs:
            mark = there.get(keys.admitted(name))
            if mark is None:
                self._pointers.pop(name, None)
                continue
            if fresh or self._pointers.get(name, (None,))[0] != mark:
                try:
                    pointer: Admitted | DamagedError | None = read_admitted(objects, name)
                except DamagedError as error:
                    pointer = error  # whoever asks for it is told, others go on
                if pointer is None:
                    continue
                self._pointers[name] = (mark, pointer)
            pointed = self._pointers[name][1]
            found[name] = pointed.version if isinstance(pointed, Admitted) else DAMAGED
        return found

    def how(self, names: Sequence[str]) -> str:
        """What to do about parts that are not admitted. Asked anew when some seconds have passed."""
        if time.monotonic() - self._told_at >= LOOK_EVERY:
            self._told, self._told_at = {}, time.monotonic()
        for name in names:
            if name not in self._told:
                self._told[name] = self._tell(name)
        return "; ".join(self._told[name] for name in names)

    def _tell(self, name: str) -> str:
        try:
            state = read_state(self._quick, name)
            if not state.done:
                return f"{title(name)} is not trained yet: `archipel status {self.where}` shows who works on it"
            fence = state.committed.get("fence")
            answer = decode(self._quick.get(keys.refused(name, fence))) if isinstance(fence, int) else {}
        except ArchipelError:
            return f"{title(name)} is not admitted"
        if answer:
            return f"{title(name)} was refused (rule {str(answer.get('rule'))[:40]})"
        return f"{title(name)} is committed but not admitted: `archipel admit {self.where} {name}`"

    # --- bringing it here ---------------------------------------------------------------------------------------

    def folder(self, name: str, version: str) -> Path:
        """The part in the cache folder, fetched where it is missing or damaged there."""
        pointed = self._pointers[name][1]
        if isinstance(pointed, DamagedError):
            raise pointed
        folder = self.run.root / keys.ADMITTED / pointed.version
        with _alone(self.run.root / ".locks" / f"{pointed.version}.lock"):
            if not self._whole(folder, pointed):
                (folder / keys.CARD).unlink(missing_ok=True)
                fetch_admitted(self._objects, pointed, self.run.id, folder)
        return folder

    def _whole(self, folder: Path, pointed: Admitted) -> bool:
        """Whether the cached files are still what the pointer promises; a disk's own damage is mended by fetching."""
        with contextlib.suppress(DamagedError, OSError):
            if store.sha256_file(folder / keys.CARD) != pointed.sha256:
                return False
            files = listed_files((store.read_card(folder) or {}).get("files"), str(folder))
            wanted = {name: files[name] for name in (_CONFIG, _WEIGHTS)} | dict(pointed.files)
            for name in (_CONFIG, _WEIGHTS, *((_CALIBRATION,) if _CALIBRATION in pointed.files else ())):
                path = folder / name
                if path.is_symlink() or path.stat().st_size != wanted[name][1]:
                    return False
                if store.sha256_file(path) != wanted[name][0]:
                    logger.warning("%s is damaged and is fetched again", path)
                    path.unlink()
                    return False
            return True
        return False

    def codec(self) -> Path:
        return _fetch_part(self._bucket, self.run, "codec", self.run.codec)

    def base(self) -> Path:
        return fetch_base(self._bucket, self.run)

    def text(self) -> Path:
        return _fetch_part(self._bucket, self.run, keys.TEXT, self.run.text)


def cached_run(bucket: Bucket) -> Run:
    """The user's own copy of what was published of a run, in the cache folder."""
    return Run(cache_folder() / "runs" / bucket.id, bucket.config, bucket.id)


def fetch_base(bucket: Bucket, run: Run) -> Path:
    """The weights that experts are adapters of, in ``run.base``: fetched where they are missing or damaged there."""
    return _fetch_part(bucket, run, keys.BASE, run.base)


def _fetch_part(bucket: Bucket, run: Run, prefix: str, folder: Path) -> Path:
    with _alone(run.root / ".locks" / f"{prefix}.lock"):
        if not run.done(folder) or store.check_card(folder):
            (folder / keys.CARD).unlink(missing_ok=True)
            fetch_published(bucket, prefix, folder)
    return folder


def fetch_published(bucket: Bucket, prefix: str, folder: Path, on_bytes: Callable[[int], None] = lambda _: None) -> int:
    """Bring the published files below ``prefix`` (codec, shards/2) into ``folder``, the card last; files that are there
    and right are kept. Returns how many were fetched. Raises DamagedError, StoreError, ArchipelError."""
    files = {key: file for key, file in bucket.files.items() if key.startswith(f"{prefix}/")}
    if f"{prefix}/{keys.CARD}" not in files:
        raise DamagedError(f"{keys.PUBLISHED} in {bucket.url} lists no {prefix}: publish the run again")
    if prefix == "codec" and any(file.size > _CODEC for file in files.values()):
        raise ArchipelError(f"the codec in {bucket.url} has a file of more than {_CODEC >> 30} GB: it is not fetched")
    check_space(folder, sum(file.size for file in files.values()))
    fetched = 0
    for key in sorted(files, key=lambda key: key == f"{prefix}/{keys.CARD}"):
        path, file = folder / key.removeprefix(f"{prefix}/"), files[key]
        if path.is_file() and path.stat().st_size == file.size and store.sha256_file(path) == file.sha256:
            continue
        bucket.fetch(key, path, on_bytes)
        fetched += 1
    return fetched


def open_source(url: str, run_id: str | None = None) -> BucketRun:
    """The run in a bucket, for generating: reads ``run.toml`` and ``published.json``. Raises ArchipelError, StoreError."""
    bucket = Bucket.read(Objects.open(url, patience=PATIENCE), run_id)
    folder = cached_run(bucket).root
    if not (folder / keys.RUN).is_file():
        store.write_bytes(folder / keys.RUN, bucket.run_toml)
    return BucketRun(bucket, folder)
