"""Frechet distance: symmetric eigen-decompositions (ours) against scipy's matrix square root, torchmetrics and cd-fvd.

    python -m bench.frechet [--small] [--out FILE]

All start from the same means and covariances, in float64, and must agree before anything is timed.
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
from bench import common, peers

TOLERANCE = 1e-6  # relative
OURS = "archipel"
ROUNDS = {400: 7, 1024: 7, 2048: 3}
_CDFVD: dict[str, Any] = {}  # the peer, for as long as ``run`` lasts


def scipy_frechet(ma: np.ndarray, ca: np.ndarray, mb: np.ndarray, cb: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(ca @ cb)
    return float(((ma - mb) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * np.trace(root).real)


def torchmetrics_frechet(ma: np.ndarray, ca: np.ndarray, mb: np.ndarray, cb: np.ndarray) -> float:
    return float(_compute_fid(*(torch.from_numpy(one) for one in (ma, ca, mb, cb))))


class Given:
    """Statistics as cd-fvd's Frechet code asks for them."""

    def __init__(self, mean: np.ndarray, cov: np.ndarray) -> None:
        self.get_mean_cov = lambda: (mean, cov)


def cdfvd_frechet(ma: np.ndarray, ca: np.ndarray, mb: np.ndarray, cb: np.ndarray) -> float:
    return float(_CDFVD["module"].cdfvd.compute_fvd_from_stats(None, Given(ma, ca), Given(mb, cb)))


def ours(ma: np.ndarray, ca: np.ndarray, mb: np.ndarray, cb: np.ndarray) -> float:
    return float(frechet_gaussian(ma, ca, mb, cb))


CONTENDERS: dict[str, Callable[..., float]] = {
    OURS: ours,
    "scipy.linalg.sqrtm": scipy_frechet,
    "torchmetrics": torchmetrics_frechet,
    "cd-fvd": cdfvd_frechet,
}


def problem(d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Moments of two sets of 3 d rows whose spectrum falls as that of network features does."""
    draw = np.random.Generator(np.random.PCG64(d))
    spread = np.arange(1, d + 1) ** -0.5
    a, b = draw.normal(size=(3 * d, d)) * spread, draw.normal(size=(3 * d, d)) * spread[::-1] + 0.1
    return a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)


def run(small: bool = False) -> dict[str, Any]:
    packages = ("scipy", "torch", "torchmetrics", "cd-fvd")
    with peers.cdfvd() as module, common.Benchmark("frechet", "Frechet distance of two Gaussians", packages) as b:
        _CDFVD["module"] = module
        for d, rounds in ({16: 3} if small else ROUNDS).items():
            data = problem(d)
            values = {name: compute(*data) for name, compute in CONTENDERS.items()}
            for name, value in values.items():
                if not abs(value - values[OURS]) <= TOLERANCE * abs(values[OURS]):
                    raise common.DifferentError(f"d = {d}: {name} says {value!r}, archipel says {values[OURS]!r}")
            b.facts[f"values at d = {d}"] = values
            calls = {name: partial(compute, *data) for name, compute in CONTENDERS.items()}
            seconds = common.interleave(calls, rounds)
            for name in list(CONTENDERS)[1:]:
                b.rows.append(common.versus(f"d = {d}", name, seconds[OURS], seconds[name], aim=1.0))
    return b.record


if __name__ == "__main__":
    common.main(__doc__, run)
