"""Frechet distance: symmetric eigen-decompositions (ours) against scipy's matrix square root and torchmetrics.

    python bench/frechet.py [--dims 400 1024] [--repeats 5] [--out frechet.json]

All three start from the same means and covariances, in float64 on one thread, and must agree before anything is timed.
Contenders are interleaved; the result holds medians, spreads and the ratios of the others' medians to ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy is imported

import numpy as np  # noqa: E402
import scipy  # noqa: E402
import scipy.linalg  # noqa: E402
import torch  # noqa: E402
import torchmetrics  # noqa: E402
from torchmetrics.image.fid import _compute_fid  # noqa: E402

from archipel.evaluation.distances import frechet_gaussian  # noqa: E402

TOLERANCE = 1e-6  # relative
BUSY = 0.5  # other work per core above which a result is flagged


def scipy_frechet(ma: np.ndarray, ca: np.ndarray, mb: np.ndarray, cb: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(ca @ cb)
    return float(((ma - mb) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * np.trace(root).real)


def torchmetrics_frechet(ma: np.ndarray, ca: np.ndarray, mb: np.ndarray, cb: np.ndarray) -> float:
    return float(_compute_fid(*(torch.from_numpy(one) for one in (ma, ca, mb, cb))))


def ours(ma: np.ndarray, ca: np.ndarray, mb: np.ndarray, cb: np.ndarray) -> float:
    return float(frechet_gaussian(ma, ca, mb, cb))


CONTENDERS: dict[str, Callable[..., float]] = {
    "archipel": ours,
    "scipy.linalg.sqrtm": scipy_frechet,
    "torchmetrics": torchmetrics_frechet,
}


def problem(d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Moments of two sets of 3 d rows whose spectrum falls as that of network features does."""
    draw = np.random.Generator(np.random.PCG64(d))
    spread = np.arange(1, d + 1) ** -0.5
    a, b = draw.normal(size=(3 * d, d)) * spread, draw.normal(size=(3 * d, d)) * spread[::-1] + 0.1
    return a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)


def measure(d: int, repeats: int) -> dict[str, object]:
    data = problem(d)
    values = {name: run(*data) for name, run in CONTENDERS.items()}  # also the warm-up
    for name, value in values.items():
        if abs(value - values["archipel"]) > TOLERANCE * abs(values["archipel"]):
            sys.exit(f"d = {d}: {name} says {value!r}, archipel says {values['archipel']!r}: nothing was timed")
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(repeats):
        for name, run in CONTENDERS.items():
            began = time.perf_counter()
            run(*data)
            seconds[name].append(time.perf_counter() - began)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "d": d,
        "values": values,
        "seconds": {n: {"median": middle[n], "min": min(t), "max": max(t)} for n, t in seconds.items()},
        "times_ours": {name: round(middle[name] / middle["archipel"], 3) for name in CONTENDERS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[400, 1024])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: standard output)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cores = os.cpu_count() or 1
    before = os.getloadavg()[0]
    results = [measure(d, options.repeats) for d in options.dims]
    record = {
        "benchmark": "frechet",
        "threads": 1,
        "repeats": options.repeats,
        "interleaved": True,
        "busy": bool(before / cores > BUSY),
        "load_before": before,
        "cores": cores,
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {one.__name__: one.__version__ for one in (np, scipy, torch, torchmetrics)},
        "results": results,
    }
    text = json.dumps(record, indent=2)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
