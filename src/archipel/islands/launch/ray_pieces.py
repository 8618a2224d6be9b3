"""Pieces of work on Ray's nodes: what ``archipel.spread.Spread`` promises, by Ray Data and by Ray tasks.

A piece travels as safetensors bytes and the name of a function; nothing of the run's disk is needed on a node. The files
that a function reads come through Ray as well, where the node does not see them under the run's own path.
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
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from archipel import __version__, store
from archipel.errors import EXIT_INTERNAL, EXIT_WRONG_INPUT, ArchipelError
from archipel.islands.launch import engine
from archipel.spread import Arrays, Make

TRIES = 20  # how often a task is started again after its node was lost
_AHEAD = 4  # pieces on their way for each CPU (or GPU) of the cluster


def library() -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when Ray starts its processes: no telemetry, whoever we start
    try:
        import ray
    except ModuleNotFoundError:
        raise ArchipelError(
            "--engine ray needs Ray: pip install 'archipel[ray]', in an environment without gradio"
        ) from None
    return ray


def result(what: str, task: Any) -> Any:
    """What a task returned. Raises ArchipelError in Archipel's words for whatever Ray makes of a failure."""
    from ray import exceptions

    try:
        return library().get(task)
    except exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ArchipelError):
            raise cause from None
        raise engine.JobError(f"{what} failed on a node of the Ray cluster: {type(cause).__name__}: {cause}") from error
    except exceptions.RayError as error:
        raise engine.JobError(f"{what} was lost {TRIES + 1} times by the Ray cluster: {error}") from error


class Work:
    """One kind of work as it travels: the function's name, and the files it needs as objects of Ray's."""

    def __init__(self, make: str, root: str, files: dict[str, tuple[str, Any]], threads: int, device: str) -> None:
        self.make, self.root, self.files, self.version = make, root, files, __version__
        self.resources = {"num_cpus": threads, "num_gpus": 1 if device.startswith("cuda") else 0}

    @classmethod
    def of(cls, make: Make, root: Path, needs: Sequence[str], threads: int, device: str) -> Work:
        ray = library()
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
            root = place(self.root, hashes, lambda name: bytes(library().get(self.files[name][1])))
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


def _room(work: Work) -> int:
    """How many pieces may be on their way: a few for each CPU or GPU."""
    kind = "GPU" if work.resources["num_gpus"] else "CPU"
    share = work.resources["num_gpus"] or work.resources["num_cpus"]
    return _AHEAD * max(1, int(library().cluster_resources().get(kind, 1) // share))


def by_tasks(work: Work, given: Iterable[Arrays]) -> Generator[Arrays, None, None]:
    ray = library()
    call = ray.remote(max_retries=TRIES, **work.resources)(_one)
    held, pieces = ray.put(work), iter(given)
    waiting: list[Any] = []
    while True:
        for piece in itertools.islice(pieces, _room(work) - len(waiting)):
            waiting.append(call.remote(held, pack(piece)))
        if not waiting:
            return
        yield _opened(*result(work.make, waiting.pop(0)))


def _one(work: Work, data: bytes) -> tuple[bytes, str]:
    return work(data)


def by_ray_data(work: Work, given: Iterable[Arrays]) -> Generator[Arrays, None, None]:
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
        count, tables = 0, _tables(work, made)
        try:
            for table in tables:
                for piece, error in zip(table["piece"], table["error"], strict=True):
                    yield _opened(piece.as_py(), error.as_py())
                    count += 1
        finally:
            for _ in tables:  # to the wave's end: Ray Data cancels what it leaves, and that may abort us (see ray.Flag)
                pass
        if count != len(wave):
            raise engine.JobError(f"Ray Data gave back {count} of {len(wave)} pieces of {work.make}")


def _tables(work: Work, made: Any) -> Iterator[Any]:
    from ray import exceptions

    try:
        yield from made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
    except exceptions.RayError as error:
        raise engine.JobError(f"{work.make} was lost by the Ray cluster: {error}") from error


def _table(piece: bytes) -> Any:
    import pyarrow

    return pyarrow.table({"piece": pyarrow.array([piece], pyarrow.large_binary())})


def _batch(work: Work, table: Any) -> Any:
    import pyarrow

    made = [work(row.as_py()) for row in table["piece"]]
    pieces, errors = pyarrow.array([piece for piece, _ in made], pyarrow.large_binary()), [error for _, error in made]
    return pyarrow.table({"piece": pieces, "error": pyarrow.array(errors, pyarrow.string())})
