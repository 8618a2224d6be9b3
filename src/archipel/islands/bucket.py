"""A run in a bucket, opened: its configuration, the list of its published files, and the state of its jobs.

What is read here was written by strangers as far as this module knows: sizes are bounded before anything is read, names
are checked, and every published file is held to the sha256 that ``published.json`` gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archipel import FORMAT
from archipel import config as configuration
from archipel.config import RunConfig
from archipel.errors import ArchipelError, DamagedError
from archipel.islands import keys
from archipel.islands.claims import State, read_state
from archipel.islands.objects import PATIENCE, Objects, decode
from archipel.run import MONOLITH, ROUTER, begins_with_base

_MAX_RUN = 1 << 20  # bytes of run.toml
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STEP = re.compile(r"jobs/[a-z0-9]+/(\d{8})/checkpoints/(\d{8})/manifest\.json")


@dataclass(frozen=True)
class File:
    """What a published key holds."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Bucket:
    """A published run. ``id`` is the sha256 of its run.toml; ``files`` are what `publish` put there."""

    objects: Objects
    config: RunConfig
    id: str
    files: Mapping[str, File]
    run_toml: bytes

    @classmethod
    def open(
        cls,
        url: str | Path,
        run_id: str | None = None,
        *,
        patience: float = PATIENCE,
        give_up: Callable[[], bool] = lambda: False,
    ) -> Bucket:
        """Read run.toml and published.json of a bucket or folder; ``run_id`` (or its first 8 characters or more) pins
        which run it must be; ``give_up`` ends waits for the store.

        Raises ArchipelError where there is no published run or another one, StoreError, DamagedError.
        """
        objects = Objects.open(url, patience=patience)
        objects.give_up = give_up
        return cls.read(objects, run_id)

    @classmethod
    def read(cls, objects: Objects, run_id: str | None = None) -> Bucket:
        """``open`` on a store that is open already."""
        data = objects.get(keys.RUN, _MAX_RUN)
        if data is None:
            raise ArchipelError(
                f"there is no run in {objects.url}: `archipel publish RUN {objects.url}` puts one there"
            )
        config, found = configuration.parse(data, f"run.toml in {objects.url}")
        check_id(run_id, found, objects.url)
        files = _published(objects, found)
        if files.get(keys.RUN) != File(found, len(data)):
            raise DamagedError(
                f"{keys.PUBLISHED} in {objects.url} is of another run.toml: publish the run again elsewhere"
            )
        return cls(objects, config, found, files, data)

    @property
    def url(self) -> str:
        return self.objects.url

    @property
    def jobs(self) -> list[str]:
        """Experts, monolith and router: from the configuration, never from what lies in the bucket."""
        return [*(str(k) for k in range(self.config.partition.k)), MONOLITH, ROUTER]

    @property
    def base(self) -> str | None:
        """sha256 of the weights that experts begin with or are adapters of; None where they begin with none. Raises
        DamagedError where they should be published and are not."""
        if not begins_with_base(self.config):
            return None
        file = self.files.get(f"{keys.BASE}/model.safetensors")
        if file is None:
            raise DamagedError(
                f"{keys.PUBLISHED} in {self.url} lists no {keys.BASE}, which this run's experts begin with: publish the run again"
            )
        return file.sha256

    def shard(self, name: str) -> dict[str, File]:
        """The published files of the shard that a job trains on, by key. Raises DamagedError where there are none."""
        prefix = keys.shard("all" if name in (MONOLITH, ROUTER) else name) + "/"
        found = {key: file for key, file in self.files.items() if key.startswith(prefix)}
        if not found:
            raise DamagedError(f"{keys.PUBLISHED} in {self.url} lists no shard for job {name}: publish the run again")
        return found

    def fetch(self, key: str, path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        """Bring a published file to ``path``, verified. Raises DamagedError for one that is not listed, or damaged."""
        file = self.files.get(key)
        if file is None:
            raise DamagedError(f"{keys.PUBLISHED} in {self.url} does not list {key}")
        self.objects.fetch(key, path, sha256=file.sha256, size=file.size, on_bytes=on_bytes)

    def state(self, name: str) -> State:
        """Where a job stands. Raises ArchipelError for a name that is no job, StoreError."""
        self.check_job(name)
        return read_state(self.objects, name)

    def check_job(self, name: str) -> None:
        if name not in self.jobs:
            raise ArchipelError(f"{name!r} is not a job of this run: it has {', '.join(self.jobs)}")


def checkpoints(state: State) -> list[tuple[int, int]]:
    """(step, fence) of the job's checkpoints that have a manifest and still count, the furthest first."""
    found = []
    for key in state.keys:
        if match := _STEP.fullmatch(key):
            fence, step = int(match[1]), int(match[2])
            if state.above < fence <= state.fence and step > 0:
                found.append((step, fence))
    return sorted(found, reverse=True)


def check_id(wanted: str | None, found: str, where: str) -> None:
    """Raise ArchipelError where a run is not the one that was asked for."""
    if wanted is None:
        return
    if not re.fullmatch(r"[0-9a-f]{8,64}", wanted):
        raise ArchipelError(
            f"--run-id {wanted!r} is no run id: 8 to 64 of the digits 0-9 and a-f that `publish` printed"
        )
    if not found.startswith(wanted):
        raise ArchipelError(
            f"{where} holds run {found[:12]}, not {wanted[:12]}: somebody replaced it, or the URL is another run's"
        )


def _published(objects: Objects, run_id: str) -> dict[str, File]:
    where = f"{keys.PUBLISHED} in {objects.url}"
    data = objects.get(keys.PUBLISHED)
    if data is None:
        raise ArchipelError(
            f"the run in {objects.url} is not published whole: run `archipel publish` again, it continues"
        )
    value = decode(data)
    version = value.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise ArchipelError(
            f"{where} has format {version}, this Archipel reads format {FORMAT}: install a newer Archipel"
        )
    listed = value.get("files")
    if version != FORMAT or value.get("kind") != "published" or not isinstance(listed, dict):
        raise DamagedError(f"{where} is not readable: publish the run again")
    if value.get("run") != run_id:
        raise DamagedError(f"{where} is of run {str(value.get('run'))[:12]}, run.toml is {run_id[:12]}: publish again")
    return {str(key): _file(key, entry, where) for key, entry in listed.items()}


def _file(key: Any, entry: Any, where: str) -> File:
    keys.check_key(str(key))
    sha256, size = (entry.get("sha256"), entry.get("bytes")) if isinstance(entry, dict) else (None, None)
    whole = isinstance(size, int) and not isinstance(size, bool) and size >= 0
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256) or not whole:
        raise DamagedError(f"{where}: {key} has no sha256 and bytes: publish the run again")
    return File(sha256, size)  # type: ignore[arg-type]
