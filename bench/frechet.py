"""Frechet distance: symmetric eigen-decompositions (ours) against scipy's matrix square root and torchmetrics.

    python -m bench.frechet [--small] [--out FILE]

All three start from the same means and covariances, in float64, and must agree before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torchmetrics.image.fid import _compute_fid

from archipel.evaluation.distances import frechet_gaussian
from bench import common

TOLERANCE = 1e-6  # relative
OURS = "archipel"


def scipy_frechet(ma: np.ndarray, ca: np.ndarray, mb: np.ndarray, cb: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(ca @ cb)
    return float(((ma - mb) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * np.trace(root).real)


def torchmetrics_frechet(ma: np.ndarray, ca: np.ndarray, mb: np.ndarray, cb: np.ndarray) -> float:
    return float(_compute_fid(*(torch.from_numpy(one) for one in (ma, ca, mb, cb))))


def ours(ma: np.ndarray, ca: np.ndarray, mb: np.ndarray, cb: np.ndarray) -> float:
    return float(frechet_gaussian(ma, ca, mb, cb))


CONTENDERS: dict[str, Callable[..., float]] = {
    OURS: ours,
    "scipy.linalg.sqrtm": scipy_frechet,
    "torchmetrics": torchmetrics_frechet,
}


def problem(d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Moments of two sets of 3 d rows whose spectrum falls as that of network features does."""
    draw = np.random.Generator(np.random.PCG64(d))
    spread = np.arange(1, d + 1) ** -0.5
    a, b = draw.normal(size=(3 * d, d)) * spread, draw.normal(size=(3 * d, d)) * spread[::-1] + 0.1
    return a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)


def run(small: bool = False) -> dict[str, Any]:
    with common.Benchmark("frechet", "Frechet distance of two Gaussians", ("scipy", "torch", "torchmetrics")) as b:
        for d in (16,) if small else (400, 1024):
            data = problem(d)
            values = {name: compute(*data) for name, compute in CONTENDERS.items()}
            for name, value in values.items():
                if abs(value - values[OURS]) > TOLERANCE * abs(values[OURS]):
                    raise common.DifferentError(f"d = {d}: {name} says {value!r}, archipel says {values[OURS]!r}")
            b.facts[f"values at d = {d}"] = values
            calls = {name: partial(compute, *data) for name, compute in CONTENDERS.items()}
            seconds = common.interleave(calls, 3 if small else 7)
            for name in list(CONTENDERS)[1:]:
                b.rows.append(common.versus(f"d = {d}", name, seconds[OURS], seconds[name], aim=1.0))
    return b.record


if __name__ == "__main__":
    common.main(__doc__, run)
