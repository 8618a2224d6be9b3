"""Intervals of a Frechet distance: from moments of units (ours) against recomputation from features.

    python -m bench.intervals [--small] [--out FILE]

All start from the same features, PCA and plan: 8 halvings of the content groups in both directions, from all units and
without each of 24, which is 400 Frechet distances for one interval. Recomputation takes, for each of them, the clips'
features, projects them and fits two Gaussians; their distance is then ours ("features") or by scipy's matrix square root
("features, sqrtm"), as evaluation scripts do it. Estimates and bounds must agree before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from archipel.evaluation import distances, intervals, sides
from archipel.evaluation.distances import HalfPlan, HalfReference, Moments, Projection, UnitMoments
from bench import common

TOLERANCE = 1e-6  # relative
OURS, FEATURES, SQRTM = "archipel", "features", "features, sqrtm"
AIM = 0.05


@dataclass(frozen=True)
class Problem:
    """Features of an arm and of the reference (N, D), the unit of each clip (N,) (one numbering), PCA and plan."""

    arm: np.ndarray
    reference: np.ndarray
    unit: np.ndarray
    pca: Projection
    plan: HalfPlan


def problem(n: int, width: int, dims: int, units: int) -> Problem:
    draw = np.random.Generator(np.random.PCG64([n, width]))
    spread = np.arange(1, width + 1) ** -0.5
    train, reference = draw.normal(size=(3 * dims + 64, width)) * spread, draw.normal(size=(n, width)) * spread
    arm = draw.normal(size=(n, width)) * spread * 0.9 + 0.05
    unit = intervals.pack_units(n, units)
    return Problem(arm, reference, unit, distances.fit_pca(train, dims), HalfPlan.make(units, sides.HALVINGS))


def from_moments(given: Problem) -> np.ndarray:
    units = given.plan.first.shape[-1]
    reference = HalfReference(UnitMoments.of(given.pca(given.reference), given.unit, units), given.plan)
    return reference.distances(UnitMoments.of(given.pca(given.arm), given.unit, units))


def recompute(given: Problem, distance: Callable[[Moments, Moments], float]) -> np.ndarray:
    values = np.empty(given.plan.first.shape[:2])
    for place in np.ndindex(*values.shape):
        mine, other = (mask[place][given.unit] for mask in (given.plan.first, given.plan.second))
        values[place] = distance(Moments.of(given.pca(given.arm[mine])), Moments.of(given.pca(given.reference[other])))
    return np.asarray(values.mean(1))


def with_sqrtm(a: Moments, b: Moments) -> float:
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance) - 2 * np.trace(root).real)


CONTENDERS: dict[str, Callable[[Problem], np.ndarray]] = {
    OURS: from_moments,
    FEATURES: lambda given: recompute(given, distances.frechet),
    SQRTM: lambda given: recompute(given, with_sqrtm),
}
CASES = ((96, 1280, 32, 24, 7), (512, 1280, 32, 24, 5), (2048, 1280, 32, 24, 3))  # clips, width, PCA, units, rounds


def run(small: bool = False) -> dict[str, Any]:
    with common.Benchmark("intervals", "interval of a Frechet distance, from features of two sets", ("scipy",)) as b:
        for n, width, dims, units, rounds in ((32, 20, 4, 6, 3),) if small else CASES:
            case, given = f"N = {n}, PCA {dims} of {width}", problem(n, width, dims, units)
            found = {name: intervals.jackknife(compute(given)) for name, compute in CONTENDERS.items()}
            for name, one in found.items():
                for key, value in one.as_dict().items():
                    mine = found[OURS].as_dict()[key]
                    if not abs(value - mine) <= TOLERANCE * abs(found[OURS].value):
                        raise common.DifferentError(f"{case}: {name} says {key} {value!r}, archipel says {mine!r}")
            b.facts[f"interval at {case}"] = found[OURS].as_dict()
            calls = {name: lambda compute=compute, given=given: compute(given) for name, compute in CONTENDERS.items()}
            seconds = common.interleave(calls, rounds)
            for name in list(CONTENDERS)[1:]:
                b.rows.append(common.versus(case, name, seconds[OURS], seconds[name], aim=AIM))
    return b.record


if __name__ == "__main__":
    common.main(__doc__, run)
