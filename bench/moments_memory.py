"""Memory of mean and covariance: streamed moments (ours) against cd-fvd's statistics, with and without its list of features.

    python -m bench.moments_memory [--small] [--out FILE]

Every contender is a process of its own that is fed the same features, batch by batch, made as they are wanted. What is
counted is what it holds at most beyond what it held before the first batch: all that numpy allocates (tracemalloc), in a
second process also the resident set. Means and covariances (divisor n) must agree before anything is reported.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from archipel.evaluation.distances import Moments
from bench import common, peers

N, BATCH = 2048, 16
WIDTHS = (400, 1024, 1408)  # I3D's logits, I3D's pooled features, VideoMAE's giant
OURS, LIST, STREAMED = "archipel, streamed moments", "cd-fvd, list of features", "cd-fvd, mean and covariance only"
MEGA = 1 << 20


def batches(n: int, d: int) -> Iterator[np.ndarray]:
    draw = np.random.Generator(np.random.PCG64(d))
    for begin in range(0, n, BATCH):
        yield draw.standard_normal((min(BATCH, n - begin), d), dtype=np.float32) + np.float32(1)


def child(name: str, n: int, d: int, traced: bool, out: Path) -> None:
    """Feed one contender and say what it took; mean and covariance go to ``out``."""
    with peers.cdfvd() as module:
        next(batches(BATCH, d)).T @ np.ones((BATCH, 1), np.float32)  # BLAS makes room for itself on first use
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if traced:
            tracemalloc.start()
        if name == OURS:
            moments = Moments.stream(batches(n, d))
        else:
            stats = module.FeatureStats(capture_all=name == LIST, capture_mean_cov=True)
            for batch in batches(n, d):
                stats.append(batch)
        peak = tracemalloc.get_traced_memory()[1] if traced else 0
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tracemalloc.stop()
        mean, cov = (moments.mean, moments.covariance_over("n")) if name == OURS else stats.get_mean_cov()
    np.savez(out, mean=mean, cov=cov)
    print(json.dumps({"peak": peak / MEGA, "resident": (after - before) / 1024}))  # ru_maxrss is in KiB


def measure(name: str, n: int, d: int, folder: Path) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    found: dict[str, float] = {}
    out = folder / "statistics.npz"
    for traced, key in ((True, "peak"), (False, "resident")):
        words = [name, str(n), str(d), str(int(traced)), str(out)]
        done = subprocess.run(
            [sys.executable, "-m", "bench.moments_memory", "--child", *words],
            cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True,
        )  # fmt: skip
        found[key] = round(json.loads(done.stdout)[key], 3)
    with np.load(out, allow_pickle=False) as arrays:
        return found, dict(arrays)


def run(small: bool = False) -> dict[str, Any]:
    n, table = 64 if small else N, []
    what = f"memory of mean and covariance of {n} clips, batches of {BATCH}"
    with common.Benchmark("moments_memory", what, ("cd-fvd",)) as b, tempfile.TemporaryDirectory() as folder:
        for d in (16,) if small else WIDTHS:
            found = {name: measure(name, n, d, Path(folder)) for name in (OURS, LIST, STREAMED)}
            for name, (_, arrays) in found.items():
                for key, mine in found[OURS][1].items():
                    if not np.allclose(mine, arrays[key], rtol=1e-9, atol=1e-9):
                        raise common.DifferentError(f"d = {d}: {name} gives another {key} than archipel")
            mine = found[OURS][0]
            for name in (LIST, STREAMED):
                theirs = found[name][0]
                table.append(
                    {
                        "d": d,
                        "against": name,
                        "ours, MiB": mine["peak"],
                        "theirs, MiB": theirs["peak"],
                        "ratio": round(mine["peak"] / theirs["peak"], 4),
                        "ours, resident MiB": mine["resident"],
                        "theirs, resident MiB": theirs["resident"],
                    }
                )
        b.tables["peak memory"] = table
    return b.record


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "1", Path(sys.argv[6]))
    else:
        common.main(__doc__, run)
