"""Slurm: one job per training job, each the very command that any island runs, submitted with submitit.

submitit writes and submits the batch file; nothing is pickled, because what a job runs is a command and no function.
Whether a job is done is read in the store, never asked of Slurm: there need not be any accounting. The queue is only
looked at to notice a job that is gone without a result, which is then submitted again.

A job that comes near its limit is told so by Slurm (SIGUSR2 to the batch file), saves a checkpoint, gives its claim
back and is requeued; preempted jobs get SIGTERM, save, and come back by Slurm's requeue or by ours.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from archipel.errors import EXIT_INTERRUPTED, ArchipelError
from archipel.islands import site as sites
from archipel.islands.claims import State, read_state
from archipel.islands.launch import engine
from archipel.islands.launch.local import in_order
from archipel.islands.objects import AwayError, Objects
from archipel.islands.site import SlurmSite
from archipel.progress import Progress, StopFlag
from archipel.run import Run
from archipel.spread import Spread

_NEEDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")
_PATIENCE = 60.0  # seconds for one call of Slurm's commands, and for cancelled jobs to save and go

# The command runs beside the batch file's shell, which waits for it: a shell handles a signal only when its foreground
# command has ended. SIGUSR2 comes to the shell alone; SIGTERM comes to all processes of a job, so the shell only has to
# outlive it. A signal ends wait early, with a code of its own, so it is asked again until the command is gone, and then
# once more for what the command said.
_SCRIPT = """\
again=
trap 'again=1; kill -TERM "$child" 2>/dev/null' USR2
trap : TERM
{command} &
child=$!
while wait "$child"; kill -0 "$child" 2>/dev/null; do :; done
wait "$child"; code=$?
echo "archipel: the command ended with $code" >&2
if [ -n "$again" ] && [ "$code" -eq {interrupted} ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def minutes(text: str) -> int:
    """A duration of site.toml in whole minutes, rounded up: Slurm's own resolution."""
    return max(1, math.ceil(sites.seconds(text) / 60))


def parameters(site: SlurmSite, job_name: str, threads: int | None) -> dict[str, Any]:
    """What submitit's executor is told for one job."""
    more = {
        "signal": f"B:USR2@{math.ceil(sites.seconds(site.signal))}",  # B: to the batch file's shell, which passes it on
        "requeue": True,
        **site.options,
    }
    values: dict[str, Any] = {
        "job_name": job_name,
        "time": minutes(site.time),
        "nodes": 1,
        "use_srun": False,
        "wckey": None,  # else submitit's own name, which a site with such keys refuses
        "setup": [*(f"export {key}={shlex.quote(value)}" for key, value in _environment(threads).items()), *site.setup],
        "additional_parameters": more,
    }
    asked = {key: getattr(site, key) for key in ("partition", "account", "qos", "constraint", "mem")}
    asked |= {"cpus_per_task": site.cpus, "gpus_per_node": site.gpus}
    return values | {key: value for key, value in asked.items() if value}


def _environment(threads: int | None) -> dict[str, str]:
    """A job outlives the process that submitted it, and its standard input is no pipe to that."""
    return engine.environment(threads) | {"ARCHIPEL_STOP_WITH_PARENT": "0"}


def script(arguments: list[str]) -> str:
    """The shell text that runs one command and sends the job back to the queue when its time is up."""
    return _SCRIPT.format(command=shlex.join(arguments), interrupted=EXIT_INTERRUPTED)


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """Without the variables of an allocation that this process may run in: sbatch would take them for its own."""
    inner = [key for key in os.environ if key.startswith("SLURM_") and key != "SLURM_CONF"]
    held = {key: os.environ.pop(key) for key in inner} if "SLURM_JOB_ID" in inner else {}
    try:
        yield
    finally:
        os.environ.update(held)


@dataclass
class _Job:
    """A training job's Slurm job: its number, the step at which it was submitted, and how many made no step in a row."""

    name: str
    id: str
    step: int
    fruitless: int = 0


class Queue:
    """Slurm as far as we need it: submit, look, cancel. Jobs are known by their names, so that a launcher that was
    killed finds its jobs again."""

    def __init__(self, folder: Path, site: SlurmSite, tag: str) -> None:
        missing = [name for name in _NEEDS if shutil.which(name) is None]
        if missing:
            raise ArchipelError(
                f"this machine has no {missing[0]}: start `archipel run --engine slurm` where Slurm's commands are"
            )
        self.folder, self.site, self.tag = folder, site, tag

    def job_name(self, name: str) -> str:
        return f"archipel-{self.tag}-{name}"

    def log(self, job_id: str) -> Path:
        """What the job said, all its starts one after the other."""
        return self.folder / f"{job_id}_0_log.err"

    def submit(self, name: str, arguments: list[str], threads: int | None) -> str:
        """Submit one command. Returns the job's number; raises ArchipelError with sbatch's words where it is refused."""
        try:
            from submitit import SlurmExecutor
            from submitit.core.utils import FailedJobError
        except ModuleNotFoundError:
            raise ArchipelError("--engine slurm needs submitit: pip install 'archipel[slurm]'") from None
        self.folder.mkdir(parents=True, exist_ok=True)
        executor = SlurmExecutor(folder=self.folder)
        executor.update_parameters(**parameters(self.site, self.job_name(name), threads))
        try:
            with _outside():
                # submit() would pickle a function and its result; this is the part of it that writes the batch file
                # and hands it to sbatch. The job object is of use for its number only.
                job = executor._submit_command(script(arguments))
        except FailedJobError as error:
            said = [line.strip() for line in str(error).splitlines() if line.startswith("sbatch: ")] or [str(error)]
            raise ArchipelError(
                f"Slurm refused job {name}: {'; '.join(said)} (site.toml's [slurm] says what is asked)"
            ) from None
        return str(job.job_id)

    def look(self) -> dict[str, tuple[str, str]] | None:
        """Our jobs that are waiting, running or ending: name -> (number, state and reason). None: Slurm did not answer."""
        try:
            said = subprocess.run(
                ["squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%i|%j|%T|%r"],
                capture_output=True, text=True, timeout=_PATIENCE, check=True,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return None
        prefix, found = self.job_name(""), {}
        for line in said.stdout.splitlines():
            number, name, state, reason = (*line.split("|", 3), "", "", "")[:4]
            if name.startswith(prefix):
                words = state.lower() + ("" if reason in ("None", "") else f" ({reason})")
                found[name.removeprefix(prefix)] = (number, words)
        return found

    def cancel(self, numbers: Iterable[str]) -> None:
        """Ask Slurm to end jobs: each gets SIGTERM, and KillWait seconds to save."""
        subprocess.run(["scancel", *numbers], capture_output=True, timeout=_PATIENCE, check=False)


class SlurmEngine:
    """``archipel run RUN --engine slurm``: the training jobs in Slurm, everything else in this process.

    ``store`` must be a URL that the nodes reach, or a folder of a file system that they share.
    """

    def __init__(self, run: Run, store: str, threads: int | None = None, sets: Iterable[str] = ()) -> None:
        self.run, self.store = run, store
        self._sets = tuple(sets)
        self.site = sites.read(run.root, self._sets).slurm
        self.threads = threads or self.site.threads or self.site.cpus or None
        tag = hashlib.sha256(f"{run.id} {store}".encode()).hexdigest()[:10]
        self.queue = Queue(run.root.resolve() / "slurm", self.site, tag)

    @property
    def items(self) -> Spread | None:
        return None

    @property
    def tasks(self) -> Spread | None:
        return None

    @property
    def device(self) -> str | None:
        return None

    def __enter__(self) -> SlurmEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def train(self, names: list[str], stop: StopFlag) -> None:
        """Bring the jobs to their end in Slurm, their results into the run's folder.

        Raises ArchipelError where Slurm refuses a job, or jobs go one after the other without a step gained; Stopped
        when asked to stop, after cancelling what is in the queue (each saves a checkpoint first).
        """
        engine.publish(self.run, self.store)
        objects = Objects.open(self.store, patience=_PATIENCE)
        objects.give_up = lambda: bool(stop)
        self._watch(objects, in_order(self.run, names), stop)
        engine.collect(self.run, self.store)

    def arguments(self, name: str) -> list[str]:
        """The job's command."""
        python = self.site.python or sys.executable
        arguments = engine.join_arguments(self.store, self.run, name, self.threads, self._sets)
        return [python, "-m", "archipel.cli", *arguments]

    def _watch(self, objects: Objects, names: list[str], stop: StopFlag) -> None:
        jobs: dict[str, _Job] = {}
        states = {name: read_state(objects, name) for name in names}
        total = sum(_steps(self.run, name) for name in names)
        with Progress("train (slurm)", total, self._done(states)) as bar:
            try:
                while not all(state.done for state in states.values()):
                    found = self.queue.look()  # before the store: who is gone from the queue has written by then
                    try:
                        states = {name: read_state(objects, name) for name in names}
                    except AwayError:  # for its own patience: the jobs have theirs, and nothing is decided blindly
                        bar.update(bar.done, "the store does not answer")
                        continue
                    if found is not None:
                        self._tend(jobs, states, found)
                    bar.update(self._done(states), _note(states, found))
                    self._wait(stop)
            except BaseException:
                self._cancel(jobs)
                raise
            bar.update(total)

    def _tend(self, jobs: dict[str, _Job], states: Mapping[str, State], found: Mapping[str, tuple[str, str]]) -> None:
        """Submit what is neither done nor in the queue."""
        for name, state in states.items():
            if state.done or name in found:
                if name in found and name not in jobs:  # an earlier launcher's
                    jobs[name] = _Job(name, found[name][0], _step(state))
                continue
            before = jobs.get(name)
            fruitless = 0
            if before is not None:
                fruitless = 0 if _step(state) > before.step else before.fruitless + 1
                if fruitless >= self.site.tries:
                    raise engine.JobError(self._gave_up(before, fruitless))
            number = self.queue.submit(name, self.arguments(name), self.threads)
            jobs[name] = _Job(name, number, _step(state), fruitless)

    def _gave_up(self, job: _Job, times: int) -> str:
        log = self.queue.log(job.id)
        try:
            lines = [line for line in log.read_text(errors="replace").splitlines() if not line.startswith("archipel: ")]
            said = engine.last_words("\n".join(lines))
        except OSError:
            said = "it left no log"
        return f"job {job.name} ended {times} times in Slurm without a step gained; the last time it said: {said} (log: {log})"

    def _wait(self, stop: StopFlag) -> None:
        end = time.monotonic() + self.site.poll
        while (left := end - time.monotonic()) > 0 or stop:
            if stop:
                raise stop.error("training in Slurm")
            time.sleep(min(0.25, left))

    def _cancel(self, jobs: Mapping[str, _Job]) -> None:
        """End what is in the queue, and wait until it is gone, so that nothing trains on behind our back."""
        found = self.queue.look()
        numbers = [job.id for job in jobs.values()] if found is None else [number for number, _ in found.values()]
        if not numbers:
            return
        print(f"cancelling {len(numbers)} Slurm jobs; each saves a checkpoint first", file=sys.stderr, flush=True)
        self.queue.cancel(numbers)
        end = time.monotonic() + _PATIENCE
        while self.queue.look() and time.monotonic() < end:
            time.sleep(min(1.0, self.site.poll))

    def _done(self, states: Mapping[str, State]) -> int:
        return sum(_steps(self.run, name) if state.done else _step(state) for name, state in states.items())


def _steps(run: Run, name: str) -> int:
    from archipel.islands.launch.local import steps_of

    return steps_of(run, name)


def _step(state: State) -> int:
    """How far the job is, by its checkpoints and its last heartbeat."""
    beat = state.heartbeat.get("step")
    steps = [beat] if isinstance(beat, int) else []
    for key in state.keys:
        parts = key.split("/")
        if len(parts) > 4 and parts[3] == "checkpoints" and parts[4].isdigit():
            steps.append(int(parts[4]))
    return max(steps, default=0)


def _note(states: Mapping[str, State], found: Mapping[str, tuple[str, str]] | None) -> str:
    if found is None:
        return "Slurm does not answer"
    return ", ".join(f"{name} {found[name][1]}" for name, state in states.items() if not state.done and name in found)
