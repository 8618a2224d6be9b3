"""What the head-to-heads share: contenders in turn, ratios of neighbouring runs, facts of the machine, one record.

A ratio is our seconds over theirs, so less is better. ``wall`` is what a person waits; ``cpu`` is what the process
computed, which other work on the machine disturbs less: it is what an aim is held to where the machine was busy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from archipel import config
from archipel.backbones import flops

BUSY = 1.5  # load beyond ours above which wall-clock times are not believed
BUSY_CORES = 0.3  # the same for cores that other processes kept busy meanwhile, where the system says
_BEGAN = time.monotonic()


class DifferentError(RuntimeError):
    """Contenders do not give the same: nothing is timed."""


class AbsentError(RuntimeError):
    """What is measured on is not here: nothing is timed."""


# --- timing ----------------------------------------------------------------------------------------------------------


@dataclass
class Seconds:
    """Wall and CPU seconds of a contender's runs, in order."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, began: tuple[float, float], ended: tuple[float, float]) -> None:
        self.wall.append(ended[0] - began[0])
        self.cpu.append(ended[1] - began[1])

    def __getitem__(self, which: list[int]) -> Seconds:
        return Seconds([self.wall[i] for i in which], [self.cpu[i] for i in which])


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def interleave(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Seconds]:
    """Run every contender once a round, each round beginning with another one; a first round only warms up."""
    names = list(contenders)
    taken = {name: Seconds() for name in names}
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            began = clocks()
            contenders[name]()
            if number:
                taken[name].add(began, clocks())
    return taken


def _ratios(ours: list[float], theirs: list[float]) -> dict[str, float]:
    pairs = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    low, high = (pairs[round(q * (len(pairs) - 1))] for q in (0.1, 0.9))
    return {"median": round(statistics.median(pairs), 4), "p10": round(low, 4), "p90": round(high, 4)}


def versus(case: str, against: str, ours: Seconds, theirs: Seconds, aim: float | None = None) -> dict[str, Any]:
    """One line of the table: ours against a peer over the same rounds. ``aim``: the ratio wanted at most."""
    return {
        "case": case,
        "against": against,
        "seconds": statistics.median(ours.wall),
        "seconds_against": statistics.median(theirs.wall),
        "wall": _ratios(ours.wall, theirs.wall),
        "cpu": _ratios(ours.cpu, theirs.cpu),
        "rounds": len(ours.wall),
        "aim": aim,
    }


def within(case: str, limit: float, taken: Seconds) -> dict[str, Any]:
    """One line of the table: seconds against a goal that is a number of seconds; the aim is a ratio of 1 at most."""
    goal = Seconds([limit] * len(taken.wall), [limit] * len(taken.cpu))
    return versus(case, f"the goal of {limit:g} s", taken, goal, 1.0)


def spend(command: list[str], taken: Seconds | None, **more: Any) -> None:
    """Run a command of one thread to its end, and add what it took (its CPU seconds with its children's)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def now() -> tuple[float, float]:
        used = os.times()
        return time.perf_counter(), used.children_user + used.children_system

    began = now()
    subprocess.run(command, check=True, capture_output=True, env=environment, **more)
    if taken is not None:
        taken.add(began, now())


# --- what is measured on ---------------------------------------------------------------------------------------------


def clip_arrays(settings: config.RunConfig, clips: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of a training shard, drawn at random: shapes and dtypes are what matters."""
    rng = np.random.Generator(np.random.PCG64(seed))
    (L, D, P), latent = flops.text_shape(settings), flops.latent_shape(settings)
    return {
        "latents": rng.standard_normal((clips, *latent), dtype=np.float32),
        "tokens": rng.standard_normal((clips, L, D), dtype=np.float32),
        "mask": np.arange(L)[None] < rng.integers(2, L, clips)[:, None],
        "pooled": rng.standard_normal((clips, P), dtype=np.float32),
        "cluster": rng.integers(0, settings.partition.k, clips),
        "row": np.arange(clips, dtype=np.int64),
    }


# --- records ---------------------------------------------------------------------------------------------------------


def load_beyond_ours() -> float:
    """The one-minute load average without what this process, busy since it began, has put into it."""
    return max(0.0, os.getloadavg()[0] - (1 - math.exp((_BEGAN - time.monotonic()) / 60)))


def ticks() -> tuple[float, float, float] | None:
    """(seconds that the machine's cores were busy, what of it is ours, now); None where the system does not say."""
    table = Path("/proc/stat")
    if not table.exists():
        return None
    user, nice, system, _, _, irq, soft, *_ = map(int, table.read_text(encoding="ascii").split("\n")[0].split()[1:])
    own = sum(os.times()[:4])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK"), own, time.monotonic()


def others_cores(before: tuple[float, float, float] | None, after: tuple[float, float, float] | None) -> float | None:
    """How many cores other processes kept busy in between."""
    if before is None or after is None:
        return None
    return round(max(0.0, (after[0] - before[0]) - (after[1] - before[1])) / max(after[2] - before[2], 0.01), 2)


def installed(package: str) -> str:
    """Its version, or "" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def machine(packages: Iterable[str]) -> dict[str, Any]:
    names = Path("/proc/cpuinfo")
    lines = names.read_text(encoding="utf-8").splitlines() if names.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": 1,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: installed(name) for name in sorted(packages) if installed(name)},
    }


def commit() -> str:
    """The short hash of the checkout that is measured, "+ changes" where it has any; "" outside a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return git("rev-parse", "--short", "HEAD") + (" + changes" if git("status", "--porcelain", "-uno") else "")


class Benchmark:
    """One benchmark's record: ``with Benchmark("top1", "what it compares", ["torch"]) as b: b.rows.append(versus(...))``.

    ``record`` is ready on leaving: {"benchmark", "what", "date", "commit", "machine", "load", "busy", "took", "absent",
    "rows", "facts", "tables"}; every row has "met": true, false, or null where there is no aim. A row is judged by its
    wall-clock ratio, or by its CPU ratio where the machine was busy. ``absent`` names peers that are not installed.
    """

    def __init__(self, name: str, what: str, packages: Iterable[str]) -> None:
        self.name, self.what, self.packages = name, what, ("numpy", *packages)
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.absent: list[str] = []
        self.record: dict[str, Any] = {}

    def __enter__(self) -> Benchmark:
        self._load, self._ticks, self._began = load_beyond_ours(), ticks(), time.monotonic()
        return self

    def has(self, package: str) -> bool:
        """Whether a peer is installed; where it is not, the page will say so."""
        if installed(package):
            return True
        self.absent.append(package)
        return False

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            return
        load = {"beyond_ours_before": round(self._load, 2), "beyond_ours_after": round(load_beyond_ours(), 2)}
        cores = others_cores(self._ticks, ticks())
        busy = max(load.values()) > BUSY if cores is None else cores > BUSY_CORES
        if cores is not None:
            load["cores_of_others"] = cores
        for row in self.rows:
            row["judged_by"] = "cpu" if busy else "wall"
            row["met"] = None if row["aim"] is None else row[row["judged_by"]]["median"] <= row["aim"]
        self.record = {
            "benchmark": self.name,
            "what": self.what,
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit(),
            "machine": machine(self.packages),
            "load": load,
            "busy": busy,
            "took": round(time.monotonic() - self._began, 1),
            "absent": self.absent,
            "rows": self.rows,
            "facts": self.facts,
            "tables": self.tables,
        }


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has on its own."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--small", action="store_true", help="only to see that it works: the numbers mean nothing")
    made.add_argument("--out", type=Path, help="where the JSON goes (default: standard output)")
    return made


def finish(options: argparse.Namespace, run: Callable[[], dict[str, Any]]) -> None:
    """Run and write the record, or leave with the reason why there is none."""
    import torch

    torch.set_num_threads(1)
    try:
        text = json.dumps(run(), indent=2)
    except (DifferentError, AbsentError) as error:
        sys.exit(f"{error}: nothing is reported")
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


def main(doc: str | None, run: Callable[[bool], dict[str, Any]]) -> None:
    """``python -m bench.NAME [--small] [--out FILE]``."""
    options = parser(doc).parse_args()
    finish(options, lambda: run(options.small))
