"""Islands as processes: started as the command itself or forked from one that has the imports, stopped by any signal."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from archipel import store
from archipel.islands import keys
from archipel.islands.bucket import Bucket
from archipel.islands.objects import decode
from faults.common import Record, Store, environment, open_store

ARCHIPEL = [sys.executable, "-m", "archipel.cli"]


class Process:
    """One command: its pid, its words, its end."""

    def __init__(self, pid: int, log: Path, wait: Callable[[float], int | None]) -> None:
        self.pid, self.log, self._wait = pid, log, wait
        self.began = time.monotonic()

    def wait(self, seconds: float) -> int | None:
        """The exit code (negative: a signal's number), or None where it is still running after ``seconds``."""
        return self._wait(seconds)

    def send(self, number: int) -> None:
        if self.wait(0) is None:  # the pid of one that ended may be another's by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> int:
        """kill -9, and what it ended with: another code where it had ended by itself."""
        self.send(signal.SIGKILL)
        code = self.wait(30)
        if code is None:
            raise RuntimeError(f"process {self.pid} survives SIGKILL")
        return code

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


class Zygote:
    """Starts `archipel` commands; ends all that it started. Use as a context."""

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self._number = 0
        self._ends: dict[int, int] = {}
        self._pids: queue.Queue[int] = queue.Queue()
        self._turn = threading.Condition()
        self._lock = threading.Lock()
        self._plain: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Zygote:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(self.work / "zygote.log", "ab"),
            env=environment(),
        )
        threading.Thread(target=self._listen, daemon=True).start()
        self._pids.get(timeout=120)  # ready
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        for plain in self._plain:
            if plain.poll() is None:
                plain.kill()
                plain.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if "ended" in told:
                with self._turn:
                    self._ends[told["ended"]] = told["code"]
                    self._turn.notify_all()
            else:
                self._pids.put(int(told.get("pid", 0)))

    def start(
        self, *arguments: object, more: dict[str, str] | None = None, plain: bool = False, before: Any = ()
    ) -> Process:
        """`archipel ARGUMENTS`, forked from the zygote, or ``plain``: as a command of its own (``before`` it: a wrapper)."""
        with self._lock:
            self._number += 1
            log = self.work / f"{self._number:04d}.log"
            words = [str(argument) for argument in arguments]
            if plain or before:
                with open(log, "ab") as out:
                    made = subprocess.Popen(
                        [*map(str, before), *ARCHIPEL, *words],
                        stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment(more), start_new_session=True,
                    )  # fmt: skip
                self._plain.append(made)
                return Process(made.pid, log, lambda seconds: _waited(made, seconds))
            number = self._number
            order = {"number": number, "arguments": words, "environment": environment(more), "log": str(log)}
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
            pid = self._pids.get(timeout=60)
        return Process(pid, log, lambda seconds: self._ended(number, seconds))

    def _ended(self, number: int, seconds: float) -> int | None:
        with self._turn:
            self._turn.wait_for(lambda: number in self._ends, seconds)
            return self._ends.get(number)

    def run(self, *arguments: object, more: dict[str, str] | None = None, seconds: float = 240) -> tuple[int, str]:
        """A command to its end: exit code and words. Raises RuntimeError where it does not end."""
        process = self.start(*arguments, more=more)
        code = process.wait(seconds)
        if code is None:
            process.kill()
            raise RuntimeError(
                f"archipel {' '.join(map(str, arguments))} did not end in {seconds:.0f} s: {process.said}"
            )
        return code, process.said


def _waited(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def kill_all(processes: list[Process]) -> None:
    for process in processes:
        if process.wait(0) is None:
            process.send(signal.SIGCONT)
            process.kill()


_shared: list[Zygote] = []


@contextlib.contextmanager
def zygote_for(work: Path) -> Iterator[Zygote]:
    """A zygote for one fault: the one that faults of this process share, else a new one with its logs in ``work``."""
    if _shared:
        yield _shared[0]
        return
    with Zygote(work / "logs") as made:
        yield made


@contextlib.contextmanager
def sharing(work: Path) -> Iterator[None]:
    """For as long as the block runs, faults share one zygote: its imports are paid once."""
    with Zygote(work / "logs") as made:
        _shared.append(made)
        try:
            yield
        finally:
            _shared.clear()


# --- looking at a bucket ---------------------------------------------------------------------------------------------


def opened(where: Store) -> Bucket:
    """The bucket of a published run, for looking at it."""
    return Bucket.read(open_store(where))


def weights(where: Store) -> dict[str, str]:
    """Job -> sha256 of the weights it committed, as its card says and as the bytes are: both, or a ValueError."""
    found = {}
    bucket = opened(where)
    for name in bucket.jobs:
        state = bucket.state(name)
        if not state.done:
            raise ValueError(f"job {name} is not done")
        key = str(state.committed["key"])
        card_bytes = bucket.objects.get(f"{key}/{keys.CARD}") or b""
        if store.sha256_bytes(card_bytes) != state.committed["sha256"]:
            raise ValueError(f"{key}/card.json is not what was committed")
        model = bucket.objects.get(f"{key}/model.safetensors", 1 << 30) or b""
        if store.sha256_bytes(model) != decode(card_bytes)["files"]["model.safetensors"]["sha256"]:
            raise ValueError(f"{key}/model.safetensors is not what its card says")
        found[name] = store.sha256_bytes(model)
    return found


def check(record: Record, zygote: Zygote, where: Store, wanted: dict[str, str], case: str) -> bool:
    """Hold a finished bucket to the promises: all done, one result per job, the weights wanted. Notes problems."""
    before = len(record.problems)
    try:
        found = weights(where)
        for name, sha256 in wanted.items():
            if found.get(name) != sha256:
                record.problem(
                    f"{case}: the weights of job {name} are {str(found.get(name))[:12]}, wanted {sha256[:12]}"
                )
    except Exception as error:
        record.problem(f"{case}: {type(error).__name__}: {error}")
    listed = [entry.key for entry in open_store(where).list("jobs")]
    for name in wanted:
        results = [key for key in listed if key.startswith(f"jobs/{name}/committed")]
        if len(results) != 1:
            record.problem(f"{case}: job {name} has {len(results)} results: {results}")
    code, said = zygote.run("status", where.url, "--json", more=where.environment)
    try:
        states = {row["name"]: row["state"] for row in json.loads(said[said.index("{") :])["jobs"]}
    except ValueError:
        states = {}
    if code != 0 or set(states) != set(wanted) or set(states.values()) != {"done"}:
        record.problem(f"{case}: `archipel status --json` ends with {code} and says {states or said[-300:]}")
    return len(record.problems) == before


def refusals(record: Record, text: str) -> None:
    """Keep one example of each kind of refusal or complaint that a process uttered: digits and hashes left out."""
    import re

    for line in text.splitlines():
        if "Traceback" in line or "internal error" in line:
            record.problem(f"an island said: {text[-1500:]}")
        if any(
            word in line
            for word in ("passed over", "error:", "commits nothing", "stays", "left to others", "failed here")
        ):
            kind = re.sub(r"(/[\w./-]+|\b[0-9a-f]{12,}\b|\d+)", "#", line)
            if len(record.refusals) < 40:
                record.refusals.setdefault(kind[:160], line[:300])


def holds(where: Store, names: list[str], seconds: float, *, fence: int = 1, step: int = 0) -> tuple[str, int] | None:
    """Wait until one of the jobs is held by ``fence`` or a later one, and has come to ``step``: (name, fence)."""
    until = time.monotonic() + seconds
    bucket = opened(where)
    while time.monotonic() < until:
        for name in names:
            state = bucket.state(name)
            if state.fence >= fence and (state.heartbeat.get("step") or 0) >= step:
                return name, state.fence
        time.sleep(0.1)
    return None
