"""Training jobs in a real Slurm: munged, slurmctld and slurmd of Debian's packages, started for these tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from archipel import pipeline, store
from archipel.errors import Stopped
from archipel.islands import site as sites
from archipel.islands.launch import engine, slurm
from archipel.progress import StopFlag
from archipel.run import MONOLITH, Run

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


def until(done: Callable[[], object], seconds: float = 90) -> None:
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


def test_nothing_is_pickled_and_the_command_is_there_to_read(tmp_path: Path) -> None:
    jobs = queue(tmp_path / "logs", "plain", setup=["export FROM_SETUP=1"])
    number = jobs.submit("0", python("import os; print(os.environ['FROM_SETUP'], os.environ['OMP_NUM_THREADS'])"), 3)
    until(lambda: jobs.look() == {})
    names = sorted(path.name for path in (tmp_path / "logs").iterdir() if not path.name.startswith("."))
    assert names == [f"{number}_0_log.err", f"{number}_0_log.out", f"{number}_submission.sh"]
    assert (tmp_path / "logs" / f"{number}_0_log.out").read_text() == "1 3\n"


def test_what_slurm_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="refused job 0: .*partition") as caught:
        queue(tmp_path, "refused", partition="moon").submit("0", ["true"], None)
    assert caught.type.__name__ == "ArchipelError"
