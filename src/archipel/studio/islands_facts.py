"""The islands at work: who holds which job, how far it is, and the losses on the way. No gradio.

A ``Watch`` looks at a run's folder, at a store, or at both, once for all pages that are open: a store is asked in a thread of
its own, so that one that does not answer holds nobody up, and what was last seen of it stays in sight with its age.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archipel.errors import ArchipelError
from archipel.report.reading import finite, mapping
from archipel.report.svg import tone
from archipel.run import MONOLITH, TRUNK, Run

if TYPE_CHECKING:
    from archipel.islands.bucket import Bucket

EVERY = 2.0  # seconds between looks, at least
_FIRST = 3.0  # seconds that a page waits for the first look
_PATIENCE, _TIMEOUT = 4.0, 10.0  # seconds: of a look at a store, and of one of its requests
_STILL = 20.0  # seconds after which a training in a folder that says nothing is taken to have ended
_METRICS = 16 << 20  # bytes of a result's metrics that are read
_POINTS = 4000  # losses kept of what heartbeats said, per job


@dataclass(frozen=True)
class Job:
    """One job. ``state``: free, working, silent, stopped, failed, done, admitted or refused; ``left``, ``seen``: seconds; None: not
    known, or nothing to know. ``attempt`` counts from 1; ``holder`` is the name that an island gave itself."""

    name: str
    state: str
    step: int = 0
    steps: int = 0
    attempt: int = 0
    holder: str | None = None
    loss: float | None = None
    speed: float | None = None
    left: float | None = None
    seen: float | None = None

    @property
    def label(self) -> str:
        return (
            f"Expert {self.name}"
            if self.name.isdigit()
            else "Shared start"
            if self.name == TRUNK
            else self.name.title()
        )

    @property
    def tone(self) -> str:
        return "mono" if self.name == MONOLITH else tone(int(self.name)) if self.name.isdigit() else "t7"


@dataclass(frozen=True)
class Curve:
    """Losses of one job over its steps: of training, and on held-out clips."""

    name: str
    train: tuple[tuple[float, float], ...] = ()
    validation: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Look:
    """What was seen. ``source``: folder or store; ``away``: why the store cannot be reached, in words without its address, or
    ''; ``since``, ``told``: POSIX seconds of this machine when it was first missed, and last answered (None: never)."""

    source: str
    jobs: tuple[Job, ...] = ()
    curves: tuple[Curve, ...] = ()
    away: str = ""
    since: float | None = None
    told: float | None = None


class Watch:
    """``run``: a run's folder, or None; ``store``: URL or folder of a published run, or None; ``run_id`` pins its run.

    A run's own ``store/`` (what engines use by default) is found by itself. Threads may share it.
    """

    def __init__(self, run: Run | None, store: str | None = None, run_id: str | None = None) -> None:
        own = run.root / "store" if run is not None else None
        if store is None and own is not None and (own / "published.json").is_file():
            store = str(own)
        self._run, self._store = run, store
        self._run_id = run_id or (run.id if run is not None else None)
        self._bucket: Bucket | None = None
        self._told: dict[str, dict[float, float]] = {}
        self._results: dict[tuple[str, int], Curve] = {}
        self._tails: dict[str, _Tail] = {}
        self._lock, self._there = threading.Lock(), threading.Event()
        self._looking, self._at = False, -math.inf
        self._last = Look("store" if store else "folder")

    @property
    def has_store(self) -> bool:
        return self._store is not None

    def look(self) -> Look:
        """The state of affairs, at most some seconds old; asks anew in the background. Returns at once but for the first time."""
        if self._store is None:
            with self._lock:
                if time.monotonic() - self._at >= EVERY:
                    self._at, self._last = time.monotonic(), self._folder()
                return self._last
        with self._lock:
            begin = not self._looking and time.monotonic() - self._at >= EVERY
            self._looking = self._looking or begin
        if begin:
            threading.Thread(target=self._ask, daemon=True, name="studio-islands").start()
        self._there.wait(_FIRST)
        return self._last

    # --- a store ---------------------------------------------------------------------------------------------------------

    def bucket(self) -> Bucket:
        """The store, opened. Raises ArchipelError."""
        from archipel.islands.bucket import Bucket
        from archipel.islands.objects import Objects

        assert self._store is not None
        if self._bucket is None:
            self._bucket = Bucket.read(Objects.open(self._store, patience=_PATIENCE, timeout=_TIMEOUT), self._run_id)
        return self._bucket

    def _ask(self) -> None:
        try:
            found = self._ask_store()
        except Exception as error:  # whatever it is, the page says it, and the next look may do
            said, self._bucket = self._words(error), None  # a disk that is mounted again is another folder
            last = self._last
            found = replace(last, away=said, since=last.since or time.time())
        with self._lock:
            self._last, self._looking, self._at = found, False, time.monotonic()
        self._there.set()

    def _words(self, error: Exception) -> str:
        """An error without the store's address or a path of this machine: whoever looks need not know them."""
        from archipel.islands.objects import AwayError, StoreError

        if isinstance(error, AwayError):
            return "it does not answer"
        if isinstance(error, StoreError):
            return "it refuses to be read, or is not there any more"
        if isinstance(error, ArchipelError | OSError):
            return "there is no published run in it that can be read"
        return f"something unexpected happened ({type(error).__name__})"

    def _ask_store(self) -> Look:
        from archipel.islands.status import status

        bucket = self.bucket()
        rows = status(bucket)["jobs"]
        jobs = tuple(_stored(row, bucket.config.islands.lease) for row in rows)
        return Look("store", jobs, tuple(self._stored_curve(bucket, job) for job in jobs), told=time.time())

    def _stored_curve(self, bucket: Bucket, job: Job) -> Curve:
        """The result's own record where there is one, else what heartbeats said while somebody looked."""
        if job.state in ("done", "admitted", "refused") and job.attempt:
            key = (job.name, job.attempt)
            if key not in self._results:
                self._results[key] = _result(bucket, *key)
            if self._results[key].train:
                return self._results[key]
        if self._run is not None:
            local = self._local_curve(self._run, job.name)
            if local.train:
                return local
        told = self._told.setdefault(job.name, {})
        if job.loss is not None and job.step > 0 and len(told) < _POINTS:
            told[float(job.step)] = job.loss
        return Curve(job.name, tuple(sorted(told.items())))

    # --- a folder --------------------------------------------------------------------------------------------------------

    def _folder(self) -> Look:
        assert self._run is not None
        run = self._run
        names = [*run.trunk_names, *run.job_names]
        jobs = tuple(_local(run, name) for name in names)
        return Look("folder", jobs, tuple(self._local_curve(run, name) for name in names), told=time.time())

    def _local_curve(self, run: Run, name: str) -> Curve:
        tail = self._tails.setdefault(name, _Tail(run.expert(name) / "metrics.jsonl"))
        return tail.read(name)


class _Tail:
    """A growing ``metrics.jsonl``: only what is new is read. Written anew (a resumed training does so): all of it."""

    def __init__(self, path: Path) -> None:
        self._path, self._place, self._file = path, 0, (0, 0)
        self._rest = b""
        self._rows = _Rows()

    def read(self, name: str) -> Curve:
        with contextlib.suppress(OSError), self._path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            if (status.st_dev, status.st_ino) != self._file or status.st_size < self._place:
                self._place, self._rest, self._rows = 0, b"", _Rows()
                self._file = (status.st_dev, status.st_ino)
            stream.seek(self._place)
            data = stream.read()
            self._place += len(data)
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._rows.add(lines)
        return self._rows.curve(name)


@dataclass
class _Rows:
    """Losses by step; a resumed process tells steps again, and its last word counts."""

    train: dict[float, float] = field(default_factory=dict)
    averaged: dict[float, float] = field(default_factory=dict)
    raw: dict[float, float] = field(default_factory=dict)

    def add(self, lines: list[bytes]) -> None:
        for line in lines:
            try:
                row = mapping(json.loads(line)) if line.strip() else {}
            except (ValueError, RecursionError):
                continue
            step = finite(row.get("step"))
            if step is None:
                continue
            for key, into in (("loss", self.train), ("validation_ema", self.averaged), ("validation", self.raw)):
                if (value := finite(row.get(key))) is not None:
                    into[step] = value

    def curve(self, name: str) -> Curve:
        return Curve(name, tuple(sorted(self.train.items())), tuple(sorted((self.averaged or self.raw).items())))


def _result(bucket: Bucket, name: str, fence: int) -> Curve:
    """What an island told of its training with its result; an empty curve where it cannot be read."""
    from archipel.islands import keys

    rows = _Rows()
    with contextlib.suppress(ArchipelError):
        data = bucket.objects.get(f"{keys.result(name, fence)}/metrics.jsonl", _METRICS)
        rows.add((data or b"").split(b"\n"))
    return rows.curve(name)


def _stored(row: Mapping[str, Any], lease: float) -> Job:
    """A row of ``islands.status``. One that holds a job and has not been heard of for a lease is silent: another may take it."""
    state, seen = str(row["state"]), row["last_seen_s"]
    if state == "done" and row["admitted"]:
        state = "admitted"
    elif state == "claimed":
        state = "silent" if seen is not None and seen > lease else "working"
    at_work = state == "working"
    return Job(
        row["name"],
        state,
        row["step"],
        row["steps"],
        row["fence"],
        row["holder"],
        finite(row["loss"]),
        finite(row["steps_per_s"]) if at_work else None,
        row["left_s"] if at_work else None,
        seen,
    )


def _local(run: Run, name: str) -> Job:
    """A job of a folder, by its card and by what its process last said."""
    from archipel.islands.launch.local import steps_of

    folder, steps = run.expert(name), steps_of(run, name)
    done = run.done(folder)
    told: Mapping[str, Any] = {}
    seen = None
    with contextlib.suppress(ArchipelError, OSError, ValueError):
        path = folder / "progress.json"
        told = mapping(json.loads(path.read_bytes()[:65536]))
        seen = max(0.0, time.time() - path.stat().st_mtime)
    step = min(max(int(finite(told.get("step")) or 0), 0), steps)
    attempt = int(finite(told.get("resumed")) or 0) + 1 if told else 0
    loss, speed = finite(told.get("loss")), finite(told.get("steps_per_s"))
    if done:
        return Job(name, "done", steps, steps, attempt, None, loss, None, None, seen)
    if not told:
        return Job(name, "free", 0, steps)
    alive = seen is not None and seen <= max(_STILL, 5 / speed if speed and speed > 1e-6 else 0.0)
    if not alive or told.get("state") not in ("training", "starting"):
        state = "failed" if told.get("state") == "failed" else "stopped"
        return Job(name, state, step, steps, attempt, None, loss, None, None, seen)
    left = (steps - step) / speed if speed and speed > 1e-6 else None
    return Job(name, "working", step, steps, attempt, None, loss, speed, left, seen)
