"""The edge between a shell and our functions: durations, a parent that goes away, errors as sentences and exit codes."""

from __future__ import annotations

import os
import sys

from archipel.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_WRONG_INPUT, ArchipelError, Stopped


def say(text: str) -> None:
    """For people: on standard error, so that standard output stays for results.

    A message can quote what a stranger wrote: no character is passed on that a terminal would obey.
    """
    print("".join(c if c.isprintable() or c in "\n\t" else "?" for c in text), file=sys.stderr, flush=True)


def parse_duration(text: str, option: str = "--for") -> float:
    """``90s``, ``30m``, ``2h`` or plain seconds -> seconds, above 0. Raises ArchipelError."""
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:].lower())
    try:
        seconds = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise ArchipelError(f"{option} {text!r} is not a duration above 0 such as 90s, 30m or 2h")
    return seconds


def parse_bytes(text: str, option: str = "--memory") -> int:
    """``2GB``, ``500MB``, ``1.5GiB`` or plain bytes -> bytes, at least 1. Raises ArchipelError."""
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
    word = text.strip().lower().removesuffix("b")
    number = word.rstrip("kmgti")
    try:
        size = int(float(number) * units[word[len(number) :].strip()])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if not 1 <= size < 2**63:
        raise ArchipelError(f"{option} {text!r} is not a number of bytes such as 500MB, 2GB or 1.5GiB")
    return size


def stop_with_parent() -> None:
    """A launcher's child watches its standard input: when it closes, the launcher is gone, and the child stops cleanly."""
    if os.environ.get("ARCHIPEL_STOP_WITH_PARENT") != "1":
        return
    import signal
    import threading

    def watch() -> None:
        while os.read(0, 1):  # unbuffered: a thread inside a buffered read breaks the interpreter's end
            continue
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="stop-with-parent").start()


def _os_error(error: OSError) -> str | None:
    """A sentence for the errors of a machine that a person can do something about."""
    import errno

    where = f" at {error.filename}" if error.filename else ""
    known = {
        errno.ENOENT: f"there is no such file or folder{where}",
        errno.EIO: f"the disk could not be read or written{where}: what was finished is kept",
        errno.EFBIG: f"a file would be larger than this disk or account may hold{where}: what was finished is kept",
        errno.ENOSPC: f"the disk is full{where}: free some space and start the same command again; what was finished is kept",
        errno.EDQUOT: f"the disk quota is used up{where}: free some space and start the same command again; what was finished is kept",
        errno.EROFS: f"the folder is read-only{where}: choose one that can be written",
        errno.EACCES: f"no permission{where}: choose a folder that you may read and write",
        errno.EPERM: f"not permitted{where}: choose a folder that you may read and write",
        errno.ENOTDIR: f"a part of the path is a file, not a folder{where}",
        errno.EISDIR: f"that is a folder, a file was expected{where}",
        errno.ENAMETOOLONG: "a path is longer than this system allows",
    }
    return known.get(error.errno or 0)


def message(error: BaseException) -> tuple[str, int]:
    """What to tell people ("" where another process tells it) and the exit code."""
    if isinstance(error, ArchipelError):
        return "" if error.told else f"error: {error}", error.exit_code
    if isinstance(error, Stopped):
        return "" if error.told else str(error), EXIT_INTERRUPTED if error.interrupted else 0
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was finished is kept, start it again to continue", EXIT_INTERRUPTED
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("archipel"):
        return (
            f"error: the package {error.name!r} is not installed: pip install 'archipel[all]' brings everything",
            EXIT_WRONG_INPUT,
        )
    if isinstance(error, OSError) and (text := _os_error(error)):
        return f"error: {text}", EXIT_WRONG_INPUT
    return (
        f"internal error: {type(error).__name__}: {error}\nThis is a fault in Archipel. ARCHIPEL_DEBUG=1 shows the traceback; "
        "please report it with the output of `archipel doctor`.",
        EXIT_INTERNAL,
    )


def flush() -> None:
    """Write out what was printed; a reader that is gone (`archipel status RUN | head -1`) is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
