"""Errors meant for people: what was wrong, where, and what to do about it."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_INTERNAL = 1
EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130


class ArchipelError(Exception):
    """Wrong use or wrong input. The message names the key, file or row and says what to do; the shell exits with 2."""

    exit_code = EXIT_WRONG_INPUT
    told = False  # by another process of the same training: only the exit code is left to pass on


class ConfigError(ArchipelError):
    """A value in ``run.toml`` (or given with ``--set``) cannot be used."""


class DamagedError(ArchipelError):
    """A file is torn, damaged, or not what its checksum says."""


class LockedError(ArchipelError):
    """Another process is working on the same thing."""


class MissingStageError(ArchipelError):
    """A stage needs files of an earlier stage that are not there yet."""


class LostExpertError(ArchipelError):
    """An expert on another machine does not answer, or answers with what cannot be used; ``reason``: a part of a sentence.

    Sampling can go on with the others."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Stopped(Exception):  # noqa: N818 - it is no error
    """Work was asked to stop (Ctrl-C, SIGTERM or --for) and has kept everything; not a failure.

    ``told``: as ``ArchipelError``'s. ``interrupted`` is True for signals (exit 130) and False where the stop was asked for
    in advance (exit 0).
    """

    told = False

    def __init__(self, message: str, *, interrupted: bool = True) -> None:
        super().__init__(message)
        self.interrupted = interrupted
