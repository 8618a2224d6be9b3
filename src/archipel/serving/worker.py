"""The thread that makes clips: jobs of equal settings together, files written aside and renamed, then the row."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from archipel import store
from archipel.errors import ArchipelError
from archipel.serving.jobs import Job, Jobs
from archipel.serving.limits import Limits

if TYPE_CHECKING:
    from archipel.ensemble.pipeline import Archipelago
    from archipel.ensemble.safety import Safety

logger = logging.getLogger("archipel")
_LOOK = 0.5  # seconds between looks at an empty queue, where nobody calls
_SWEEP = 30.0  # seconds between looks for clips that are too old
_ROOM = 4 << 20  # bytes that a disk must have again before clips are made, once it was full
_LONGEST_PAUSE = 60.0  # seconds between attempts on a disk that is full
_BLOCKED = "the safety filter of this server withheld this clip: nothing of it was kept"
_FIRST_GUESS = 10.0  # seconds of a clip, as long as none was made


class _Enough(Exception):  # noqa: N818 - it is no error
    """Nobody wants these clips any more, or the server stops."""


class Worker:
    """Works off ``jobs`` with ``archipelago``, into ``folder``.

    ``told(outcome, clips, seconds)`` is called after each batch: completed, failed, blocked, cancelled or interrupted.
    ``safety``: prompts that were queued before it was on are looked at as well. While the disk is full, jobs wait.
    """

    def __init__(
        self,
        archipelago: Archipelago,
        jobs: Jobs,
        folder: Path,
        limits: Limits,
        told: Callable[[str, int, float], None] = lambda *_: None,
        safety: Safety | None = None,
    ) -> None:
        self.archipelago, self.jobs, self.folder, self.limits, self._told = archipelago, jobs, folder, limits, told
        self.safety = safety
        self.full = False  # the disk: jobs wait, and no more are taken
        self._owing, self._pause = False, 0.0
        self._progress: dict[str, int] = {}
        self._left: dict[str, float] = {}
        self._paces: deque[float] = deque(maxlen=20)  # seconds per clip of the last batches
        self._called, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="archipel-worker", daemon=True)

    # --- from outside ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Queue again what was left half done, remove files that belong to no job, begin."""
        self.jobs.recover(self.limits.attempts)
        known = self.jobs.names()
        for path in self.folder.iterdir():
            if path.stem not in known and path.is_file():
                path.unlink()
        self._thread.start()

    def stop(self, seconds: float = 30.0) -> None:
        """End after the step that is being computed; its jobs wait again."""
        self._stopping.set()
        self._called.set()
        self._thread.join(seconds)

    def call(self) -> None:
        """There is something to do."""
        self._called.set()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def path(self, name: str) -> Path:
        """Where a job's clip lies; ``name`` is a job's id as the table has it, never a client's word."""
        return self.folder / f"{name}.mp4"

    def progress(self, name: str) -> int:
        """0 to 99, in percent of the solver's steps."""
        return self._progress.get(name, 0)

    def left(self, name: str) -> float | None:
        """Seconds until a clip that is being made will be there, judged by its steps so far; None before its first."""
        return self._left.get(name)

    def trace_path(self, name: str) -> Path:
        """Where it is kept how a clip came about (``_trace``), beside the clip."""
        return self.folder / f"{name}.json"

    def trace(self, name: str) -> dict[str, Any] | None:
        """How a finished clip came about; None where that was not kept."""
        try:
            kept = json.loads(self.trace_path(name).read_bytes())
        except (OSError, ValueError):
            return None
        return kept if isinstance(kept, dict) else None

    def warnings(self, name: str) -> list[str]:
        """What a client is to know of a finished clip: a sentence for each expert that was lost while it was made."""
        without = (self.trace(name) or {}).get("without")
        lost = without.items() if isinstance(without, dict) else ()
        return [
            f"expert {k} was lost while this clip was made: from step {step} on it was made without it"
            for k, step in lost
        ]

    def remove(self, name: str) -> None:
        """Take a clip's files away."""
        self.path(name).unlink(missing_ok=True)
        self.trace_path(name).unlink(missing_ok=True)

    def wait(self, waiting: int) -> int:
        """Whole seconds, 1 to 3600, until one of ``waiting`` jobs will have gone: what a full queue answers."""
        pace = sum(self._paces) / len(self._paces) if self._paces else _FIRST_GUESS
        return int(min(max(pace * min(waiting, self.limits.batch), 1), 3600))

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        swept = -_SWEEP
        while not self._stopping.is_set():
            try:
                if time.monotonic() - swept >= _SWEEP:
                    swept = time.monotonic()
                    self._sweep()
                self.full = self.full and not self._has_room()
                if not self.full and self._work():
                    swept = min(swept, time.monotonic() - _SWEEP + 1)  # new clips may push old ones out
                    continue
            except Exception as error:  # a failing disk: clients are told, and it is tried again
                self.full, self._owing = _is_full(error), True
                said = "the disk is full" if self.full else type(error).__name__
                logger.error("clips or the list of jobs cannot be written: %s", said)
                self._pause = min(max(2 * self._pause, 1.0), _LONGEST_PAUSE)
                self._stopping.wait(self._pause)
            self._called.wait(_LOOK)
            self._called.clear()

    def _work(self) -> bool:
        """Make the next batch; whether there was one."""
        if self._owing:  # what was in progress when the disk failed
            self.jobs.put_back(sorted(self.jobs.running()))
            self._owing = False
        claimed = self.jobs.claim(self.limits.batch)
        batch = self._allowed(claimed)
        if batch:
            self._make(batch)
        self._pause = 0.0
        return bool(claimed)

    def _sweep(self) -> None:
        for name in self.jobs.expire(self.limits.keep_seconds, self.limits.keep_bytes):
            self.remove(name)

    def _has_room(self) -> bool:
        probe = self.folder / "room"
        try:
            with probe.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, _ROOM)
        except OSError as error:
            return not _is_full(error)
        finally:
            probe.unlink(missing_ok=True)
        return True

    def _allowed(self, batch: list[Job]) -> list[Job]:
        """Without those whose prompts are blocked."""
        refused = [job for job in batch if self.safety is not None and self.safety.line(job.prompt) is not None]
        for job in refused:
            self._block(job)
        return [job for job in batch if job not in refused]

    def _block(self, job: Job) -> None:
        self.jobs.fail(job.id, "moderation_blocked", _BLOCKED)
        self._told("blocked", 1, 0.0)

    def _make(self, batch: list[Job]) -> None:
        begin, names = time.monotonic(), [job.id for job in batch]
        try:
            with _unheard():
                done = self._generate(batch)
        except _Enough:
            if self._stopping.is_set():
                self.jobs.put_back(names)
                self._told("interrupted", len(batch), 0.0)
            else:
                self._told("cancelled", len(batch), 0.0)
        except Exception as error:
            if _is_full(error):
                raise
            if len(batch) > 1:  # one of them may have spoiled it for the others
                for job in batch:
                    self._make([job])
                return
            code, message = _reason(error, str(self.archipelago.parts.source.where))
            logger.error("a clip could not be made: %s", code if code != "internal" else type(error).__name__)
            self.remove(names[0])
            self.jobs.fail(names[0], code, message)
            self._told("failed", 1, 0.0)
        else:
            self._paces.append((time.monotonic() - begin) / len(batch))
            self._told("completed", done, time.monotonic() - begin)
        finally:
            for name in names:
                self._progress.pop(name, None)
                self._left.pop(name, None)

    def _generate(self, batch: list[Job]) -> int:
        """Make a batch's clips; returns how many were still wanted."""
        from archipel.ensemble.video import write

        names, begin = {job.id for job in batch}, time.monotonic()

        def on_step(done: int, steps: int, *_: Any) -> None:
            if self._stopping.is_set() or not names & self.jobs.running():
                raise _Enough
            for name in names:
                self._progress[name] = min(99, 100 * done // steps)
                if done:
                    self._left[name] = (time.monotonic() - begin) / done * (steps - done)

        if not names & self.jobs.running():
            raise _Enough
        settings = batch[0].settings
        images = None if batch[0].image is None else [_picture(job.image or b"") for job in batch]
        made = self.archipelago.generate(
            [job.prompt for job in batch],
            strategy=settings["strategy"],
            guidance=settings["guidance"],
            steps=settings["steps"],
            seeds=[job.seed for job in batch],
            image=images,
            batch=self.limits.batch,
            on_step=on_step,
        )
        done, seconds = 0, time.monotonic() - begin
        blocked = [] if self.safety is None else self.safety.blocked(made.clips)
        for row, (job, clip, note) in enumerate(zip(batch, made.clips, made.notes, strict=True)):
            if row in blocked:
                self._block(job)
                continue
            wanted = False
            try:
                path = write(self.path(job.id), clip, made.fps, scale=settings["scale"], note=note)
                store.write_text(self.trace_path(job.id), json.dumps(_trace(made, row, seconds, note)))
                wanted = self.jobs.complete(job.id, path.stat().st_size)
                done += wanted
            finally:
                if not wanted:  # deleted meanwhile, or the disk is full
                    self.remove(job.id)
        return done


def _is_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a disk without room."""
    for one in (error, error.__cause__):
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(one, sqlite3.OperationalError) and "full" in str(one):
            return True
    return False


def _trace(made: Any, row: int, seconds: float, note: dict[str, Any]) -> dict[str, Any]:
    """Of the ``row``-th clip of a batch: weights (S, K) of the experts at each step, None for the monolith; its share of the
    calls of experts and router; seconds of its batch and how many clips that had; experts that were
    lost -> the first step without them. Nothing of its
    prompt, and no address."""
    weights, clips = made.weights, len(made.clips)
    return {
        "weights": None if weights is None else np.round(weights[row].astype(float), 4).tolist(),
        "expert_calls": made.expert_rows / clips,
        "router_calls": made.router_rows / clips,
        "seconds": round(seconds, 3),
        "batch": clips,
        "without": note.get("without", {}),
    }


def _picture(data: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data), formats=["PNG"]).convert("RGB"))


def _reason(error: Exception, where: str) -> tuple[str, str]:
    """A code and a sentence for clients, without paths of this machine."""
    if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
        return "storage", "the server could not store the clip: try again later"
    if isinstance(error, ArchipelError):
        return "cannot_generate", str(error).replace(where, "RUN")
    return "internal", "the clip could not be made because of a fault in the server"


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Nothing that is logged by this thread meanwhile gets out: warnings about a prompt quote it."""
    thread = threading.get_ident()

    def other(record: logging.LogRecord) -> bool:
        return record.thread != thread

    handlers = [*logger.handlers, *logging.getLogger().handlers]
    for handler in handlers:
        handler.addFilter(other)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(other)
