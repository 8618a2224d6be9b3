"""A run on a Ray cluster of three one-CPU nodes on this machine, one of which is lost without grace while it trains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from archipel import pipeline, store
from archipel.islands.claims import State, read_state
from archipel.islands.launch.engine import default_store
from archipel.islands.objects import Objects
from archipel.run import Run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]
# Two minutes on two cores for both runs; the jobs are just long enough to be met in their middle.
SETTINGS = [
    "clips.count=40", "expert.steps=60", "expert.checkpoint_every=5", "expert.validate_every=30", "router.steps=20",
    "router.checkpoint_every=5", "sample.steps=2", "evaluate.count=17", "evaluate.showcase=0",
    'evaluate.arms=["top1", "oracle", "monolith"]',
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    # Islands keep their folder in the cache: one that a killed island of an older version left there would be gone on with.
    patch = pytest.MonkeyPatch()
    patch.setenv("ARCHIPEL_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # other work on this machine is no reason to end ours
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(2):
            made.add_node(num_cpus=1)
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()
        patch.undo()


def make(root: Path) -> Run:
    return pipeline.init(root, source="shapes", preset="tiny", sets=SETTINGS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run, made by this machine alone with one thread."""
    run = make(tmp_path_factory.mktemp("local") / "run")
    pipeline.prepare(run)
    pipeline.partition(run)
    for name in run.job_names:
        pipeline.train(run, name, threads=1)
    pipeline.route(run)
    pipeline.generate(run)
    return run


def tree(folder: Path) -> dict[str, str]:
    """Name -> sha256 of all that was made there."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return {path.relative_to(folder).as_posix(): store.sha256_file(path) for path in files}


def below(pid: int) -> list[int]:
    """The processes that descend from one, itself first."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def job_of(pids: list[int]) -> str | None:
    """The job that one of these processes trains, by its command line."""
    for pid in pids:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "join" in words and "--only" in words:
            return words[words.index("--only") + 1]
    return None


def half_done(url: str, run: Run, name: str) -> State | None:
    """The job's state where it is worked on and has sent a checkpoint, with much left to do."""
    state = read_state(Objects.open(url), name)
    sent = any("/checkpoints/" in key and key.endswith("manifest.json") for key in state.keys)
    step = state.heartbeat.get("step")
    return state if sent and not state.done and state.heartbeat.get("state") == "working" and step else None


def lose_a_node(cluster: Any, url: str, run: Run, driver: subprocess.Popen[Any]) -> tuple[str, int]:
    """Wait until a node other than the first trains, and end all of its processes at once, as a machine that is gone does.
    Returns the job and the fence that held it."""
    others = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
    end = time.monotonic() + 900  # Ray runs its workers at low priority: on a machine with other work they wait long
    while time.monotonic() < end:
        assert driver.poll() is None, "the run ended before a node was lost"
        for node in others:
            raylet = node.all_processes["raylet"][0].process.pid
            pids = below(raylet)
            name = job_of(pids)
            state = half_done(url, run, name) if name is not None and Path(url).exists() else None
            if name is not None and state is not None:
                for pid in pids:
                    os.kill(pid, signal.SIGSTOP)  # so that none of them can say goodbye when another is gone
                for pid in pids[1:]:
                    os.kill(pid, signal.SIGKILL)
                cluster.remove_node(node, allow_graceful=False)
                return name, state.fence
        time.sleep(0.05)
    raise AssertionError("no node came to train")


@pytest.fixture(scope="module")
def on_ray(
    cluster: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, subprocess.CompletedProcess[str], str, int]:
    """The run by `archipel run --engine ray`, a node lost on the way."""
    run = make(tmp_path_factory.mktemp("ray") / "run")
    url = str(run.root / "store")
    driver = subprocess.Popen(
        [sys.executable, "-m", "archipel.cli", "run", str(run.root), "--engine", "ray", "--threads", "1"],
        env=os.environ | {"RAY_ADDRESS": cluster.address, "ARCHIPEL_DEBUG": "1"},
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        name, fence = lose_a_node(cluster, url, run, driver)
        out, said = driver.communicate(timeout=900)
    finally:
        driver.kill()
    return run, subprocess.CompletedProcess([], driver.returncode, out, said), name, fence


def test_a_run_that_loses_a_node_ends_whole(on_ray: Any) -> None:
    run, ended, name, fence = on_ray
    assert ended.returncode == 0, ended.stderr
    assert "report: " in ended.stderr and "Traceback" not in ended.stderr
    assert [stage.state for stage in pipeline.states(run)] == ["done"] * 7
    state = read_state(Objects.open(default_store(run)), name)
    assert state.done and int(state.committed["fence"]) > fence, "the lost job was taken over by another island"


def test_the_weights_are_those_of_this_machine_alone(on_ray: Any, alone: Run) -> None:
    run = on_ray[0]
    for name in run.job_names:
        one, other = (folder / "model.safetensors" for folder in (run.expert(name), alone.expert(name)))
        assert store.sha256_file(one) == store.sha256_file(other), name


def test_what_was_prepared_by_the_nodes_is_what_this_machine_prepares(on_ray: Any, alone: Run) -> None:
    run = on_ray[0]
    assert tree(run.cache) == tree(alone.cache)
    assert store.sha256_file(run.manifest) == store.sha256_file(alone.manifest)


def test_the_samples_are_the_same_bytes(on_ray: Any, alone: Run) -> None:
    split = alone.config.evaluate.split
    ours, theirs = (
        {p.name: store.sha256_file(p) for p in run.samples(split).glob("*.safetensors")} for run in (on_ray[0], alone)
    )
    assert ours == theirs and set(alone.config.evaluate.arms) <= {Path(name).stem for name in ours}
