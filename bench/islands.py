"""An island against plain training of the same job, and K islands against the slowest one's own time.

    python -m bench.islands [--small] [--out FILE]

The contenders are processes, from their start to their end: ``archipel train RUN 0`` and ``archipel join URL --only 0
--jobs 1``, one thread each, heartbeat 60 s, on a store in a folder. The island also claims, fetches its shard, sends
every checkpoint and the result, and commits. Both must give the same weights, byte for byte.

With K islands on a machine of fewer cores only computed seconds mean anything: an island's own time is the CPU time of its
process, and the makespan on K machines would be the slowest island's. Two at a time are run, as many as there are cores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from archipel import config, store
from archipel.islands.publish import publish
from archipel.progress import StopFlag
from archipel.run import MONOLITH, Run
from archipel.training import budget
from bench import common

AIM = 1.01
AIM_K = 1.02
WHAT = "an island against plain training of the same job"
ISLANDS = (1, 2, 4, 8)


def make_run(root: Path, k: int, steps: int, small: bool) -> Run:
    """A run of the demo's sizes with shards of random numbers, and a stand-in for the codec, which is only carried."""
    every = max(1, steps // 4)
    values: dict[str, Any] = {
        "clips": {"count": 0, "frames": 8, "size": 32},
        "codec": {"channels": 64},
        "text": {"tokens": 12},
        "partition": {"k": k},
        "expert": {"steps": steps, "batch": 8, "validate_every": every, "checkpoint_every": every},
        "router": {"steps": 1, "batch": 8},
        "evaluate": {"arms": ["top1", "monolith"]},
        "islands": {"heartbeat": 60.0, "lease": 300.0},
    }
    if small:
        values["expert"] |= {"width": 32, "heads": 2, "rope_axes": [4, 6, 6]}
        values["router"] |= {"width": 8, "heads": 1, "rope_axes": [4, 2, 2], "blocks": 1}
    run = Run.create(root, budget.resolve(config.build(values)))
    for name in (*run.expert_names, MONOLITH):
        folder, number = run.shard(name), 99 if name == MONOLITH else int(name)
        for split, count in (("train", 150), ("validation", 20)):
            arrays = common.clip_arrays(run.config, count, seed=number)
            store.write_tensors(folder / f"{split}.safetensors", arrays)
        store.write_card(folder, "shard", run.id, ["train.safetensors", "validation.safetensors"])
    store.write_tensors(run.codec / "model.safetensors", {"mean": common.clip_arrays(run.config, 1)["pooled"]})
    store.write_card(run.codec, "codec", run.id, ["model.safetensors"])
    return run


def spend(*words: object) -> tuple[float, float]:
    """Run ``archipel WORDS`` on one thread to its end: wall and CPU seconds. Raises where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "archipel.cli", *map(str, words)], stdout=said, stderr=said, env=environment
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            said.seek(0)
            raise RuntimeError(f"archipel {words[0]} failed: {said.read().decode(errors='replace')[-500:]}")
    return wall, used.ru_utime + used.ru_stime


def trained(run: Run, place: Path, name: str) -> tuple[float, float, str]:
    """Plain training in a copy of the run: seconds and the weights' sha256."""
    shutil.copytree(run.root, place)
    seconds = spend("train", "--threads", 1, "--", place, name)
    return *seconds, store.sha256_file(Run.open(place).expert(name) / "model.safetensors")


def joined(url: Path, place: Path, name: str) -> tuple[float, float, str]:
    """One island's work on one job."""
    seconds = spend("join", url, "--only", name, "--jobs", 1, "--threads", 1, "--work", place)
    committed = store.read_json(url / "jobs" / name / "committed.json")
    return *seconds, store.sha256_file(url / committed["key"] / "model.safetensors")


def published(run: Run, place: Path) -> Path:
    with StopFlag() as stop:
        publish(run, place.as_uri(), stop)
    return place


def same(one: str, other: str, what: str) -> None:
    if one != other:
        raise common.DifferentError(f"{what}: the island's weights are not those of plain training")


def one_island(b: common.Benchmark, folder: Path, rounds: int, steps: int, small: bool) -> None:
    run = make_run(folder / "run", 1, steps, small)
    ours, theirs = common.Seconds(), common.Seconds()
    for number in range(rounds):
        url = published(run, folder / f"bucket-{number}")

        def join(number: int = number, url: Path = url) -> tuple[float, float, str]:
            return joined(url, folder / f"island-{number}", "0")

        def train(number: int = number) -> tuple[float, float, str]:
            return trained(run, folder / f"plain-{number}", "0")

        both = [join(), train()] if number % 2 else [train(), join()][::-1]
        same(both[0][2], both[1][2], f"round {number}")
        for seconds, (wall, cpu, _) in zip((ours, theirs), both, strict=True):
            seconds.wall.append(wall)
            seconds.cpu.append(cpu)
    b.rows.append(common.versus(f"join, {steps} steps, heartbeat 60 s", "archipel train", ours, theirs, AIM))
    b.facts["an island's further CPU seconds per job"] = round(
        sorted(a - t for a, t in zip(ours.cpu, theirs.cpu, strict=True))[rounds // 2], 3
    )


def many_islands(b: common.Benchmark, folder: Path, k: int, steps: int, small: bool) -> dict[str, Any]:
    run = make_run(folder / f"run-{k}", k, steps, small)
    url = published(run, folder / f"bucket-k{k}")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        ours = list(pool.map(lambda n: joined(url, folder / f"k{k}-{n}", n), run.expert_names))
        theirs = list(pool.map(lambda n: trained(run, folder / f"p{k}-{n}", n), run.expert_names))
    for name, one, other in zip(run.expert_names, ours, theirs, strict=True):
        same(one[2], other[2], f"K = {k}, expert {name}")
    slowest, own = max(cpu for _, cpu, _ in ours), max(cpu for _, cpu, _ in theirs)
    ours_s, theirs_s = common.Seconds([slowest], [slowest]), common.Seconds([own], [own])
    b.rows.append(common.versus(f"K = {k}: slowest island, CPU seconds", "its own training", ours_s, theirs_s, AIM_K))
    return {
        "K": k,
        "island-seconds": round(sum(cpu for _, cpu, _ in ours), 1),
        "seconds of plain training": round(sum(cpu for _, cpu, _ in theirs), 1),
        "slowest island": round(slowest, 1),
        "slowest plain": round(own, 1),
    }


def run(small: bool = False) -> dict[str, Any]:
    """The record; see ``common.Benchmark``."""
    with (
        tempfile.TemporaryDirectory() as name,
        common.Benchmark("islands", WHAT, ("torch", "diffusers", "obstore")) as b,
    ):
        folder = Path(name)
        one_island(b, folder, *((1, 8) if small else (3, 300)), small)
        counts = ISLANDS[:2] if small else ISLANDS
        b.tables["island-seconds"] = [many_islands(b, folder, k, 8 if small else 80, small) for k in counts]
        b.facts["what a second is"] = "CPU seconds of whole processes, imports included"
    return b.record


if __name__ == "__main__":
    common.main(__doc__, run)
