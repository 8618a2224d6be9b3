"""The default launcher: one process per job on this machine, a fixed number side by side, one per GPU where there are any.

A child is given a run and a job name, nothing else. It watches the pipe that is its standard input: when this process
goes away, however that happens, the pipe closes and the child saves a checkpoint and stops.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from archipel import store
from archipel.config import RunConfig
from archipel.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_WRONG_INPUT, ArchipelError, Stopped
from archipel.progress import Progress, StopFlag
from archipel.run import MONOLITH, ROUTER, TRUNK, Run

_POLL = 0.25  # seconds


@dataclass(frozen=True)
class Job:
    """A job of some run. ``note``: what stands before its name where several runs are trained at once."""

    run: Run
    name: str
    note: str = ""

    @property
    def label(self) -> str:
        return f"{self.note}{self.name}"


@dataclass
class _Child:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    begins: int  # where this child's words begin in the log, which earlier ones share
    slot: str


@dataclass
class _Queue:
    """Jobs of one launch: waiting and running, and the free slots: "" for some cores, else a CUDA_VISIBLE_DEVICES."""

    threads: int
    waiting: list[Job]
    slots: list[str]
    running: list[_Child] = field(default_factory=list)


class _ChildError(ArchipelError):
    """A child that failed by a fault of ours, and not by what it was given."""

    exit_code = EXIT_INTERNAL


def cores() -> int:
    """Cores this process may use (a container's share where the system tells it)."""
    with contextlib.suppress(AttributeError):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


class HasConfig(Protocol):
    """A run, in a folder or in a bucket."""

    @property
    def config(self) -> RunConfig: ...


def steps_of(run: HasConfig, name: str) -> int:
    config = run.config
    steps = {MONOLITH: config.monolith.steps, ROUTER: config.router.steps, TRUNK: config.expert.trunk_steps}
    return steps.get(name, config.expert.steps)


def in_order(run: Run, names: list[str]) -> list[str]:
    """Longest first, so that two workers end together: at matched compute the monolith is as long as all others."""
    weight = {MONOLITH: 0, ROUTER: 2}
    return sorted(names, key=lambda name: (weight.get(name, 1), name))


def _gpus(count: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES for each of ``count`` jobs: of those that this process was given, where it was given some."""
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return given[:count] if len(given) >= count else [str(number) for number in range(count)]


def _environment(threads: int, slot: str) -> dict[str, str]:
    return (
        os.environ
        | ({"CUDA_VISIBLE_DEVICES": slot} if slot else {})
        | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
            "ARCHIPEL_STOP_WITH_PARENT": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1",
            "DISABLE_TELEMETRY": "YES",
        }
    )


def _command(run: Run, name: str, threads: int) -> list[str]:
    return [sys.executable, "-m", "archipel.cli", "train", "--threads", str(threads), "--", str(run.root), name]


def _start(queue: _Queue, job: Job) -> _Child:
    run, log, slot = job.run, job.run.log(f"train-{job.name}"), queue.slots.pop(0)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        begins = output.tell()
        process = subprocess.Popen(
            _command(run, job.name, queue.threads),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=_environment(queue.threads, slot),
            start_new_session=True,  # Ctrl-C reaches this process only, which then tells the children once
        )
    return _Child(job, process, log, begins, slot)


def _steps_done(run: Run, name: str) -> int:
    if run.done(run.expert(name)):
        return steps_of(run, name)
    with contextlib.suppress(Exception):
        return int(store.read_json(run.expert(name) / "progress.json")["step"])
    return 0


def _unit(run: Run, name: str) -> float:
    """Planned FLOPs of one step: what the bar counts in, so that it moves evenly over unlike jobs."""
    from archipel.backbones import spending

    config = run.config
    if name == MONOLITH:
        return float(spending.training_flops(config, name, 1, config.monolith.batch))
    if name == ROUTER:
        return float(spending.training_flops(config, name, 1, config.router.batch))
    batch = config.monolith.batch if name == TRUNK else config.expert.batch
    return float(spending.training_flops(config, name, 1, batch))


def _note(running: list[_Child]) -> str:
    parts = []
    for child in running:
        with contextlib.suppress(Exception):
            state = store.read_json(child.job.run.expert(child.job.name) / "progress.json")
            parts.append(f"{child.job.label} {state['step']}/{state['steps']} loss {state['loss']:.3f}")
    return ", ".join(parts)


def _reap(queue: _Queue) -> None:
    """Take finished children out; a failed one ends the launch with its last words."""
    for child in list(queue.running):
        code = child.process.poll()
        if code is None:
            continue
        queue.running.remove(child)
        queue.slots.append(child.slot)
        if child.process.stdin is not None:
            child.process.stdin.close()
        if code == EXIT_INTERRUPTED:
            raise Stopped(f"training {child.job.label} was stopped; everything is kept, start it again to continue")
        if code != 0:
            kind = ArchipelError if code == EXIT_WRONG_INPUT else _ChildError
            raise kind(f"training {child.job.label} {_ending(code)}: {_last_words(child)} (whole log: {child.log})")


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = next((one.name for one in signal.Signals if one == -code), f"signal {-code}")
    return f"was ended by {name}" + (", as the system does when memory runs out" if name == "SIGKILL" else "")


def _last_words(child: _Child) -> str:
    """The error that a child told, else its last line."""
    with open(child.log, "rb") as log:
        log.seek(child.begins)
        lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("error: ", "internal error: "))]
    return (told or lines or ["it said nothing"])[-1].removeprefix("error: ")


def _stop_all(queue: _Queue, grace: float = 60.0) -> None:
    for child in queue.running:
        child.process.terminate()
    deadline = time.monotonic() + grace
    for child in queue.running:
        try:
            child.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
        if child.process.stdin is not None:
            child.process.stdin.close()


def launch(
    run: Run,
    names: list[str],
    stop: StopFlag,
    *,
    workers: int | None = None,
    threads: int | None = None,
    accelerators: int = 0,
) -> None:
    """Train ``names``, each in a process of its own: one per GPU where there are ``accelerators``, else ``workers`` at a
    time, with ``threads`` threads each.

    Raises ArchipelError where a child fails (the others are stopped with checkpoints), Stopped when asked to stop.
    """
    jobs = [Job(run, name) for name in in_order(run, names)]
    # By all of the run's jobs, not by those that are left: with other threads than it began with, a job would not
    # continue bit for bit.
    most = workers or min(cores(), len(run.job_names))
    launch_jobs(jobs, stop, workers=most, threads=threads, accelerators=accelerators)


def launch_jobs(
    jobs: Sequence[Job],
    stop: StopFlag,
    *,
    workers: int,
    threads: int | None = None,
    accelerators: int = 0,
    label: str = "train",
    ready: Callable[[Job], bool] = lambda _: True,
) -> None:
    """Train jobs of any runs as ``launch`` does, in the given order; those that are done already are passed over.

    ``ready``: whether a job can begin yet; it is asked again after each job that ends, and there must be one at any time.
    """
    waiting = [job for job in jobs if not job.run.done(job.run.expert(job.name))]
    if not waiting:
        return
    slots = _gpus(accelerators) or [""] * workers
    queue = _Queue(threads or max(1, cores() // len(slots)), waiting, slots)
    plan = [(job, _unit(job.run, job.name), steps_of(job.run, job.name)) for job in waiting]
    scale = 1000 / max(sum(unit * steps for _, unit, steps in plan), 1e-9)

    def done_units() -> int:
        return int(scale * sum(unit * _steps_done(job.run, job.name) for job, unit, _ in plan))

    with Progress(label, 1000, done_units()) as bar:
        try:
            while queue.waiting or queue.running:
                for job in [job for job in queue.waiting if ready(job)][: len(queue.slots)]:
                    queue.waiting.remove(job)
                    queue.running.append(_start(queue, job))
                if stop:
                    print("stopping: every job saves a checkpoint first", file=sys.stderr, flush=True)
                    raise stop.error("training")
                time.sleep(_POLL)
                _reap(queue)
                bar.update(done_units(), _note(queue.running))
        finally:
            _stop_all(queue)
        bar.update(1000)
