"""What the faults share: a record of what was made and what came of it, stores to make it on, and runs to make it to."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archipel.islands.objects import Objects
from faults.servers import MotoServer

ROOT = Path(__file__).parents[1]


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """For children: this process's environment, our packages from the clone, one thread, no hub."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("AWS_")}
    fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    return kept | fixed | (more or {})


def plain(text: str) -> str:
    """Words of a process without the folders and ports of the machine it ran on, and without times of a request."""
    text = re.sub(r"(?<![\w.:/])(/[\w.-]+){2,}/(?=[\w.-])", ".../", text)
    return re.sub(r" in [\d.]+(ms|µs|s)\b", "", re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", text))


@dataclass
class Record:
    """What one fault's run came to: ``made`` of ``wanted``, rows of a table, refusals in their own words, problems.

    Use as a context; ``value`` is plain JSON and ready on leaving. "ok" is true where all were made and nothing is wrong.
    """

    fault: str
    what: str
    wanted: int
    seed: int
    made: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    value: dict[str, Any] = field(default_factory=dict)

    def problem(self, text: str) -> None:
        self.problems.append(text)

    def __enter__(self) -> Record:
        self._began = time.monotonic()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            return
        self.value = {
            "fault": self.fault,
            "what": self.what,
            "wanted": self.wanted,
            "made": self.made,
            "seed": self.seed,
            "seconds": round(time.monotonic() - self._began, 1),
            "rows": self.rows,
            "facts": self.facts,
            "refusals": {plain(kind): plain(text) for kind, text in self.refusals.items()},
            "problems": self.problems[:50],
            "ok": not self.problems and self.made >= self.wanted,
        }


@dataclass(frozen=True)
class Store:
    """A store to make faults on. ``folder``: where its objects lie, for a local one; ``endpoint``: "" for a local one."""

    kind: str
    url: str
    environment: dict[str, str] = field(default_factory=dict)
    endpoint: str = ""
    bucket: str = ""
    folder: Path | None = None


_opening = threading.Lock()


def open_store(where: Store, patience: float = 30.0) -> Objects:
    """A connection to a store from this process, whose environment is another's for just that moment."""
    with _opening:
        before = {name: os.environ.get(name) for name in where.environment}
        os.environ.update(where.environment)
        try:
            return Objects.open(where.url, patience=patience)
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextlib.contextmanager
def stores(kind: str, work: Path) -> Iterator[Store]:
    """An empty store: "file" below ``work``, or "s3" on a server that ends with the block."""
    if kind == "file":
        folder = work / f"bucket-{os.urandom(3).hex()}"
        folder.mkdir(parents=True)
        yield Store("file", f"file://{folder}", folder=folder)
        return
    with MotoServer() as server:
        bucket = server.make_bucket("faults")
        more = server.environment | {"AWS_ALLOW_HTTP": "true"}
        yield Store("s3", f"s3://{bucket}/run", more, server.endpoint, bucket)
