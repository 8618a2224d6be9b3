"""Training jobs in a real Slurm: munged, slurmctld and slurmd of Debian's packages, started for these tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from archipel import pipeline, store
from archipel.islands import keys
from archipel.islands import site as sites
from archipel.islands.claims import State, read_state
from archipel.islands.launch import slurm
from archipel.islands.objects import Objects

pytestmark = [pytest.mark.system, pytest.mark.slow]
CLUSTER = Path(__file__).parent / "slurm" / "cluster.py"


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("slurm")
    made = subprocess.run([sys.executable, CLUSTER, "start", folder], capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield folder
    subprocess.run([sys.executable, CLUSTER, "stop", folder], check=True, timeout=120)
    for daemon in ("slurmd", "slurmctld", "munged"):
        assert not (folder / f"{daemon}.pid").exists(), f"{daemon} did not end by itself"
    os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)


def until(done: Callable[[], object], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"waited {seconds} s"
        time.sleep(0.1)


def site(**values: object) -> sites.SlurmSite:
    return sites.SlurmSite.model_validate({"time": "1m", "signal": "10s", "cpus": 1, "poll": 0.2, **values})


def queue(folder: Path, tag: str, **values: object) -> slurm.Queue:
    return slurm.Queue(folder, site(**values), tag)


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


SAVES = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1]).write_text("ready")
time.sleep(600)
"""


def test_a_cancelled_job_saves_first_and_stays_cancelled(tmp_path: Path) -> None:
    jobs, note = queue(tmp_path / "logs", "cancel"), tmp_path / "note"
    number = jobs.submit("0", python(SAVES, note), 1)
    until(lambda: note.exists() and note.read_text() == "ready")
    assert (jobs.look() or {})["0"] == (number, "running")
    jobs.cancel([number])
    until(lambda: jobs.look() == {})
    assert note.read_text() == "saved"
    assert "ended with 130" in jobs.log(number).read_text()


def test_a_preempted_job_saves_first_and_comes_back(tmp_path: Path) -> None:
    """By Slurm's own requeue: main is the partition that may be preempted by urgent."""
    jobs, note = queue(tmp_path / "logs", "preempted", partition="main", cpus=2), tmp_path / "note"
    number = jobs.submit("0", python(SAVES.replace("write_text", "open('a').write"), note), 1)
    until(lambda: note.exists() and note.read_text() == "ready")
    urgent = queue(tmp_path / "logs", "urgent", partition="urgent", cpus=2)
    urgent.submit("1", ["sleep", "1"], 1)
    until(lambda: note.read_text() == "readysavedready")
    jobs.cancel([number])
    until(lambda: jobs.look() == {})


def test_nothing_is_pickled_and_the_command_is_there_to_read(tmp_path: Path) -> None:
    jobs = queue(tmp_path / "logs", "plain", setup=["export FROM_SETUP=1"])
    number = jobs.submit("0", python("import os; print(os.environ['FROM_SETUP'], os.environ['OMP_NUM_THREADS'])"), 3)
    until(lambda: jobs.look() == {})
    names = sorted(path.name for path in (tmp_path / "logs").iterdir() if not path.name.startswith("."))
    assert names == [f"{number}_0_log.err", f"{number}_0_log.out", f"{number}_submission.sh"]
    assert (tmp_path / "logs" / f"{number}_0_log.out").read_text() == "1 3\n"


def test_what_slurm_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"refused job 0: .*partition") as caught:
        queue(tmp_path, "refused", partition="moon").submit("0", ["true"], None)
    assert caught.type.__name__ == "ArchipelError"


# --- the real thing --------------------------------------------------------------------------------------------------

# Half a second per step for expert 0, until Slurm has requeued its job: it cannot be done within the first minute,
# whatever the machine, and loses no time after that. No number depends on it. Every start has a cache folder of its own,
# so that it knows no more than one on another node would.
SLOW = """
import os, sys, time
argv = sys.orig_argv
if "join" in argv and argv[argv.index("--only") + 1] == "0" and "SLURM_RESTART_COUNT" not in os.environ:
    from torch.optim.optimizer import register_optimizer_step_post_hook
    register_optimizer_step_post_hook(lambda *_: time.sleep(0.5))
"""
SITE = """
[slurm]
time = "1m"
signal = "5s"
cpus = 1
poll = 0.5
tries = 10
setup = ["export PYTHONPATH={slow}", "export ARCHIPEL_CACHE={cache}/$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"]
"""


def archipel(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "archipel.cli", *map(str, arguments)]


def do(*arguments: object) -> str:
    done = subprocess.run(archipel(*arguments), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def steps_sent(state: State, fence: int) -> list[int]:
    """Steps of the checkpoints that an attempt sent to the store."""
    where = keys.checkpoints(state.name, fence) + "/"
    return sorted({int(key.removeprefix(where).split("/")[0]) for key in state.keys if key.startswith(where)})


@pytest.mark.timeout(900)
def test_a_run_in_slurm_is_requeued_at_its_limit_and_ends_as_it_would_here(tmp_path: Path) -> None:
    """Every job in Slurm; expert 0 is stopped by us once and by its limit of a minute once, and goes on each time."""
    run = pipeline.init(
        tmp_path / "run",
        source="shapes",
        preset="tiny",
        sets=["evaluate.arms=['top1', 'monolith']", "evaluate.showcase=0"],
    )
    pipeline.prepare(run)
    pipeline.partition(run)
    shutil.copytree(run.root, tmp_path / "here")
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW)
    (run.root / "site.toml").write_text(SITE.format(slow=tmp_path / "slow", cache=tmp_path / "cache"))
    store_url = f"file://{run.root}/store"

    def heartbeat() -> dict[str, Any]:
        objects = Objects.open(store_url) if (run.root / "store").exists() else None
        return dict(read_state(objects, "0").heartbeat) if objects else {}

    command = archipel("run", run.root, "--engine", "slurm")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first:
        until(lambda: (heartbeat().get("step") or 0) > 1)
        first.terminate()
        _, said = first.communicate(timeout=120)
    assert first.returncode == 130, said
    assert "each saves a checkpoint first" in said
    assert subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout == ""
    stopped = heartbeat()
    assert stopped["state"] == "released"
    assert stopped["step"] > 1

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as second:
        here = pipeline.open_run(tmp_path / "here")
        for name in here.job_names:  # in the meantime, on this machine
            do("train", "--threads", 1, here.root, name)
        _, said = second.communicate(timeout=500)
    assert second.returncode == 0, said
    assert (run.report / "index.html").exists()
    do("verify", run.root)
    for name in run.job_names:
        ours, theirs = (one.expert(name) / "model.safetensors" for one in (here, run))
        assert store.sha256_file(ours) == store.sha256_file(theirs), f"{name} has other weights"

    objects = Objects.open(store_url)
    state = read_state(objects, "0")
    assert state.committed["fence"] >= 3  # stopped, requeued, done
    card = store.read_json(run.expert("0") / "card.json")
    assert card["resumed"] >= 2
    assert [number for number in steps_sent(state, 1) if number >= stopped["step"]]
    assert [number for number in steps_sent(state, 2) if stopped["step"] <= number < 150]
    logs = [path.read_text() for path in (run.root / "slurm").glob("*.err")]
    (requeued,) = [text for text in logs if "works on job 0" in text and "the command ended with 0" in text]
    assert requeued.index("ended with 130") < requeued.index("ended with 0")  # one Slurm job, started twice
