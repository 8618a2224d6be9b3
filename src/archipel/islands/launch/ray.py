"""Ray: preparation as Ray Data, experts and evaluation sampling as Ray tasks. Where RAY_ADDRESS names a cluster that one is
used, else one is started on this machine and ends with the command.

An expert's task runs the command that any island runs and waits for it; what it trains lies in the store. A node that is
lost takes its tasks with it: Ray starts them elsewhere, and ``join`` there takes the job over when the lost holder's lease
has run out. Pieces of other work travel as bytes through Ray: nodes need Archipel, the store, and nothing of this disk.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from archipel.errors import EXIT_INTERRUPTED, ArchipelError
from archipel.islands.launch import engine
from archipel.islands.launch.local import in_order
from archipel.islands.launch.ray_pieces import TRIES, Work, by_ray_data, by_tasks, library, result
from archipel.progress import Progress, StopFlag
from archipel.run import Run
from archipel.spread import Arrays, Make

_POLL = 0.25  # seconds
_LOOK = 1.0  # seconds between looks at the flag that stops jobs
_REACH = 10.0  # seconds for the cluster to answer at all
_GRACE = 60.0  # seconds for a command to save what it has
_LAST = 20_000  # bytes of a command's words that are brought back


class RayEngine:
    """``archipel run RUN --engine ray``. ``store`` must be a URL that all nodes reach, or a folder that they share."""

    def __init__(self, run: Run, store: str, threads: int | None = None) -> None:
        self.run, self.store, self._asked = run, store, threads
        self._ours = False

    def __enter__(self) -> RayEngine:
        self._ours = connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ours:
            library().shutdown()

    @property
    def device(self) -> str:
        return "cuda" if library().cluster_resources().get("GPU", 0) >= 1 else "cpu"

    @property
    def threads(self) -> int:
        """CPUs of one task: as asked for, else an equal share for each of the run's jobs; Raises ArchipelError where no
        node has as many."""
        largest = max((int(node["Resources"].get("CPU", 0)) for node in _nodes()), default=0)
        if self._asked is not None:
            if self._asked > largest:
                raise ArchipelError(f"--threads {self._asked}: no node of the cluster has more than {largest} CPUs")
            return self._asked
        total = int(library().cluster_resources().get("CPU", 1))
        return max(1, min(largest, total // len(self.run.job_names)))

    def items(
        self, make: Make, given: Iterable[Arrays], root: Path, needs: Sequence[str], *, device: str = "cpu"
    ) -> Generator[Arrays, None, None]:
        """See ``archipel.spread.Spread``: Ray Data, ``map_batches`` over the pieces."""
        return by_ray_data(Work.of(make, root, needs, self._threads_of_pieces, device), given)

    def tasks(
        self, make: Make, given: Iterable[Arrays], root: Path, needs: Sequence[str], *, device: str = "cpu"
    ) -> Generator[Arrays, None, None]:
        """See ``archipel.spread.Spread``: a Ray task for each piece."""
        return by_tasks(Work.of(make, root, needs, self._threads_of_pieces, device), given)

    @property
    def _threads_of_pieces(self) -> int:
        """Pieces are many, so one thread each is the fastest, unless --threads says otherwise."""
        return self.threads if self._asked is not None else 1

    def train(self, names: list[str], stop: StopFlag) -> None:
        """See ``archipel.islands.launch.engine.Engine``."""
        engine.publish(self.run, self.store)
        self._train(in_order(self.run, names), stop)
        engine.collect(self.run, self.store)

    def _train(self, names: list[str], stop: StopFlag) -> None:
        ray, threads = library(), self.threads
        resources = {"num_cpus": threads, "num_gpus": 1 if self.device == "cuda" else 0}
        task = ray.remote(max_retries=TRIES, **resources)(run_command)
        more, flag = engine.environment(threads), _flag()
        running = {
            task.options(name=f"archipel join {name}").remote(
                engine.command(*engine.join_arguments(self.store, self.run, name, threads))[1:], more, flag
            ): name
            for name in names
        }
        watch = engine.Steps(self.run, self.store, names)
        try:
            with Progress("train (ray)", watch.total, watch.done()) as bar:
                while running:
                    if stop:
                        print("stopping: every job saves a checkpoint first", file=sys.stderr, flush=True)
                        raise stop.error("training on Ray")
                    ended, _ = ray.wait(list(running), timeout=_POLL)
                    for one in ended:
                        self._judge(running.pop(one), one)
                    bar.update(watch.done(), watch.note())
                bar.update(watch.total)
        finally:
            if running:
                flag.raise_it.remote()
                ray.wait(list(running), num_returns=len(running), timeout=_GRACE + 5)

    def _judge(self, name: str, task: Any) -> None:
        code, said = result(f"training {name}", task)
        log = self.run.log(f"train-{name}")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            file.write(said)
        engine.judge(f"training {name}", code, said)


# --- Ray itself ------------------------------------------------------------------------------------------------------


def connect() -> bool:
    """Connect to the cluster of RAY_ADDRESS, else start one on this machine. Returns False where this process is
    connected already. Raises ArchipelError where the cluster does not answer."""
    ray = library()
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS") or None
    _answers(address or "")
    own: dict[str, Any] = {} if address else {"include_dashboard": False}
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ArchipelError(f"no Ray cluster at RAY_ADDRESS = {address!r}: {str(error).splitlines()[0]}") from error
    finally:
        with contextlib.suppress(ValueError):  # not the main thread: Ray has put no handler there
            for number, handler in before.items():
                signal.signal(number, handler)  # Ray's own would end the process before anything is saved
    return True


def _answers(address: str) -> None:
    """Raise ArchipelError where nobody listens at HOST:PORT: Ray itself would try for many minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return  # "auto", "local", ray://...: Ray's own matter
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH).close()
    except (OSError, OverflowError) as error:
        raise ArchipelError(f"no Ray cluster at RAY_ADDRESS = {address!r}: {error}") from error


def _nodes() -> list[dict[str, Any]]:
    return [node for node in library().nodes() if node["Alive"]]


class Flag:
    """An actor beside the driver that tells the jobs to stop. ``ray.cancel`` is no way to do it: a task that ends in the
    same moment makes Ray 2.60 abort the driver ("Tried to complete task that was not pending")."""

    def __init__(self) -> None:
        self._up = False

    def raise_it(self) -> None:
        self._up = True

    def is_up(self) -> bool:
        return self._up


def _flag() -> Any:
    ray = library()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Flag).remote()


def _is_up(flag: Any) -> bool:
    """Whether the flag is up; one that cannot be asked is not: with the driver gone, Ray ends us anyway."""
    with contextlib.suppress(Exception):
        return bool(library().get(flag.is_up.remote(), timeout=_REACH))
    return False


# --- on a node: a command --------------------------------------------------------------------------------------------


def run_command(arguments: list[str], more: Mapping[str, str], flag: Any) -> tuple[int, str]:
    """Run Python with ``arguments`` to its end, as a child that stops with us, or when the flag is up. Returns its exit
    code and last words."""
    if _is_up(flag):
        return EXIT_INTERRUPTED, ""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=os.environ | dict(more),
            start_new_session=True,
        )
        looked = time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(_POLL)
                if (asked := time.monotonic()) - looked >= _LOOK:
                    looked = asked
                    if _is_up(flag):
                        break
        finally:
            _end(process)
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - _LAST))
        return process.returncode, output.read().decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdin is not None:
        process.stdin.close()
