"""Checkpoints on their way to the store, while training goes on: the newest first, older ones that were overtaken not at all."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from archipel.islands.objects import Objects

logger = logging.getLogger("archipel")
_FILES = ("state.safetensors", "manifest.json")  # the manifest last: what it is not there for does not count
GRACE = 120.0  # seconds that a stopping island gives its last checkpoint


class Outbox:
    """Sends committed checkpoint folders from a thread. ``key(step)`` is where one belongs.

    A folder is linked aside at once, since the trainer keeps only the newest two.
    """

    def __init__(self, objects: Objects, folder: Path, key: Callable[[int], str]) -> None:
        self._objects, self._folder, self._key = objects, folder, key
        self._waiting: tuple[int, Path] | None = None
        self._number = itertools.count()
        self._busy = False
        self._closed = False
        self._turn = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self.sent: list[int] = []

    def __enter__(self) -> Outbox:
        shutil.rmtree(self._folder, ignore_errors=True)  # of a process that was killed
        self._folder.mkdir(parents=True, exist_ok=True)
        # A folder of its own: an earlier attempt's thread may still be busy with its last upload.
        self._folder = Path(tempfile.mkdtemp(dir=self._folder))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        self._thread.join(timeout=5.0)
        if not self._thread.is_alive():
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, checkpoint: Path) -> None:
        """Queue a committed checkpoint in place of an older one that still waits. Costs two links; where the disk has no
        room for them it is not sent, and training goes on."""
        step, target = int(checkpoint.name), self._folder / f"{next(self._number)}"
        try:
            target.mkdir()
            for file in _FILES:
                try:
                    os.link(checkpoint / file, target / file)
                except OSError:  # a file system without links
                    shutil.copyfile(checkpoint / file, target / file)
        except OSError as error:
            logger.warning("checkpoint %d is not sent: %s", step, error)
            shutil.rmtree(target, ignore_errors=True)
            return
        with self._turn:
            before, self._waiting = self._waiting, (step, target)
            self._turn.notify_all()
        if before is not None:
            shutil.rmtree(before[1], ignore_errors=True)

    def drop(self) -> None:
        """Forget what waits: the result follows, and is worth more. What is being sent is sent."""
        with self._turn:
            self._waiting = None

    def finish(self, grace: float = GRACE) -> bool:
        """Wait until nothing waits; False where that took longer than ``grace`` seconds."""
        # The store's waits must not be cut short by the very stop that brings us here.
        self._objects.give_up = lambda: False
        until = time.monotonic() + grace
        with self._turn:
            while self._waiting is not None or self._busy:
                if (left := until - time.monotonic()) <= 0:
                    return False
                self._turn.wait(min(left, 1.0))
        return True

    def _run(self) -> None:
        while True:
            with self._turn:
                while self._waiting is None and not self._closed:
                    self._turn.wait()
                if self._closed and self._waiting is None:
                    return
                job, self._waiting, self._busy = self._waiting, None, True
            assert job is not None
            try:
                self._send(*job)
            finally:
                with self._turn:
                    self._busy = False
                    self._turn.notify_all()

    def _send(self, step: int, folder: Path) -> None:
        try:
            for file in _FILES:
                self._objects.put(f"{self._key(step)}/{file}", folder / file)
            self.sent.append(step)
        except Exception as error:  # a later one will do; neither training nor this thread must end for it
            logger.warning("checkpoint %d could not be sent: %s", step, error)
        shutil.rmtree(folder, ignore_errors=True)
