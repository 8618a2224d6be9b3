"""Jobs in SQLite: what was asked for, how far it is, what came of it. Survives the process, however it ends.

A job is ``queued``, ``in_progress``, then ``completed`` or ``failed``; deleting removes its row, prompt included
(``secure_delete`` overwrites it). The one process that works on a folder holds its lock, so what is ``in_progress`` when
it opens was left by a dead one and is queued again, at its old place.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from archipel.errors import ArchipelError, DamagedError

QUEUED, RUNNING, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
STATES = (QUEUED, RUNNING, COMPLETED, FAILED)
_VERSION = 1
_TABLES = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, status TEXT NOT NULL,
    prompt TEXT NOT NULL, seed INTEGER NOT NULL, settings TEXT NOT NULL, image BLOB, same_request TEXT, digest TEXT,
    created REAL NOT NULL, started REAL, finished REAL, attempts INTEGER NOT NULL DEFAULT 0, bytes INTEGER,
    error_code TEXT, error_message TEXT, UNIQUE (owner, same_request)
);
CREATE INDEX by_status ON jobs (status, number);
CREATE INDEX by_owner ON jobs (owner, number);
CREATE TABLE facts (name TEXT PRIMARY KEY, value BLOB NOT NULL);
"""


class QueueFull(Exception):  # noqa: N818 - it is an answer
    """As many jobs wait as may."""


class ShareFull(QueueFull):
    """As many jobs of this owner wait as may, for the others' sake."""


class OtherRequest(Exception):  # noqa: N818 - it is an answer
    """An idempotency key came again with another request."""


@dataclass(frozen=True)
class Job:
    """One row. ``settings``: strategy, guidance, steps, scale; ``image``: PNG of the run's own size."""

    number: int
    id: str
    owner: str
    status: str
    prompt: str
    seed: int
    settings: dict[str, Any]
    image: bytes | None
    created: float
    started: float | None
    finished: float | None
    attempts: int
    bytes: int | None
    error_code: str | None
    error_message: str | None


_COLUMNS = ", ".join(field.name for field in fields(Job))


def _job(row: Sequence[Any]) -> Job:
    values = dict(zip((field.name for field in fields(Job)), row, strict=True))
    return Job(**values | {"settings": json.loads(values["settings"])})


def _select(db: sqlite3.Connection, rest: str, *values: Any) -> list[Job]:
    return [_job(row) for row in db.execute(f"SELECT {_COLUMNS} FROM jobs {rest}", values).fetchall()]


class Jobs:
    """The jobs of one server, in ``folder/jobs.sqlite`` (mode 0600). Safe to be called from several threads."""

    def __init__(self, folder: Path) -> None:
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._turns: dict[str, int] = {}  # owner -> when it last had its turn, as a count
        self.path = folder / "jobs.sqlite"
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))  # its journal gets the same mode
        self.path.chmod(0o600)
        self._connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
                self._connection.execute(f"PRAGMA {pragma}")
            self._prepare()
            # Reads do not wait for writes, which wait for the disk: a connection of their own.
            self._reader = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._reader.execute("PRAGMA query_only = ON")
        except sqlite3.DatabaseError as error:
            raise DamagedError(
                f"{self.path} cannot be used as a list of jobs ({error}): move it away to begin anew"
            ) from error

    def _prepare(self) -> None:
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            self._connection.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {_VERSION}; COMMIT;")
        elif version != _VERSION:
            raise ArchipelError(
                f"{self.path} has version {version}, this Archipel reads version {_VERSION}: use the Archipel that wrote it"
            )

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it or nothing."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _read(self, query: str, *values: Any) -> list[Any]:
        with self._reading:
            return self._reader.execute(query, values).fetchall()

    def close(self) -> None:
        with self._lock, self._reading:
            self._reader.close()
            self._connection.close()

    def fact(self, name: str, make: bytes) -> bytes:
        """A value that is kept for good; ``make`` is what it becomes where there is none."""
        with self._change() as db:
            db.execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", (name, make))
            return bytes(db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()[0])

    # --- clients -----------------------------------------------------------------------------------------------------

    def add(
        self,
        owner: str,
        prompt: str,
        seed: int,
        settings: dict[str, Any],
        *,
        image: bytes | None = None,
        same_request: str | None = None,
        digest: str = "",
        most: int = 64,
        shared: bool = False,
    ) -> Job:
        """Queue a job. ``same_request``: a client's name for it, which makes asking again give the same job;
        ``digest``: of all that was asked for.

        Raises QueueFull where ``most`` wait; where the queue is ``shared``, ShareFull where as many of this owner wait as
        places are free (so n busy owners leave a place in n + 1 to the next); OtherRequest where the name was used for something else.
        """
        text = json.dumps(settings, sort_keys=True)
        with self._change() as db:
            if same_request is not None:
                found = _select(db, "WHERE owner = ? AND same_request = ?", owner, same_request)
                if found:
                    kept = db.execute("SELECT digest FROM jobs WHERE id = ?", (found[0].id,)).fetchone()[0]
                    if kept != digest:
                        raise OtherRequest
                    return found[0]
            waits = "SELECT count(*), coalesce(sum(owner = ?), 0) FROM jobs WHERE status = ?"
            waiting, own = db.execute(waits, (owner, QUEUED)).fetchone()
            if waiting >= most:
                raise QueueFull
            if shared and own >= most - waiting:
                raise ShareFull
            name = f"video_{secrets.token_hex(16)}"
            db.execute(
                "INSERT INTO jobs (id, owner, status, prompt, seed, settings, image, same_request, digest, created) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (name, owner, QUEUED, prompt, seed, text, image, same_request, digest, time.time()),
            )
            return _select(db, "WHERE id = ?", name)[0]

    def find(self, name: str, owner: str) -> Job | None:
        found = self._read(f"SELECT {_COLUMNS} FROM jobs WHERE id = ? AND owner = ?", name, owner)
        return _job(found[0]) if found else None

    def page(self, owner: str, *, after: Job | None = None, limit: int = 20, newest: bool = True) -> list[Job]:
        """Up to ``limit`` jobs of an owner, newest or oldest first, beginning after ``after``."""
        beyond = "" if after is None else f"AND number {'<' if newest else '>'} ? "
        ahead = [] if after is None else [after.number]
        query = (
            f"SELECT {_COLUMNS} FROM jobs WHERE owner = ? {beyond}ORDER BY number {'DESC' if newest else 'ASC'} LIMIT ?"
        )
        return [_job(row) for row in self._read(query, owner, *ahead, limit)]

    def names_of_requests(self, owner: str, begin: str, limit: int = 20) -> list[str]:
        """The names (``same_request``) of an owner's requests that begin so, newest first."""
        query = "SELECT same_request FROM jobs WHERE owner = ? AND substr(same_request, 1, ?) = ? ORDER BY number DESC LIMIT ?"
        return [row[0] for row in self._read(query, owner, len(begin), begin, limit)]

    def by_request(self, owner: str, begin: str) -> list[Job]:
        """An owner's jobs whose request's name begins so, oldest first."""
        query = f"SELECT {_COLUMNS} FROM jobs WHERE owner = ? AND substr(same_request, 1, ?) = ? ORDER BY number"
        return [_job(row) for row in self._read(query, owner, len(begin), begin)]

    def ahead(self, job: Job) -> int:
        """How many jobs wait that came before this one."""
        query = "SELECT count(*) FROM jobs WHERE status = ? AND number < ?"
        return int(self._read(query, QUEUED, job.number)[0][0])

    def delete(self, name: str) -> bool:
        """Remove a job in whatever state; whoever works on it finds it gone. Returns whether it was there."""
        with self._change() as db:
            gone = db.execute("DELETE FROM jobs WHERE id = ?", (name,)).rowcount > 0
        self._forget()
        return gone

    def _forget(self) -> None:
        """Empty the write-ahead log, where deleted rows would stand for a while."""
        with self._lock:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def counts(self) -> dict[str, int]:
        found = dict(self._read("SELECT status, count(*) FROM jobs GROUP BY status"))
        return {state: found.get(state, 0) for state in STATES}

    def names(self) -> set[str]:
        return {row[0] for row in self._read("SELECT id FROM jobs")}

    # --- the worker --------------------------------------------------------------------------------------------------

    def recover(self, attempts: int) -> int:
        """Queue again what a dead process left half done; a job that was begun ``attempts`` times fails instead."""
        message = f"the server stopped {attempts} times while it made this clip: it is not tried again"
        with self._change() as db:
            db.execute(
                "UPDATE jobs SET status = ?, finished = ?, error_code = 'gave_up', error_message = ? "
                "WHERE status = ? AND attempts >= ?",
                (FAILED, time.time(), message, RUNNING, attempts),
            )
            return db.execute("UPDATE jobs SET status = ?, started = NULL WHERE status = ?", (QUEUED, RUNNING)).rowcount

    def claim(self, most: int) -> list[Job]:
        """A job and up to ``most - 1`` of equal settings, now in progress; empty where none waits.

        Owners take turns, each with its oldest job first: many jobs of one do not hold up the few of another.
        """
        with self._change() as db:
            owners = db.execute(
                "SELECT owner, min(number) FROM jobs WHERE status = ? GROUP BY owner", (QUEUED,)
            ).fetchall()
            if not owners:
                return []
            owner, number = min(owners, key=lambda one: (self._turns.get(one[0], 0), one[1]))
            first = _select(db, "WHERE number = ?", number)
            settings = json.dumps(first[0].settings, sort_keys=True)
            rest = (
                "WHERE status = ? AND settings = ? AND (image IS NULL) = ? "
                "ORDER BY row_number() OVER (PARTITION BY owner ORDER BY number), owner <> ?, number LIMIT ?"
            )
            batch = _select(db, rest, QUEUED, settings, first[0].image is None, owner, most)
            names, turn = [job.id for job in batch], 1 + max(self._turns.values(), default=0)
            self._turns |= {job.owner: turn for job in batch}
            marks = ", ".join("?" * len(names))
            change = f"UPDATE jobs SET status = ?, started = ?, attempts = attempts + 1 WHERE id IN ({marks})"
            db.execute(change, (RUNNING, time.time(), *names))
            return _select(db, f"WHERE id IN ({marks}) ORDER BY number", *names)

    def put_back(self, names: Sequence[str]) -> None:
        """Queue jobs again that were interrupted in good order: that was no attempt."""
        with self._change() as db:
            for name in names:
                db.execute(
                    "UPDATE jobs SET status = ?, started = NULL, attempts = attempts - 1 WHERE id = ? AND status = ?",
                    (QUEUED, name, RUNNING),
                )

    def running(self) -> set[str]:
        return {row[0] for row in self._read("SELECT id FROM jobs WHERE status = ?", RUNNING)}

    def complete(self, name: str, size: int) -> bool:
        """Whether the job was still wanted."""
        with self._change() as db:
            change = "UPDATE jobs SET status = ?, finished = ?, bytes = ?, image = NULL WHERE id = ? AND status = ?"
            return db.execute(change, (COMPLETED, time.time(), size, name, RUNNING)).rowcount > 0

    def fail(self, name: str, code: str, message: str) -> None:
        with self._change() as db:
            db.execute(
                "UPDATE jobs SET status = ?, finished = ?, error_code = ?, error_message = ?, image = NULL "
                "WHERE id = ? AND status = ?",
                (FAILED, time.time(), code, message, name, RUNNING),
            )

    def expire(self, keep_seconds: float, keep_bytes: int) -> list[str]:
        """Remove finished jobs that are too old, then, until the rest fits, the oldest of whichever owner's clips take most
        room (so an owner loses none while another has more); returns their ids."""
        with self._change() as db:
            done = "SELECT id, owner, coalesce(bytes, 0), finished FROM jobs WHERE status IN (?, ?) ORDER BY finished, number"
            gone, now = [], time.time()
            kept: dict[str, deque[tuple[str, int]]] = {}
            for name, owner, size, finished in db.execute(done, (COMPLETED, FAILED)).fetchall():
                if now - finished > keep_seconds:
                    gone.append(name)
                else:
                    kept.setdefault(owner, deque()).append((name, size))
            room = {owner: sum(size for _, size in jobs) for owner, jobs in kept.items()}
            while sum(room.values()) > keep_bytes:
                owner = max(room, key=lambda one: room[one])
                name, size = kept[owner].popleft()
                room[owner] -= size
                gone.append(name)
            db.executemany("DELETE FROM jobs WHERE id = ?", [(name,) for name in gone])
        if gone:
            self._forget()
        return gone
