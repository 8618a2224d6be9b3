"""Ray: preparation as Ray Data, experts and evaluation sampling as Ray tasks. Where RAY_ADDRESS names a cluster that one is
used, else one is started on this machine and ends with the command.

An expert's task runs the command that any island runs and waits for it; what it trains lies in the store. A node that is
lost takes its tasks with it: Ray starts them elsewhere, and ``join`` there takes the job over when the lost holder's lease
has run out. Pieces of other work travel as bytes through Ray: nodes need Archipel, the store, and nothing of this disk.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import logging
import os
import pkgutil
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from archipel import __version__, store
from archipel.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_WRONG_INPUT, ArchipelError
from archipel.islands.launch import engine
from archipel.islands.launch.local import in_order
from archipel.progress import Progress, StopFlag
from archipel.run import Run
from archipel.spread import Arrays, Make

_POLL = 0.25  # seconds
_LOOK = 1.0  # seconds between looks at the flag that stops jobs
_REACH = 10.0  # seconds for the cluster to answer at all
_GRACE = 60.0  # seconds for a command to save what it has
_TRIES = 20  # how often a task is started again after its node was lost
_AHEAD = 4  # pieces on their way for each CPU (or GPU) of the cluster
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
            _ray().shutdown()

    @property
    def device(self) -> str:
        return "cuda" if _ray().cluster_resources().get("GPU", 0) >= 1 else "cpu"

    @property
    def threads(self) -> int:
        """CPUs of one task: as asked for, else an equal share for each of the run's jobs; Raises ArchipelError where no
        node has as many."""
        largest = max((int(node["Resources"].get("CPU", 0)) for node in _nodes()), default=0)
        if self._asked is not None:
            if self._asked > largest:
                raise ArchipelError(f"--threads {self._asked}: no node of the cluster has more than {largest} CPUs")
            return self._asked
        total = int(_ray().cluster_resources().get("CPU", 1))
        return max(1, min(largest, total // len(self.run.job_names)))

    def items(
        self, make: Make, given: Iterable[Arrays], root: Path, needs: Sequence[str], *, device: str = "cpu"
    ) -> Generator[Arrays, None, None]:
        """See ``archipel.spread.Spread``: Ray Data, ``map_batches`` over the pieces."""
        return _by_ray_data(_Work.of(make, root, needs, self._threads_of_pieces, device), given)

    def tasks(
        self, make: Make, given: Iterable[Arrays], root: Path, needs: Sequence[str], *, device: str = "cpu"
    ) -> Generator[Arrays, None, None]:
        """See ``archipel.spread.Spread``: a Ray task for each piece."""
        return _by_tasks(_Work.of(make, root, needs, self._threads_of_pieces, device), given)

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
        ray, threads = _ray(), self.threads
        resources = {"num_cpus": threads, "num_gpus": 1 if self.device == "cuda" else 0}
        task = ray.remote(max_retries=_TRIES, **resources)(run_command)
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
        code, said = _result(f"training {name}", task)
        log = self.run.log(f"train-{name}")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            file.write(said)
        engine.judge(f"training {name}", code, said)


# --- Ray itself ------------------------------------------------------------------------------------------------------


def _ray() -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when Ray starts its processes: no telemetry, whoever we start
    try:
        import ray
    except ModuleNotFoundError:
        raise ArchipelError(
            "--engine ray needs Ray: pip install 'archipel[ray]', in an environment without gradio"
        ) from None
    return ray


def connect() -> bool:
    """Connect to the cluster of RAY_ADDRESS, else start one on this machine. Returns False where this process is
    connected already. Raises ArchipelError where the cluster does not answer."""
    ray = _ray()
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
    return [node for node in _ray().nodes() if node["Alive"]]


def _result(what: str, task: Any) -> Any:
    """What a task returned. Raises ArchipelError in Archipel's words for whatever Ray makes of a failure."""
    from ray import exceptions

    try:
        return _ray().get(task)
    except exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ArchipelError):
            raise cause from None
        raise engine.JobError(f"{what} failed on a node of the Ray cluster: {type(cause).__name__}: {cause}") from error
    except exceptions.RayError as error:
        raise engine.JobError(f"{what} was lost {_TRIES + 1} times by the Ray cluster: {error}") from error


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
    ray = _ray()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Flag).remote()


def _is_up(flag: Any) -> bool:
    """Whether the flag is up; one that cannot be asked is not: with the driver gone, Ray ends us anyway."""
    with contextlib.suppress(Exception):
        return bool(_ray().get(flag.is_up.remote(), timeout=_REACH))
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


# --- pieces of work --------------------------------------------------------------------------------------------------


class _Work:
    """One kind of work as it travels: the function's name, and the files it needs as objects of Ray's."""

    def __init__(self, make: str, root: str, files: dict[str, tuple[str, Any]], threads: int, device: str) -> None:
        self.make, self.root, self.files, self.version = make, root, files, __version__
        self.resources = {"num_cpus": threads, "num_gpus": 1 if device.startswith("cuda") else 0}

    @classmethod
    def of(cls, make: Make, root: Path, needs: Sequence[str], threads: int, device: str) -> _Work:
        ray = _ray()
        files = {
            name: (store.sha256_file(root / name), ray.put((root / name).read_bytes())) for name in _files(root, needs)
        }
        return cls(f"{make.__module__}:{make.__qualname__}", str(root.resolve()), files, threads, device)

    def __call__(self, data: bytes) -> tuple[bytes, str]:
        """On a node: the arrays of a piece -> what the function makes of them, both as safetensors, or the error as JSON.
        An error travels as text: Ray's wrappings of exceptions differ between its parts and its versions."""
        try:
            if self.version != __version__:
                raise ArchipelError(f"a node has Archipel {__version__}, this machine {self.version}: install the same")
            hashes = tuple((name, sha256) for name, (sha256, _) in self.files.items())
            root = place(self.root, hashes, lambda name: bytes(_ray().get(self.files[name][1])))
            with _threads(int(self.resources["num_cpus"])):
                return pack(pkgutil.resolve_name(self.make)(root, unpack(data))), ""
        except ArchipelError as error:
            return b"", json.dumps({"text": str(error), "exit_code": error.exit_code})
        except Exception as error:
            text = f"{self.make} failed on a node of the Ray cluster: {type(error).__name__}: {error}"
            return b"", json.dumps({"text": text, "exit_code": EXIT_INTERNAL})


def _opened(made: bytes, error: str) -> dict[str, np.ndarray]:
    """The arrays that came back. Raises the error that came instead."""
    if error:
        told = json.loads(error)
        raise (ArchipelError if told["exit_code"] == EXIT_WRONG_INPUT else engine.JobError)(told["text"])
    return unpack(made)


def _files(root: Path, needs: Sequence[str]) -> list[str]:
    """The files that ``needs`` names, folders opened up."""
    found = []
    for name in needs:
        path = root / name
        parts = sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]
        found += [part.relative_to(root).as_posix() for part in parts]
    return found


_PLACES: dict[tuple[str, tuple[tuple[str, str], ...]], Path] = {}


def place(root: str, hashes: tuple[tuple[str, str], ...], fetch: Callable[[str], bytes]) -> Path:
    """A folder of this machine with the files of these names and hashes: ``root`` itself where it holds them (a shared
    file system), else a copy, made once per process and removed at its end."""
    key = (root, hashes)
    if key not in _PLACES:
        own = Path(root)
        if all((own / name).is_file() and store.sha256_file(own / name) == sha256 for name, sha256 in hashes):
            _PLACES[key] = own
        else:
            copy = Path(tempfile.mkdtemp(prefix="archipel-"))
            atexit.register(shutil.rmtree, copy, ignore_errors=True)
            for name, sha256 in hashes:
                data = fetch(name)
                if store.sha256_bytes(data) != sha256:
                    raise ArchipelError(f"{name} came to a node with another sha256 than it had on its way")
                store.write_bytes(copy / name, data)
            _PLACES[key] = copy
    return _PLACES[key]


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """``count`` threads for whatever computes: by the environment where torch is not there yet, else by torch."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(count)
    if "torch" not in sys.modules:
        yield
        return
    from archipel.training import machine

    with machine.threads(count):
        yield


def pack(arrays: Arrays) -> bytes:
    """Arrays as safetensors."""
    from safetensors.numpy import save

    return bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def unpack(data: bytes) -> dict[str, np.ndarray]:
    """Arrays of our own, which may be written to."""
    from safetensors.numpy import load

    return {name: np.array(array) for name, array in load(data).items()}


def _room(work: _Work) -> int:
    """How many pieces may be on their way: a few for each CPU or GPU."""
    kind = "GPU" if work.resources["num_gpus"] else "CPU"
    share = work.resources["num_gpus"] or work.resources["num_cpus"]
    return _AHEAD * max(1, int(_ray().cluster_resources().get(kind, 1) // share))


def _by_tasks(work: _Work, given: Iterable[Arrays]) -> Generator[Arrays, None, None]:
    ray = _ray()
    call = ray.remote(max_retries=_TRIES, **work.resources)(_one)
    held, pieces = ray.put(work), iter(given)
    waiting: list[Any] = []
    while True:
        for piece in itertools.islice(pieces, _room(work) - len(waiting)):
            waiting.append(call.remote(held, pack(piece)))
        if not waiting:
            return
        yield _opened(*_result(work.make, waiting.pop(0)))


def _one(work: _Work, data: bytes) -> tuple[bytes, str]:
    return work(data)


def _by_ray_data(work: _Work, given: Iterable[Arrays]) -> Generator[Arrays, None, None]:
    """In waves, so that what lies in Ray's memory stays bounded whatever the number of pieces is."""
    from ray import data

    context = data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False  # we have our own
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells every plan on the screen; its files keep it
    pieces = iter(given)
    while wave := [pack(piece) for piece in itertools.islice(pieces, _room(work))]:
        made = data.from_arrow([_table(piece) for piece in wave]).map_batches(
            functools.partial(_batch, work), batch_size=None, batch_format="pyarrow", **work.resources
        )
        count = 0
        for table in _tables(work, made):
            for piece, error in zip(table["piece"], table["error"], strict=True):
                yield _opened(piece.as_py(), error.as_py())
                count += 1
        if count != len(wave):
            raise engine.JobError(f"Ray Data gave back {count} of {len(wave)} pieces of {work.make}")


def _tables(work: _Work, made: Any) -> Iterator[Any]:
    from ray import exceptions

    try:
        yield from made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
    except exceptions.RayError as error:
        raise engine.JobError(f"{work.make} was lost by the Ray cluster: {error}") from error


def _table(piece: bytes) -> Any:
    import pyarrow

    return pyarrow.table({"piece": pyarrow.array([piece], pyarrow.large_binary())})


def _batch(work: _Work, table: Any) -> Any:
    import pyarrow

    made = [work(row.as_py()) for row in table["piece"]]
    pieces, errors = pyarrow.array([piece for piece, _ in made], pyarrow.large_binary()), [error for _, error in made]
    return pyarrow.table({"piece": pieces, "error": pyarrow.array(errors, pyarrow.string())})
