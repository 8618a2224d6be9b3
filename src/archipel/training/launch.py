"""Several processes for one job on this machine: torchrun's own launcher, started, watched and stopped from here.

Between us and the processes stands one of torch's elastic agents (``python -m archipel.training.launch``), which starts
them together and ends them together. All of them hold the pipe that is their standard input: when it closes, because we
want a stop or are gone, each stops cleanly (``edge.stop_with_parent``), and they save one checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from archipel import store
from archipel.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_WRONG_INPUT, ArchipelError, Stopped
from archipel.progress import StopFlag
from archipel.run import Run
from archipel.training.checkpoint import MANIFEST
from archipel.training.journal import read_progress
from archipel.training.local import Local
from archipel.training.ranks import LAUNCHED

logger = logging.getLogger("archipel")
_POLL = 0.2  # seconds


def command(run: Run, name: str, local: Local) -> list[str]:
    """What one process is started as: ``archipel train`` with this island's settings."""
    words = ["train", *local.words()]
    for key, value in (("--device", local.device), ("--threads", local.threads)):
        words += [] if value is None else [key, str(value)]
    return [*words, "--", str(run.root), name]


def train(
    run: Run,
    name: str,
    local: Local,
    stop: StopFlag,
    *,
    label: str,
    on_checkpoint: Callable[[Path], None] | None = None,
) -> None:
    """Train a job by ``local.gpus`` processes and wait for them.

    Raises Stopped when asked to stop (everything is saved), ArchipelError with the error of the process that failed; what
    the processes say themselves goes to our standard error.
    """
    with tempfile.TemporaryDirectory(prefix="archipel-") as errors:
        code = _watch(run, name, local, stop, label, on_checkpoint, errors)
        left = [path.read_text(encoding="utf-8") for path in sorted(Path(errors).iterdir())]
    if code == EXIT_DONE:
        return
    if code == EXIT_INTERRUPTED:
        told = read_progress(run.expert(name)) or {}
        where = f"training {name} (step {told.get('step')} of {told.get('steps')})"
        raise stop.error(where) if stop else Stopped(f"{where} was interrupted; everything is kept")
    what = f"training {label} in {local.gpus} processes was ended (exit code {code}): start it again"
    error = ArchipelError(left[0] if left else what)
    error.told, error.exit_code = code > 0, code if code > 0 else EXIT_INTERNAL
    raise error


def _watch(
    run: Run,
    name: str,
    local: Local,
    stop: StopFlag,
    label: str,
    on_checkpoint: Callable[[Path], None] | None,
    errors: str,
) -> int:
    """The exit code of all processes together."""
    watch = _Checkpoints(run.expert(name) / "checkpoints")
    process = subprocess.Popen(
        [sys.executable, "-m", "archipel.training.launch", str(local.gpus), label, *command(run, name, local)],
        stdin=subprocess.PIPE,
        env=_environment(local) | {LAUNCHED: errors},
        start_new_session=True,  # Ctrl-C reaches this process only, which then tells the others once
    )
    assert process.stdin is not None
    try:
        while process.poll() is None and not stop:
            time.sleep(_POLL)
            watch.look(on_checkpoint)
    finally:
        process.stdin.close()
        code = process.wait()
    watch.look(on_checkpoint)
    return code


def _environment(local: Local) -> dict[str, str]:
    threads = local.threads or max(1, (os.cpu_count() or 1) // local.gpus)
    return os.environ | {"ARCHIPEL_STOP_WITH_PARENT": "1", "OMP_NUM_THREADS": str(threads)}


class _Checkpoints:
    """Tells of checkpoints that are committed from now on; one that is gone again before we look is not told."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen = set(self._found())

    def _found(self) -> list[tuple[str, int]]:
        found = []
        for path in self._folder.glob(f"*/{MANIFEST}"):
            with contextlib.suppress(OSError):
                found.append((path.parent.name, path.stat().st_mtime_ns))
        return sorted(found)

    def look(self, tell: Callable[[Path], None] | None) -> None:
        for one in self._found() if tell is not None else []:
            if one not in self._seen:
                self._seen.add(one)
                self._tell(tell, self._folder / one[0])

    def _tell(self, tell: Callable[[Path], None] | None, path: Path) -> None:
        assert tell is not None
        try:
            tell(path)
        except FileNotFoundError:
            if (path / MANIFEST).exists():
                raise
            logger.warning("checkpoint %s was dropped for newer ones before it was told", path.name)


def add_to_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """Put what the island knows of a job into the card that its processes wrote."""
    card = store.read_card(folder)
    if card is not None:
        store.write_sealed(folder / "card.json", {**card, "island": dict(facts)})


# --- the agent's own process -----------------------------------------------------------------------------------------


def _agent(processes: int, label: str, arguments: list[str]) -> int:
    """Run ``archipel arguments`` in so many processes; gives the exit code, having said what the processes could not."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what failed is said below, in one sentence
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the pipe decides: not ignored, since that would be inherited
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"archipel-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle="SIGUSR2",
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "archipel.cli", *arguments)
    except ChildFailedError as error:
        return _judge(label, processes, {rank: failure.exitcode for rank, failure in error.failures.items()})
    return EXIT_DONE


def _judge(label: str, processes: int, codes: Mapping[int, int]) -> int:
    """The exit code of all by those of the failed ones. Those that we ended ourselves (SIGTERM) are not to blame."""
    killed = {rank: -code for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM}
    for rank, number in sorted(killed.items()):
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        hint = ", as the system does when memory runs out" if number == signal.SIGKILL else ""
        text = (
            f"process {rank} of the {processes} that train {label} was ended by {name}{hint}: start it again, and it "
            "continues from the last good checkpoint"
        )
        print(f"error: {text}", file=sys.stderr, flush=True)
        if folder := os.environ.get(LAUNCHED):
            (Path(folder) / f"of-{rank}").write_text(text, encoding="utf-8")
        return EXIT_WRONG_INPUT
    own = [code for code in codes.values() if code > 0]
    for code in (EXIT_INTERNAL, EXIT_WRONG_INPUT):
        if code in own:
            return code
    return own[0] if own else EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(_agent(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
