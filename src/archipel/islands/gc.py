"""The owner's housekeeping: attempts that no longer count, and checkpoints that were overtaken.

Islands never delete. What goes: everything of a finished job but its claims and its one result; of a job in work, all but
its furthest two checkpoints. Only what the store itself dates back further than the grace time, by the store's own clock.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from archipel.islands import keys
from archipel.islands.bucket import Bucket, checkpoints
from archipel.islands.claims import State
from archipel.islands.objects import Entry, Objects
from archipel.progress import Progress, StopFlag

GRACE = 3600.0  # seconds
KEEP = 2  # checkpoints of a job in work
_ATTEMPT = re.compile(r"jobs/[a-z0-9]+/(\d{8})/(.+)")
_ASIDE = re.compile(r"[A-Za-z0-9_.-]+#\d+")
_CHECKPOINT = re.compile(r"checkpoints/(\d{8})/[^/]+")


@dataclass
class Garbage:
    """What may go (``entries``; ``torn``: files of killed uploads to a folder), what is still too young, and what lies there
    that this Archipel does not know."""

    entries: list[Entry] = field(default_factory=list)
    torn: list[Entry] = field(default_factory=list)
    young: int = 0
    unknown: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(entry.size for entry in (*self.entries, *self.torn))


def find(bucket: Bucket, grace: float = GRACE) -> Garbage:
    """Look through the jobs of a bucket; changes nothing. Raises StoreError."""
    found = Garbage()
    everything = bucket.objects.list("jobs")
    # The newest timestamp stands in where the store's time cannot be had: a lower bound, so only less is removed.
    now = bucket.objects.now() or max((entry.modified for entry in everything), default=0.0)
    for name in bucket.jobs:
        state = bucket.state(name)
        kept = set(checkpoints(state)[:KEEP])
        for entry in everything:
            if not entry.key.startswith(keys.job(name) + "/"):
                continue
            verdict = _verdict(entry.key, state, kept)
            if verdict is None:
                found.unknown.append(entry.key)
            elif verdict and now - entry.modified < grace:
                found.young += 1
            elif verdict:
                found.entries.append(entry)
    jobs = tuple(keys.job(name) + "/" for name in bucket.jobs)
    for entry in _torn(bucket.objects):
        if now - entry.modified < grace:
            found.young += 1
        else:
            found.torn.append(entry)
    found.unknown += [entry.key for entry in everything if not entry.key.startswith(jobs)]
    return found


def _torn(objects: Objects) -> list[Entry]:
    """In a folder: what the disk's client writes aside as ``<key>#<number>`` and a killed writer leaves, the whole size of
    a checkpoint maybe. No listing shows them, since they are no keys."""
    found: list[Entry] = []
    root = objects.root
    if root is None:
        return found
    for top in ("jobs", "shards", "codec", keys.TEXT, keys.BASE, keys.ADMITTED):
        for place, _, names in os.walk(root / top):
            for path in (Path(place, name) for name in names if _ASIDE.fullmatch(name)):
                with contextlib.suppress(FileNotFoundError):
                    status = path.lstat()
                    if stat.S_ISREG(status.st_mode):
                        key = path.relative_to(root).as_posix()
                        found.append(Entry(key, status.st_size, status.st_mtime))
    return sorted(found, key=lambda entry: entry.key)


def _verdict(key: str, state: State, kept: set[tuple[int, int]]) -> bool | None:
    """Whether a key of a job may go; None where it is none of ours."""
    parts = key.split("/")
    if parts[2] in ("claims", "reopened") or (len(parts) == 3 and parts[2].startswith("committed")):
        return False
    match = _ATTEMPT.fullmatch(key)
    if match is None:
        return None
    fence, rest = int(match[1]), match[2]
    if fence > state.fence:
        return None  # nobody claimed it
    step = _CHECKPOINT.fullmatch(rest)
    known = step is not None or rest == "heartbeat.json" or rest.startswith("result/")
    if not known:
        return None
    if state.done:
        return step is not None or fence != state.committed.get("fence")
    if fence <= state.above:
        return True
    return step is not None and (int(step[1]), fence) not in kept and len(kept) == KEEP and _overtaken(step[1], kept)


def _overtaken(step: str, kept: set[tuple[int, int]]) -> bool:
    """Whether it is no further than what is kept: a checkpoint being written just now, its manifest to come, is further."""
    return int(step) <= min(number for number, _ in kept)


def collect(bucket: Bucket, found: Garbage, stop: StopFlag) -> None:
    """Remove what was found. Stopped half-way it is continued by the next call. Raises Stopped, StoreError."""
    with Progress("gc", len(found.entries)) as bar:
        for begin in range(0, len(found.entries), 50):
            if stop:
                raise stop.error("gc")
            part = found.entries[begin : begin + 50]
            bucket.objects.remove([entry.key for entry in part])
            bar.advance(len(part))
    for entry in found.torn:
        assert bucket.objects.root is not None
        (bucket.objects.root / entry.key).unlink(missing_ok=True)
