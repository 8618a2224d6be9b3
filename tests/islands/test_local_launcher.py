"""The launcher with stand-ins for training: what it does when children die, when it is stopped, and when it is killed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from archipel import pipeline, store
from archipel.errors import ArchipelError, Stopped
from archipel.islands.launch import local
from archipel.progress import StopFlag
from archipel.run import MONOLITH, Run

JOBS = ["monolith", "0", "1", "router"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that looks partitioned; two experts."""
    made = pipeline.init(tmp_path / "run", source="shapes", preset="tiny")
    store.write_card(made.shard(MONOLITH), "shard", made.id, [])
    return made


def stand_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Children run ``code``, with the job's name in ``name``."""
    head = "import json, os, signal, sys, time; name, root = sys.argv[1:]\n"

    def command(run: Run, name: str, threads: int) -> list[str]:
        return [sys.executable, "-S", "-E", "-c", head + code, name, str(run.root)]

    monkeypatch.setattr(local, "_command", command)
    monkeypatch.setattr(local, "_POLL", 0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


def test_all_jobs_run_the_longest_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "open(root + '/order', 'a').write(name + ' ' + os.environ['OMP_NUM_THREADS'] + chr(10))")
    local.launch(run, run.job_names, StopFlag(), workers=1, threads=3)
    assert (run.root / "order").read_text().splitlines() == [f"{name} 3" for name in JOBS]


def test_the_last_job_gets_the_threads_it_would_have_had_among_all(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run that was interrupted during its last job would not continue bit for bit."""
    stand_in(monkeypatch, "open(root + '/threads', 'a').write(os.environ['OMP_NUM_THREADS'] + ' ')")
    monkeypatch.setattr(local, "cores", lambda: 4)
    local.launch(run, run.job_names, StopFlag())
    local.launch(run, [MONOLITH], StopFlag())
    assert (run.root / "threads").read_text().split() == ["1"] * (len(run.job_names) + 1)


@pytest.mark.parametrize(
    ("code", "says", "exit_code"),
    [
        ("print('error: the shard is damaged', file=sys.stderr); sys.exit(2)", "exit code 2: the shard is damaged", 2),
        ("print('internal error: oh\\nThis is a fault, report it'); sys.exit(1)", "exit code 1: internal error: oh", 1),
        ("print('loading'); print('half way'); sys.exit(9)", "exit code 9: half way", 1),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV: it said nothing", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL, as the system does when memory runs out", 1),
    ],
)
def test_a_child_that_dies_is_told_with_its_last_words_and_the_others_stop(
    run: Run, monkeypatch: pytest.MonkeyPatch, code: str, says: str, exit_code: int
) -> None:
    wait = "open(root + '/pid', 'w').write(str(os.getpid())); os.rename(root + '/pid', root + '/0.pid'); time.sleep(60)"
    ready = "\nwhile not os.path.exists(root + '/0.pid'): time.sleep(0.01)\n"
    stand_in(monkeypatch, f"if name == '0': {wait}{ready}{code}")
    log = run.log("train-monolith")
    store.write_text(log, "error: an old story\n")
    with pytest.raises(ArchipelError, match="training monolith") as failed:
        local.launch(run, ["monolith", "0"], StopFlag(), workers=2)
    assert says in str(failed.value) and str(log) in str(failed.value)
    assert "old story" not in str(failed.value)
    assert failed.value.exit_code == exit_code
    assert gone([int((run.root / "0.pid").read_text())], 0)


def test_a_child_that_somebody_else_stopped_is_no_failure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "sys.exit(130)")
    with pytest.raises(Stopped) as stopped:
        local.launch(run, run.job_names, StopFlag(), workers=1)
    assert stopped.value.interrupted


def test_children_that_do_not_listen_are_ended(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(
        monkeypatch, "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(60)"
    )
    stop_all = local._stop_all
    monkeypatch.setattr(local, "_stop_all", lambda queue: stop_all(queue, 0.1))
    stop, log = StopFlag(), run.log("train-monolith")

    class AfterTheFirstWord(StopFlag):
        def __bool__(self) -> bool:
            if log.exists() and log.read_text().endswith("\n"):
                stop.signal = self.signal = signal.SIGINT
            return stop.signal is not None

    with pytest.raises(Stopped):
        local.launch(run, ["monolith"], AfterTheFirstWord())
    assert gone([int(log.read_text())], 0)


@pytest.mark.parametrize(("given", "names"), [(None, {"0", "1"}), ("GPU-b, GPU-a,7", {"GPU-b", "GPU-a"})])
def test_each_gpu_has_one_job_at_a_time(
    run: Run, monkeypatch: pytest.MonkeyPatch, given: str | None, names: set[str]
) -> None:
    from archipel.training import machine

    stand_in(
        monkeypatch,
        "began = time.time(); time.sleep(0.05)\n"
        "line = json.dumps([os.environ['CUDA_VISIBLE_DEVICES'], began, time.time()])\n"
        "open(root + '/gpus', 'a').write(line + chr(10))",
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(machine, "accelerators", lambda: 2)
    pipeline.train_all(run, workers=4)
    spans = sorted(json.loads(line) for line in (run.root / "gpus").read_text().splitlines())
    assert len(spans) == 4 and {gpu for gpu, _, _ in spans} == names
    for (gpu, _, ended), (other, began, _) in itertools.pairwise(spans):
        assert gpu != other or began >= ended


# --- the whole command, stopped from outside -------------------------------------------------------------------------

# `archipel run` with training replaced by children that wait to be stopped and then say what they kept.
DRIVER = """
import sys, types
from archipel import cli, pipeline, training
from archipel.islands.launch import local
training.machine = sys.modules["archipel.training.machine"] = types.SimpleNamespace(accelerators=lambda: 0)
pipeline.prepare = pipeline.partition = lambda run, stop: None
local._command = lambda run, name, threads: [sys.executable, "-c", sys.argv[2], str(run.root), name]
local.cores = lambda: 2
cli.main(["run", sys.argv[1]])
"""
CHILD = """
import os, sys, time
from pathlib import Path
from archipel import edge
from archipel.progress import StopFlag
root, name = Path(sys.argv[1]), sys.argv[2]
edge.stop_with_parent()
with StopFlag(60) as stop:
    (root / f".{name}").write_text(str(os.getpid()))
    (root / f".{name}").rename(root / f"{name}.pid")
    while not stop:
        time.sleep(0.01)
    (root / f"{name}.saved").write_text("")
sys.exit(130)
"""


@pytest.mark.parametrize(
    ("how", "group"),
    [
        (signal.SIGINT, False),
        (signal.SIGINT, True),  # as a terminal does
        (signal.SIGTERM, False),
        (signal.SIGKILL, False),
    ],
)
def test_stopping_the_parent_stops_the_children_with_everything_saved(
    run: Run, how: signal.Signals, group: bool
) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(run.root), CHILD],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        pids = [run.root / "monolith.pid", run.root / "0.pid"]
        end = time.monotonic() + 60
        while not all(path.exists() for path in pids):
            assert parent.poll() is None and time.monotonic() < end, parent.stderr and parent.stderr.read()
            time.sleep(0.02)
        (os.killpg if group else os.kill)(parent.pid, how)
        _, said = parent.communicate(timeout=60)
    finally:
        parent.kill()
    assert gone([int(path.read_text()) for path in pids])
    assert all(path.with_suffix(".saved").exists() for path in pids)
    assert "Traceback" not in said
    if how is signal.SIGKILL:
        assert parent.returncode == -signal.SIGKILL
    else:
        assert parent.returncode == 130
        assert "everything is kept" in said
