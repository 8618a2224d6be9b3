"""Engines: where the commands of a run are carried out. They know no mathematics, and no stage imports them.

An engine that trains elsewhere goes through a store that all its machines see: it publishes the run there, starts the
very command that any island runs, ``archipel join STORE --only NAME --jobs 1``, and brings the results back.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from archipel.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_WRONG_INPUT, ArchipelError, Stopped
from archipel.islands import site as sites
from archipel.islands.launch.local import steps_of
from archipel.progress import StopFlag
from archipel.run import Run
from archipel.spread import Spread
from archipel.training.local import Local

LOCAL = "local"
_LOOK = 5.0  # seconds between looks at the store, and as long as one look may take
ENGINES = {
    "ray": "archipel.islands.launch.ray:RayEngine",
    "slurm": "archipel.islands.launch.slurm:SlurmEngine",
    "sky": "archipel.islands.launch.sky:SkyEngine",
}
WITH_SITE = ("slurm", "sky")  # those with a section in site.toml, made as Cls(run, store, threads, site)


class Engine(Protocol):
    """Made as ``Cls(run, store, threads)``, used in a ``with`` block.

    ``store`` is a URL or a folder that every machine of the engine sees. ``threads`` is what ``--threads`` asks for.
    """

    @property
    def items(self) -> Spread | None:
        """For many short pieces of work (decoding, encoding); None: this process does them."""
        ...

    @property
    def tasks(self) -> Spread | None:
        """For fewer, longer pieces of work (sampling); None: this process does them."""
        ...

    @property
    def device(self) -> str | None:
        """Where ``tasks`` computes: ``cpu`` or ``cuda``; None: wherever this machine would."""
        ...

    def train(self, names: list[str], stop: StopFlag) -> None:
        """Bring every job of ``names`` to its end, its result in the run's folder.

        Raises ArchipelError where a job fails, Stopped when asked to stop (everything is kept).
        """
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None: ...


def open_engine(
    name: str, run: Run, *, store: str | None = None, threads: int | None = None, site: Sequence[str] = ()
) -> Engine | None:
    """The engine called ``name``; None for ``local``, which is what the stages do by themselves.

    ``site`` are ``section.key=value`` pairs on top of the run's ``site.toml``. Raises ArchipelError for a name that is not
    known, and for a store or pairs where nothing would use them.
    """
    if site and name not in WITH_SITE:
        raise ArchipelError(f"--site is for the engines {' and '.join(WITH_SITE)}: the engine {name} has no use for it")
    if name == LOCAL:
        if store is not None:
            raise ArchipelError(f"--store is for the engines {', '.join(ENGINES)}: the engine local needs none")
        return None
    if name not in ENGINES:
        raise ArchipelError(f"--engine {name!r} is not known: there are {', '.join((LOCAL, *ENGINES))}")
    module, _, cls = ENGINES[name].partition(":")
    more = (site,) if name in WITH_SITE else ()
    engine: Engine = getattr(importlib.import_module(module), cls)(run, store or default_store(run), threads, *more)
    return engine


def default_store(run: Run) -> str:
    """A folder of the run: right where all machines share its file system."""
    return (run.root.resolve() / "store").as_uri()


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "archipel.cli", *map(str, arguments)]


def join_arguments(store: str, run: Run, name: str, threads: int | None, site: Sequence[str] = ()) -> list[str]:
    """What one job is, wherever it runs: the arguments of ``archipel``. How it computes is what the run's ``site.toml``
    with ``site`` on top says under [train]: the machine that runs it does not see that file."""
    limit = ["--threads", str(threads)] if threads else []
    local = sites.local(run.root, {}, site)
    how = [] if local == Local() else local.words()
    return ["join", store, "--only", name, "--jobs", "1", "--run-id", run.id, *limit, *how]


def environment(threads: int | None) -> dict[str, str]:
    """What a job's process gets on top of its machine's environment."""
    count = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {}
    return count | {
        "PYTHONUNBUFFERED": "1",
        "ARCHIPEL_STOP_WITH_PARENT": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "DISABLE_TELEMETRY": "YES",
    }


def last_words(said: str) -> str:
    """The error that a command told, else its last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("error: ", "internal error: "))]
    return (told or lines or ["it said nothing"])[-1].removeprefix("error: ")


class JobError(ArchipelError):
    """A command that failed by a fault of ours, and not by what it was given."""

    exit_code = EXIT_INTERNAL


def judge(what: str, code: int, said: str) -> None:
    """Raise what a command's end means: nothing for 0, Stopped for 130, ArchipelError with its last words else."""
    if code == EXIT_INTERRUPTED:
        raise Stopped(f"{what} was stopped; everything is kept, start it again to continue")
    if code != 0:
        kind = ArchipelError if code == EXIT_WRONG_INPUT else JobError
        raise kind(f"{what} {_ending(code)}: {last_words(said)}")


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return "was ended by " + next((one.name for one in signal.Signals if one == -code), f"signal {-code}")


def _call(what: str, *arguments: object) -> str:
    """Carry out a command of ours here; what it told. Raises by its exit code."""
    done = subprocess.run(
        command(*arguments), env=os.environ | environment(None) | {"ARCHIPEL_STOP_WITH_PARENT": "0"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    judge(what, done.returncode, done.stderr)
    return done.stderr


def publish(run: Run, store: str) -> None:
    """Put what islands need into the store; what is there already is left alone."""
    _call("publishing the run", "publish", run.root, store)


def collect(run: Run, store: str) -> None:
    """Bring the results of the store into the run's folder, each admitted first: by the rules of RUN/trust.toml, and without
    it by all but the loss, since the machines are the owner's own and training here would have asked for none.

    Raises ArchipelError where one is refused, in the words of the refusal.
    """
    with tempfile.TemporaryDirectory(prefix="archipel-trust-") as folder:
        rules = run.root / "trust.toml"
        if not rules.exists():
            rules = Path(folder) / "trust.toml"
            rules.write_text("[loss]\nrequired = false\n", encoding="utf-8")
        arguments = ["pull", store, run.root, "--run-id", run.id, "--admit", "--trust", rules]
        said = _call("bringing the results back", *arguments)
    missing = [name for name in run.job_names if not run.done(run.expert(name))]
    if missing:
        words = "; ".join(line.strip() for line in said.splitlines() if line.strip())
        raise ArchipelError(f"jobs {', '.join(missing)} were not brought back from {store}: {words}")


class Steps:
    """How far jobs are, by their heartbeats in the store, looked at now and then; for people, nothing is decided by it."""

    def __init__(self, run: Run, store: str, names: list[str]) -> None:
        from archipel.islands.objects import Objects

        self._objects = Objects.open(store, patience=_LOOK)
        self._looked = -_LOOK
        self._steps = {name: (0, steps_of(run, name)) for name in names}
        self.total = sum(steps for _, steps in self._steps.values())

    def done(self) -> int:
        """Steps made so far, of ``total``."""
        if time.monotonic() - self._looked >= _LOOK:
            for name, (step, steps) in self._steps.items():
                if step < steps:
                    self._steps[name] = (self._step(name, step, steps), steps)
            self._looked = time.monotonic()
        return sum(step for step, _ in self._steps.values())

    def note(self) -> str:
        return ", ".join(f"{name} {step}/{steps}" for name, (step, steps) in self._steps.items() if 0 < step < steps)

    def _step(self, name: str, step: int, steps: int) -> int:
        from archipel.islands.claims import read_state

        with contextlib.suppress(ArchipelError):  # a store that is away for a while is the islands' matter
            state = read_state(self._objects, name)
            told = state.heartbeat.get("step")
            return steps if state.done else min(steps, told) if isinstance(told, int) else step
        return step
