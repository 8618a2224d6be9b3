"""Progress for people: one bar per stage with an estimate of the time left, a log file per stage, clean stops.

On a terminal the bar is live; elsewhere (CI, a pipe) a line is printed now and then.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from archipel.errors import Stopped

logger = logging.getLogger("archipel")
_QUIET_EVERY = 10.0  # seconds between lines where there is no terminal


def seconds_text(seconds: float) -> str:
    """73 -> '1m13s', 4000 -> '1h06m', 5.2 -> '5s'."""
    whole = round(max(seconds, 0))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """A bar over ``total`` units (nothing is shown where ``quiet``): ``with Progress("prepare: latents", 240) as bar: bar.advance()``.

    ``start`` is what was already done (resumed work), so that the estimate counts only this process's speed.
    """

    def __init__(self, label: str, total: int, start: int = 0, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self.label, self.total, self.done = label, max(total, 1), start
        self._first, self._began, self._said = start, time.monotonic(), 0.0
        self._bar: Any = None
        self._task: Any = None
        self.note = ""

    def __enter__(self) -> Progress:
        self._began = self._said = time.monotonic()
        if sys.stderr.isatty() and not self._quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description:<28}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, left="", note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._quiet:
            return
        elapsed = time.monotonic() - self._began
        if self._bar is not None:
            self._show()
            self._bar.stop()
        elif kind is None:
            print(f"{self.label}: {self.done}/{self.total} in {seconds_text(elapsed)}", file=sys.stderr, flush=True)
        logger.info(
            "%s: %d/%d in %.1f s%s", self.label, self.done, self.total, elapsed, "" if kind is None else " (stopped)"
        )

    def advance(self, units: int = 1, note: str = "") -> None:
        self.update(self.done + units, note)

    def update(self, done: int, note: str = "") -> None:
        """Set the number of units done (at most ``total`` is shown)."""
        self.done = min(done, self.total)
        if note:
            self.note = note
        if self._bar is not None:
            self._show()
        elif not self._quiet and time.monotonic() - self._said >= _QUIET_EVERY:
            self._said = time.monotonic()
            print(
                f"{self.label}: {self.done}/{self.total}, {self.left()} left {self.note}", file=sys.stderr, flush=True
            )

    def left(self) -> str:
        made = self.done - self._first
        if made <= 0:
            return "?"
        return seconds_text((time.monotonic() - self._began) / made * (self.total - self.done))

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.done, left=f"{self.left()} left", note=self.note)


@contextlib.contextmanager
def log_to(path: Path, level: int = logging.INFO) -> Iterator[None]:
    """Append the ``archipel`` logger's lines to a stage's log file for as long as the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(min(level, logging.INFO))
    before = logger.level
    logger.addHandler(handler)
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        handler.close()


class StopFlag:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a flag that long loops look at; a second SIGINT stops at once.

    ``with StopFlag(seconds=1800) as stop: ... if stop: save(); raise stop.error("training")``. ``seconds`` is the
    ``--for`` limit; ``cancel`` sets the flag from any thread. Outside the main thread signals are left alone.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self.signal: int | None = None
        self.reason: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores it
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def limit(self, seconds: float) -> None:
        """Bring the deadline forward to ``seconds`` from now, where that is sooner."""
        sooner = time.monotonic() + seconds
        self._deadline = sooner if self._deadline is None else min(self._deadline, sooner)

    def cancel(self, reason: str) -> None:
        """Ask for a stop from any thread, without an interruption; the first reason given is kept and told."""
        if self.reason is None:
            self.reason = reason

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __bool__(self) -> bool:
        if self.signal is not None or self.reason is not None:
            return True
        return self._deadline is not None and time.monotonic() >= self._deadline

    def error(self, what: str) -> Stopped:
        """The exception to raise once everything is saved."""
        if self.signal is not None:
            return Stopped(f"{what} was interrupted; everything is kept, start it again to continue")
        if self.reason is not None:
            return Stopped(f"{what} was stopped: {self.reason}", interrupted=False)
        return Stopped(
            f"{what} reached its time limit; everything is kept, start it again to continue", interrupted=False
        )
