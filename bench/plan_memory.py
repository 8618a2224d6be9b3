"""What `archipel plan` predicts of a training step's memory against what the step takes.

    python -m bench.plan_memory [--small] [--out FILE]

Every case is a process of its own, which trains two real steps of a real ``Trainer`` on the CPU. Counted is what it holds at
most beyond what it held before the network was built, when a tiny one had been trained already: as torch's allocator tells the
profiler (allocated), and, in a second process, as the system sees it (resident), once more where the C library gives back what
is freed at once instead of keeping pieces of it (returned).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from archipel import config
from archipel.backbones.registry import build_expert
from archipel.planning.memory import Dry, Steps
from archipel.planning.switches import Switches
from archipel.training.batches import Batch
from archipel.training.local import Local
from archipel.training.loop import Settings, Trainer
from bench import common

MEGA = 1 << 20
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # glibc's
WAYS = {"allocated": (True, False), "resident": (False, False), "returned": (False, True)}  # traced, returned
# 96 M parameters on 128 video tokens, batches of 4 clips.
LARGE = {"width": 768, "heads": 12, "rope_axes": [16, 24, 24], "double_blocks": 2, "single_blocks": 6, "batch": 4}
SMALL = {"width": 64, "heads": 2, "rope_axes": [8, 12, 12], "double_blocks": 1, "single_blocks": 2, "batch": 4}
CASES: dict[str, dict[str, Any]] = {
    "flux": {},
    "flux, checkpointing": {"checkpointing": True},
    "flux, micro-batch 1": {"micro_batch": 1},
    "wan": {"backbone": "wan"},
}


def settings(part: dict[str, Any], backbone: str = "flux") -> config.RunConfig:
    values = {
        "clips": {"frames": 8, "size": 64},
        "codec": {"channels": 16},
        "expert": {**part, "backbone": backbone, "steps": 10},
    }
    return config.build(values, "the benchmark's settings")


class Drawn(Dry):
    """Clips of random numbers."""

    def batch(self, step: int, part: slice | None = None) -> Batch:
        made = super().batch(step, part)
        for tensor in (made.x0, made.noise, made.x_t, made.cond.tokens, made.cond.pooled):
            tensor.normal_()
        made.t.uniform_()
        return made


def trainer(of: config.RunConfig, switches: Switches) -> Trainer:
    local = Local("cpu", "float32", switches.micro_batch, checkpointing=switches.checkpointing)
    return Trainer(Drawn(build_expert(of, seed=0), of, of.expert.batch), Settings(steps=10, lr=1e-3), local)


def allocated(steps: int, of: config.RunConfig, switches: Switches) -> int:
    """Bytes that torch's allocator had given out at most."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        made = trainer(of, switches)
        for _ in range(steps):
            made.advance()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def child(case: str, small: bool, traced: bool) -> None:
    torch.set_num_threads(1)
    words = dict(CASES[case])
    of = settings(SMALL if small else LARGE, words.pop("backbone", "flux"))
    switches = Switches("float32", **words)
    warm = trainer(settings(SMALL, of.expert.backbone), switches)
    warm.advance()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if traced:
        print(json.dumps(allocated(2, of, switches)))
        return
    made = trainer(of, switches)
    for _ in range(2):
        made.advance()
    print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))


def measure(case: str, small: bool, traced: bool, returned: bool = False) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "bench.plan_memory", "--child", case, str(int(small)), str(int(traced))],
        cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True,
        env={**os.environ, **(RETURNING if returned else {})},
    )  # fmt: skip
    return int(json.loads(done.stdout.splitlines()[-1]))


def _share(predicted: int, measured: int) -> float | None:
    """Their ratio; None where a network was so small that the process did not grow."""
    return round(predicted / measured, 4) if measured > 0 else None


def run(small: bool = False) -> dict[str, Any]:
    table = []
    with common.Benchmark(
        "plan_memory", "memory of a training step, predicted and measured", ("torch", "diffusers")
    ) as b:
        for case, given in list(CASES.items())[: 1 if small else None]:
            words = dict(given)
            of = settings(SMALL if small else LARGE, words.pop("backbone", "flux"))
            steps, switches = Steps(of), Switches("float32", **words)
            predicted = steps.of(switches).peak
            found = {key: measure(case, small, *how) for key, how in WAYS.items()}
            table.append(
                {
                    "case": case,
                    "parameters, M": round(steps.total / 1e6, 2),
                    "predicted, MiB": round(predicted / MEGA, 2),
                    "allocated, MiB": round(found["allocated"] / MEGA, 2),
                    "resident, MiB": round(found["resident"] / MEGA, 2),
                    "returned, MiB": round(found["returned"] / MEGA, 2),
                    "predicted / allocated": _share(predicted, found["allocated"]),
                    "predicted / resident": _share(predicted, found["resident"]),
                    "predicted / returned": _share(predicted, found["returned"]),
                }
            )
        b.tables["a step's peak"] = table
    return b.record


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3] == "1", sys.argv[4] == "1")
    else:
        common.main(__doc__, run)
