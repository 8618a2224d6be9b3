"""What a store's errors mean: the ones we raise, whether to try again, and in which words to tell people.

A store's error can quote requests, and those can hold access keys or signatures: only the parts named here are repeated.
"""

from __future__ import annotations

import contextlib
import re
import sys

from archipel.errors import EXIT_WRONG_INPUT, ArchipelError

TAKEN, ABSENT, DENIED, SHORT, FINAL, AGAIN = "taken", "absent", "denied", "short", "final", "again"
_STATUS = re.compile(r"status code: (\d{3})( [A-Za-z][A-Za-z ]*)?")
_CODE = re.compile(r"<Code>\s*([A-Za-z0-9]{1,60})\s*</Code>")
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}
# Answers of 4xx that pass: time-outs, conflicts between writers, and too many requests.
_PASSING = {408, 409, 425, 429}
_PASSING_CODES = {"RequestTimeout", "OperationAborted", "ServerBusy", "Throttling", "ThrottlingException", "SlowDown"}


class StoreError(ArchipelError):
    """The store stayed away for longer than we wait, or said a final no."""

    exit_code = EXIT_WRONG_INPUT


class AwayError(StoreError):
    """The store did not answer for as long as we were told to wait: another try may do."""


class IgnoresConditionsError(StoreError):
    """The store let a second create of one key succeed: two islands could hold one job."""


def say(text: str) -> None:
    """For people. Strangers' words may be among it: nothing that a terminal would obey; one that is gone is no error."""
    with contextlib.suppress(OSError, ValueError):
        print("".join(c if c.isprintable() else "?" for c in text), file=sys.stderr, flush=True)


def status_of(error: Exception) -> int | None:
    """The HTTP status that the store answered with, or None where there was no answer."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def kind_of(error: Exception) -> str:
    """What an error of obstore says.

    "taken" (the key exists), "absent" (no such object), "denied", "short" (the object ends before the range asked for),
    "final" (asking again will not help; no such bucket among them), "again".
    """
    from obstore import exceptions as e

    if isinstance(error, e.AlreadyExistsError | e.PreconditionError):
        return TAKEN
    if isinstance(error, e.NotFoundError | FileNotFoundError):
        return FINAL if no_bucket(error) else ABSENT
    if isinstance(error, e.PermissionDeniedError | e.UnauthenticatedError):
        return DENIED
    if isinstance(error, e.NotSupportedError | e.InvalidPathError | e.UnknownConfigurationKeyError):
        return FINAL
    return _by_status(str(error), status_of(error))


def _by_status(text: str, status: int | None) -> str:
    if status is None:
        # obstore's own words where a file on disk, or a whole answer, ends before the range begins
        beyond = "Requested range was invalid" in text or "range started at" in text or "Out of range" in text
        # an answer without the headers of this protocol; a bucket of another region
        if "missing from response" in text or "redirect without LOCATION" in text:
            return FINAL
        return SHORT if beyond else AGAIN
    if status == 416:
        return SHORT
    if status in (401, 403):
        return DENIED
    code = _CODE.search(text)
    if status in _PASSING or (code and code[1] in _PASSING_CODES) or status >= 500:
        return FINAL if status in (501, 505) else AGAIN
    return FINAL if 300 <= status < 500 else AGAIN


def no_bucket(error: Exception) -> bool:
    """Whether the store says that the bucket or container itself is not there: by its code, or to a listing."""
    text = str(error)
    code = _CODE.search(text)
    return bool(code and code[1] in _NO_BUCKET) or (status_of(error) == 404 and "list request" in text)


def words(error: Exception) -> str:
    """An error in a few words without credentials: the store's status and code, or the first line without a query."""
    text = str(error).strip()
    status, code = _STATUS.search(text), _CODE.search(text)
    if status:
        answer = f"it answered {status[1]}{(status[2] or '').rstrip()}"
        return f"{answer}, {code[1]}" if code else answer
    first = (text.splitlines() or [type(error).__name__])[0]
    return re.sub(r"\?\S+", "", first)[:240]
