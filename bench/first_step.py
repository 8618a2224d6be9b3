"""From nothing to the first training step of a job: ``archipel join`` against Ray (init plus task) and submitit (local).

    python -m bench.first_step [--small] [--out FILE]

Each contender is a fresh process, timed from its start to the first line of the job's metrics. Ours claims the job in a
bucket and fetches its shard first; Ray's driver starts a Ray of its own (``ray.init()``) and sends one task; submitit's
sends one job to its local executor. What runs there is the same function, on a run folder that is in place. Ray is found in
``.venv-ray`` (``make setup-ray``), whose interpreter then starts all three.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from archipel.run import Run
from bench import common
from bench.islands import make_run, published

WHAT = "from nothing to a job's first training step"
STEPS = 40  # up to 50, every step has a line of its own

RAY = """
import os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
@ray.remote(num_cpus=1)
def job(root):
    from archipel import pipeline
    pipeline.train(pipeline.open_run(root), "0", threads=1)
ray.get(job.remote(sys.argv[1]))
"""
SUBMITIT = """
import sys, submitit
def job(root):
    from archipel import pipeline
    pipeline.train(pipeline.open_run(root), "0", threads=1)
executor = submitit.LocalExecutor(folder=sys.argv[1] + "-logs")
executor.update_parameters(timeout_min=5)
executor.submit(job, sys.argv[1]).result()
"""


def python() -> str:
    """The interpreter that has Ray beside all else. Raises where there is none."""
    path = Path(__file__).parents[1] / ".venv-ray" / "bin" / "python"
    if not path.exists():
        raise RuntimeError("there is no .venv-ray: make setup-ray")
    return str(path)


def until_first_step(command: list[str], metrics: Path) -> float:
    """Wall seconds from the start of a process to the first line of metrics; then everything of it is ended."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, start_new_session=True)
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None or time.perf_counter() - began > 300:
                    said.seek(0)
                    raise RuntimeError(f"no first step: {said.read().decode(errors='replace')[-800:]}")
                time.sleep(0.002)
            return time.perf_counter() - began
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run(small: bool = False) -> dict[str, Any]:
    """The record; see ``common.Benchmark``."""
    program, rounds = python(), 1 if small else 5
    with tempfile.TemporaryDirectory() as name, common.Benchmark("first_step", WHAT, ("torch", "submitit")) as b:
        folder = Path(name)
        made = make_run(folder / "run", 1, STEPS, small)
        url = published(made, folder / "bucket")
        taken: dict[str, common.Seconds] = {which: common.Seconds() for which in ("join", "ray", "submitit")}
        for number in range(rounds + 1):
            order = list(taken)[number % 3 :] + list(taken)[: number % 3]
            for which in order:
                seconds = _one(program, which, made, url, folder / f"{which}-{number}")
                if number:
                    taken[which].wall.append(seconds)
                    taken[which].cpu.append(seconds)  # spread over processes that are not ours: wall-clock only
        for peer, case in (("ray", "Ray: init plus task"), ("submitit", "submitit: local executor")):
            b.rows.append(common.versus("join: claim to first step", case, taken["join"], taken[peer]))
        b.facts["judged"] = "wall-clock seconds only"
    return b.record


def _one(program: str, which: str, made: Run, url: Path, place: Path) -> float:
    if which == "join":
        bucket = place.with_name(place.name + "-bucket")
        shutil.copytree(url, bucket)
        words = ["join", str(bucket), "--only", "0", "--jobs", "1", "--threads", "1", "--work", str(place)]
        return until_first_step([program, "-m", "archipel.cli", *words], place / "experts" / "0" / "metrics.jsonl")
    shutil.copytree(made.root, place)
    script = RAY if which == "ray" else SUBMITIT
    return until_first_step([program, "-c", script, str(place)], place / "experts" / "0" / "metrics.jsonl")


if __name__ == "__main__":
    common.main(__doc__, run)
