"""A store of objects, local or far: create-if-absent, put, get and list, with retries, checks and a count of what moved.

The adapter around obstore that islands stand on. An answer is never taken for more than it says: a create whose response
was lost is read back, a transfer is held to its sha256, a store that stays away is waited for with growing pauses.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from archipel.errors import ArchipelError, DamagedError, Stopped
from archipel.islands.answers import ABSENT, AGAIN, DENIED, FINAL, SHORT, TAKEN, kind_of, no_bucket, say, words
from archipel.islands.answers import AwayError as AwayError
from archipel.islands.answers import IgnoresConditionsError as IgnoresConditionsError
from archipel.islands.answers import StoreError as StoreError
from archipel.islands.folder import Entries, Folder
from archipel.islands.folder import Entry as Entry
from archipel.islands.keys import check_key
from archipel.islands.traffic import Traffic as Traffic
from archipel.islands.urls import check_url, connect, http_date, local_root

SMALL = 4 << 20  # bytes: bound of what `get` reads into memory unless told otherwise
PATIENCE = 600.0  # seconds that a store may stay away before work ends
MOST = 200_000  # objects in one listing: far more than any job writes, and few enough to hold
_CHUNK = 8 << 20  # bytes moved by one request: what a broken transfer loses at most
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
T = TypeVar("T")
Keys = list[str]


class Objects:
    """One prefix of one store. Threads may share it; ``give_up`` (asked while waiting) ends a wait with Stopped."""

    def __init__(
        self, store: Any, url: str, root: Path | None, endpoint: str, patience: float, timeout: float = 60.0
    ) -> None:
        self.url, self.root, self.patience = url, root, patience
        self.traffic = Traffic()
        self.reads: set[str] = set()
        self.writes: set[str] = set()
        self.give_up: Callable[[], bool] = lambda: False
        self._store, self._endpoint = store, endpoint
        self._said_away = False
        self._folder = Folder(root) if root is not None else None
        self._timeout = timeout

    @classmethod
    def open(cls, url: str | Path, *, patience: float = PATIENCE, timeout: float = 60.0, make: bool = False) -> Objects:
        """Open a folder path or URL; ``make`` creates a local folder. Nothing is asked of a remote store yet.

        ``timeout``: seconds for one request, its body included. Raises ArchipelError for a URL that cannot be used
        or a folder that is not there.
        """
        url = check_url(str(url))
        root = local_root(url)
        if root is None:
            try:
                store, endpoint = connect(url, timeout)
            except Exception as error:
                raise StoreError(f"{url} cannot be opened: {words(error)}") from None
            return cls(store, url, None, endpoint, patience, timeout)
        from obstore.store import LocalStore

        if make:
            root.mkdir(parents=True, exist_ok=True)
        if not root.is_dir():
            raise ArchipelError(f"there is no folder {root}: is it mounted? `archipel publish RUN {url}` makes it")
        return cls(LocalStore(prefix=root), url, root, "", patience)

    # --- operations ---------------------------------------------------------------------------------------------

    def create(self, key: str, data: bytes) -> bool:
        """Write ``data`` unless the key is taken. True: the object there holds our bytes; False: it holds others.

        After anything but a plain success the object is read back, so that a lost response or a conflict's answer is
        never mistaken; ``data`` should therefore hold a nonce. Raises StoreError.
        """
        check_key(key)
        self.writes.add(key)
        waits = _Waits(self, f"create {key}")
        while True:
            try:
                self._put(key, data, create=True)
                return True
            except Exception as error:
                failure = self._sort(error, key)
            try:
                found = self._get(key, max(len(data), SMALL))
            except DamagedError:
                return False  # larger than anything of ours
            except Exception as error:
                failure = self._sort(error, key)
                found = None
            if found is not None:
                return found == data
            waits.next(failure)

    def put(self, key: str, data: bytes | Path) -> None:
        """Write or replace an object: bytes, or a file, streamed. Raises StoreError, FileNotFoundError."""
        check_key(key)
        if isinstance(data, Path):
            data.stat()
        self.writes.add(key)
        self._again(f"put {key}", key, lambda: self._put(key, data, create=False))

    def get(self, key: str, limit: int = SMALL) -> bytes | None:
        """An object of at most ``limit`` bytes, or None where there is none. Raises DamagedError for a larger one."""
        check_key(key)
        self.reads.add(key)
        return self._again(f"get {key}", key, lambda: self._get(key, limit))

    def get_json(self, key: str, limit: int = SMALL) -> dict[str, Any]:
        """A JSON object; {} where there is none, or something else. Raises DamagedError for more than ``limit`` bytes."""
        return decode(self.get(key, limit))

    def fetch(
        self, key: str, path: Path, *, sha256: str, size: int, on_bytes: Callable[[int], None] = lambda _: None
    ) -> None:
        """Bring an object into a file, in pieces that survive a broken transfer or process, held to its sha256.

        The pieces gather in ``<path>.part``; ``path`` appears whole. Raises DamagedError where the store's bytes are not
        those that were promised (after a second try from the beginning), StoreError.
        """
        check_key(key)
        self.reads.add(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        for attempt in (1, 2):
            if part.is_file() and part.stat().st_size > size:
                part.unlink()
            with open(part, "ab") as file:
                while (have := file.tell()) < size:
                    if self.give_up():
                        raise Stopped(f"stopped while fetching {key}; the next start goes on there")
                    end = min(size, have + _CHUNK)
                    piece = self._again(f"get {key}", key, functools.partial(self._range, key, have, end))
                    if len(piece) != end - have:
                        break
                    file.write(piece)
                    on_bytes(len(piece))
                file.flush()
                os.fsync(file.fileno())
            if part.stat().st_size == size and _sha256(part) == sha256:
                part.replace(path)
                return
            part.unlink()
            if attempt == 2:
                raise DamagedError(
                    f"{key} in {self.url} is damaged: it is not the {size} bytes of sha256 {sha256[:12]}..."
                )

    def list(self, prefix: str) -> Entries:
        """All objects below a prefix ("jobs/2") that can be a run's, sorted by key.

        Raises StoreError, DamagedError for a listing of more than ``MOST``, which a stranger may have filled.
        """
        check_key(prefix)
        return self._again(f"list {prefix}", prefix, lambda: self._list(prefix))

    def remove(self, keys: Keys) -> None:
        """Delete objects: only ``archipel gc`` does so."""
        for key in keys:
            check_key(key)
            self._again(f"delete {key}", key, functools.partial(self._remove, key))

    def probe(self) -> None:
        """Refuse a store that ignores conditions: of two creates of one key the second must fail.

        Raises IgnoresConditionsError, StoreError.
        """
        key, nonce = "probe", os.urandom(8).hex().encode()
        self.create(key, b"first " + nonce)
        waits = _Waits(self, "probe")
        while True:
            try:
                self._put(key, b"second " + nonce, create=True)
            except Exception as error:
                if kind_of(error) != TAKEN:
                    waits.next(self._sort(error, key))
                    continue
                if self.get(key) != b"second " + nonce:
                    return
            raise IgnoresConditionsError(
                f"{self.url} ignores create-if-absent: a second create of one key succeeded, so two islands could hold one "
                "job. Use a store with conditional writes (S3 since 2024, GCS, Azure, a local disk)"
            )

    def now(self) -> float | None:
        """The store's own time (POSIX seconds), for ages that people see; None where it cannot be had."""
        if self._folder is not None:
            return self._folder.now()
        return http_date(self._endpoint)

    # --- the single tries -----------------------------------------------------------------------------------------

    def _put(self, key: str, data: bytes | Path, create: bool) -> None:
        import obstore

        if self._folder is not None:
            self._folder.look(key)
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        if create:
            self.traffic.count("create", sent=size)
            obstore.put(self._store, key, data, mode="create", use_multipart=False)
        elif size <= _CHUNK or self.root is not None:
            self.traffic.count("put", sent=size)
            obstore.put(self._store, key, data, use_multipart=False)
        else:
            self.traffic.count("put", 2 + -(-size // _CHUNK), sent=size)
            try:
                obstore.put(self._streams(), key, data, chunk_size=_CHUNK, max_concurrency=2)
            except FileNotFoundError as error:
                if no_bucket(error):
                    raise
                raise _TornUploadError(words(error)) from None  # its end was taken before, and the answer lost
        if self._folder is not None:
            self._folder.sync(key)

    def _get(self, key: str, limit: int) -> bytes | None:
        import obstore

        if self._folder is not None:
            self._folder.look(key)
        self.traffic.count("get")
        try:
            found = obstore.get(self._store, key)
            if found.meta["size"] > limit:
                raise DamagedError(f"{key} in {self.url} has {found.meta['size']} bytes, at most {limit} are read")
            data = bytes(found.bytes())
        except FileNotFoundError as error:
            if no_bucket(error):
                raise
            return None
        self.traffic.count("get", 0, received=len(data))
        return data

    def _range(self, key: str, begin: int, end: int) -> bytes:
        import obstore

        if self._folder is not None:
            self._folder.look(key)
        self.traffic.count("get")
        try:
            data = bytes(obstore.get_range(self._store, key, start=begin, end=end))
        except FileNotFoundError:
            raise DamagedError(f"{key} in {self.url} is missing") from None
        except Exception as error:
            if kind_of(error) == SHORT:
                raise DamagedError(f"{key} in {self.url} is shorter than it should be") from None
            raise
        self.traffic.count("get", 0, received=len(data))
        return data

    def _remove(self, key: str) -> None:
        import obstore

        if self._folder is not None:
            self._folder.look(key)
        self.traffic.count("delete")
        try:
            obstore.delete(self._store, key)
        except FileNotFoundError as error:
            if no_bucket(error):
                raise

    def _list(self, prefix: str) -> Entries:
        import obstore

        if self._folder is not None:
            self._folder.look(prefix)
        self.traffic.count("list")
        if self._folder is not None:
            found = self._folder.walk(prefix, MOST)
            if found is None:
                raise _endless(prefix, self.url)
            return found
        entries: Entries = []
        seen = 0
        for chunk in obstore.list(self._store, prefix=prefix, chunk_size=1000):
            seen += len(chunk)
            if seen > MOST:
                raise _endless(prefix, self.url)
            for meta in chunk:
                with contextlib.suppress(ArchipelError):  # nothing of ours has such a name
                    entries.append(Entry(check_key(meta["path"]), meta["size"], meta["last_modified"].timestamp()))
        return sorted(entries, key=lambda entry: entry.key)

    # --- waiting and refusing -------------------------------------------------------------------------------------

    def _again(self, what: str, key: str, call: Callable[[], T]) -> T:
        waits = _Waits(self, what)
        while True:
            try:
                value = call()
            except Exception as error:
                waits.next(self._sort(error, key))
                continue
            self._said_away = False
            return value

    def _sort(self, error: Exception, key: str) -> Exception:
        """An error worth another try is returned; a final one is raised as what a person can act on."""
        if isinstance(error, ArchipelError | Stopped):
            raise error
        kind = kind_of(error)
        if self.root is not None and kind == AGAIN and (number := _OS_ERROR.search(str(error))):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(self.root / key)) from error
        # Not chained: the original can quote a signed URL, and a traceback would print it.
        if kind == DENIED:
            raise StoreError(
                f"{self.url} refuses {key}: {words(error)}. Check the credentials in the environment and the policy "
                "(`archipel policy` prints what an island needs)"
            ) from None
        if kind == ABSENT or no_bucket(error):
            raise StoreError(f"{self.url}: there is no such bucket or folder ({words(error)})") from None
        if kind == FINAL or (isinstance(error, OSError) and self.root is not None):
            raise StoreError(f"{self.url}: {key} cannot be used: {words(error)}") from None
        return error

    def _streams(self) -> Any:
        """The store for uploads in parts: one part that fails is sent again, not the whole file."""
        return connect(self.url, self._timeout, retries=8)[0]


class _TornUploadError(Exception):
    """An upload in parts that the store does not know any more: begin it again."""


def encode(value: Mapping[str, Any]) -> bytes:
    """JSON in one form only, so that equal values are equal bytes."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=False) + "\n").encode()


def decode(data: bytes | None) -> dict[str, Any]:
    """A JSON object, or {} for anything else: what strangers write is never trusted to parse."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data or b"")
        return value if isinstance(value, dict) else {}
    return {}


class _Waits:
    """Growing pauses with jitter until the store's patience is used up."""

    def __init__(self, objects: Objects, what: str) -> None:
        self.objects, self.what, self.count = objects, what, 0
        self.began = time.monotonic()

    def next(self, error: Exception) -> None:
        """Pause before another try. Raises StoreError when patience is over, Stopped when asked to stop."""
        o = self.objects
        gone = time.monotonic() - self.began
        if gone >= o.patience:
            raise AwayError(
                f"{o.url} cannot be reached ({self.what}: {words(error)}), tried for {gone:.0f} s: start again later, "
                "everything is kept"
            ) from None
        if self.count == 4 and not o._said_away:
            o._said_away = True
            say(f"the store does not answer ({words(error)}): trying again for {o.patience:.0f} s")
        pause = min(10.0, 0.1 * 2**self.count, max(0.05, o.patience - gone)) * random.uniform(0.5, 1.0)
        self.count += 1
        until = time.monotonic() + pause
        while (left := until - time.monotonic()) > 0:
            if o.give_up():
                raise Stopped(f"stopped while waiting for the store ({self.what}); everything is kept") from None
            time.sleep(min(left, 0.25))


def _sha256(path: Path) -> str:
    """As ``store.sha256_file``, without the numpy that ``store`` brings: claims are made by light processes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _endless(prefix: str, where: str) -> DamagedError:
    return DamagedError(
        f"{prefix} in {where} holds more than {MOST} objects, which no run does: look who filled it, and remove what is not yours"
    )
