"""Ray on one node: no telemetry, errors in our words, pieces in order, commands that stop when they are told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from archipel import pipeline, store
from archipel.errors import ArchipelError, Stopped
from archipel.islands.launch import engine, ray_pieces
from archipel.islands.launch import ray as launch
from archipel.progress import StopFlag
from archipel.run import Run
from archipel.spread import Arrays

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return pipeline.init(tmp_path_factory.mktemp("pieces") / "run", source="shapes", preset="tiny")


@pytest.fixture(scope="module")
def on_ray(run: Run) -> Iterator[launch.RayEngine]:
    """The engine on a cluster of its own, as `archipel run RUN --engine ray` starts one; nodes find this module."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        with launch.RayEngine(run, engine.default_store(run), 1) as opened:
            assert signal.getsignal(signal.SIGTERM) is before  # Ctrl-C and kill stay Archipel's
            yield opened


@pytest.fixture
def pieces() -> Iterator[object]:
    """The functions that run on nodes, as a module that they find by its name."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import ray_stand_ins

        yield ray_stand_ins
    finally:
        sys.path.remove(str(Path(__file__).parent))


def numbers(count: int) -> Iterator[Arrays]:
    for number in range(count):
        yield {"number": np.array([number]), "none": np.zeros((0, 3), np.float32), "yes": np.array([True, False])}


def test_ray_reports_nothing_and_shows_no_dashboard(on_ray: launch.RayEngine) -> None:
    from ray._common.usage import usage_lib

    import ray

    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert not usage_lib.usage_stats_enabled()
    assert ray.get(ray.remote(lambda: os.environ["RAY_USAGE_STATS_ENABLED"]).remote()) == "0"
    assert not ray._private.worker.global_worker.node.address_info["webui_url"]


@pytest.mark.parametrize("kind", ["items", "tasks"])
def test_pieces_come_back_in_order_and_as_they_were(
    on_ray: launch.RayEngine, pieces, kind: str, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "factor").write_text("3")
    asked: list[int] = []

    def given() -> Iterator[Arrays]:
        for number, piece in enumerate(numbers(30)):
            asked.append(number)
            yield piece

    made = getattr(on_ray, kind)(pieces.multiply, given(), tmp_path, ["sub"])
    first = next(made)
    assert len(asked) < 30  # what lies in Ray's memory is bounded
    found = [first, *made]
    assert [int(piece["number"][0]) for piece in found] == [3 * number for number in range(30)]
    assert found[0]["none"].shape == (0, 3) and found[0]["none"].dtype == np.float32
    assert found[0]["yes"].tolist() == [True, False]
    assert {int(piece["threads"][0]) for piece in found} == {1}


@pytest.mark.parametrize("kind", ["items", "tasks"])
def test_an_error_on_a_node_is_told_in_its_own_words(
    on_ray: launch.RayEngine, pieces, kind: str, tmp_path: Path
) -> None:
    with pytest.raises(ArchipelError, match=r"^clip 7 is damaged$") as told:
        list(getattr(on_ray, kind)(pieces.refuse, numbers(9), tmp_path, []))
    assert told.value.exit_code == 2
    with pytest.raises(engine.JobError, match="ZeroDivisionError"):
        list(getattr(on_ray, kind)(pieces.divide, numbers(1), tmp_path, []))


def test_a_node_without_the_runs_disk_gets_the_files_it_needs(tmp_path: Path) -> None:
    data = b"a codec"
    hashes = (("codec/model", store.sha256_bytes(data)),)
    copy = ray_pieces.place(str(tmp_path / "elsewhere"), hashes, lambda name: data)
    assert (copy / "codec/model").read_bytes() == data and not (tmp_path / "elsewhere").exists()
    assert ray_pieces.place(str(tmp_path / "elsewhere"), hashes, lambda name: b"not asked again") == copy
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec/model").write_bytes(data)
    assert ray_pieces.place(str(tmp_path), hashes, lambda name: b"not asked") == tmp_path
    (tmp_path / "other/codec").mkdir(parents=True)
    (tmp_path / "other/codec/model").write_bytes(b"another run's")
    assert (ray_pieces.place(str(tmp_path / "other"), hashes, lambda name: data) / "codec/model").read_bytes() == data
    with pytest.raises(ArchipelError, match="another sha256"):
        ray_pieces.place(str(tmp_path / "third"), hashes, lambda name: b"torn")


# --- commands --------------------------------------------------------------------------------------------------------

WAIT = """
import os, sys, time
from pathlib import Path
from archipel import edge
from archipel.progress import StopFlag
here = Path(sys.argv[1])
edge.stop_with_parent()
with StopFlag(60) as stop:
    (here / "pid").write_text(str(os.getpid())); (here / "pid").rename(here / "started")
    while not stop: time.sleep(0.01)
    (here / "saved").write_text("")
sys.exit(130)
"""


def stand_in(on_ray: launch.RayEngine, monkeypatch: pytest.MonkeyPatch, code: str, *arguments: object) -> None:
    """Jobs run ``code`` in place of `archipel join`; there is nothing to publish and nothing to bring back."""
    Path(on_ray.store.removeprefix("file://")).mkdir(exist_ok=True)
    words = [sys.executable, "-c", code, *map(str, arguments)]
    monkeypatch.setattr(engine, "command", lambda *_: words)
    monkeypatch.setattr(engine, "publish", lambda *_: None)
    monkeypatch.setattr(engine, "collect", lambda *_: None)


def wait_for(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_job_that_fails_is_told_with_its_last_words(
    on_ray: launch.RayEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(on_ray, monkeypatch, "import sys; print('error: the shard is damaged', file=sys.stderr); sys.exit(2)")
    with pytest.raises(ArchipelError, match="training monolith ended with exit code 2: the shard is damaged"):
        on_ray.train(["monolith"], StopFlag())
    assert "the shard is damaged" in on_ray.run.log("train-monolith").read_text()


def test_asked_to_stop_it_waits_until_the_jobs_have_saved(
    on_ray: launch.RayEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in(on_ray, monkeypatch, WAIT, tmp_path)
    stop = StopFlag()

    def ask() -> None:
        wait_for((tmp_path / "started").exists)
        stop.signal = signal.SIGINT

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(Stopped) as stopped:
        on_ray.train(["monolith"], stop)
    asking.join()
    assert stopped.value.interrupted and (tmp_path / "saved").exists()


def test_threads_that_no_node_has_are_refused(on_ray: launch.RayEngine, run: Run) -> None:
    with pytest.raises(ArchipelError, match="--threads 4096: no node of the cluster has more than"):
        _ = launch.RayEngine(run, "", 4096).threads


def test_a_cluster_that_does_not_answer_is_named() -> None:
    code = "from archipel.islands.launch import ray; ray.connect()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | {"RAY_ADDRESS": "127.0.0.1:9"},
    )  # fmt: skip
    assert done.returncode != 0 and "no Ray cluster at RAY_ADDRESS = '127.0.0.1:9'" in done.stderr, done.stderr
