"""Fine-to-coarse spherical k-means over content groups.

McAllister et al., Decentralized Diffusion Models, arXiv 2501.05450 (method.md 2.2, after MoDE): features -> many fine
centroids -> consolidation to K coarse centroids -> everything to its nearest coarse centroid. Two things are ours.
The points are content groups, each the mean direction of its clips, weighted by how many clips it has: k-means over
clips under the constraint that a group stays whole (exactly so where the clips of a group agree). And features
are centred on the training clips and scaled to unit length, so that "nearest" is by cosine, no cluster can draw
everything towards it by having a short centroid, and a feature with a large common offset does not hide the rest.

All arithmetic is float64 on one thread, so that the result does not depend on the machine's thread count.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from archipel.errors import ArchipelError

_FINE_INITS = 4
_COARSE_INITS = 20
MINIMUM = 2  # training clips that every cluster must have: an expert needs something to learn from and to compare


@dataclass(frozen=True)
class Groups:
    """Content groups of some clips, in order of first appearance.

    names: G group names; points: (G, D) float64, mean of the group's unit features, of unit length; clips: (G,) int64,
    how many clips each has; of_clip: (N,) int64, each clip's group.
    """

    names: list[str]
    points: np.ndarray
    clips: np.ndarray
    of_clip: np.ndarray


@dataclass(frozen=True)
class Centroids:
    """mean (D,), subtracted first; coarse (K, D) and fine (M, D) of unit length: all float32; fine_cluster (M,) int64."""

    mean: np.ndarray
    coarse: np.ndarray
    fine: np.ndarray
    fine_cluster: np.ndarray


def unit_rows(values: np.ndarray) -> np.ndarray:
    """Rows (N, D) scaled to unit length in float64; a row of zeros stays zeros."""
    rows = np.asarray(values, np.float64)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def project(features: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Raw features (N, D) -> points on the unit sphere around the training mean (D,), float64."""
    return unit_rows(np.asarray(features, np.float64) - np.asarray(mean, np.float64))


def gather(points: np.ndarray, names: Sequence[str]) -> Groups:
    """Clips' points (N, D) and their group names -> groups."""
    order: dict[str, int] = {}
    of_clip = np.array([order.setdefault(name, len(order)) for name in names], np.int64)
    sums = np.zeros((len(order), points.shape[1]))
    np.add.at(sums, of_clip, points)
    return Groups(list(order), unit_rows(sums), np.bincount(of_clip, minlength=len(order)).astype(np.int64), of_clip)


def distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Cosine distances 1 - <point, centroid>, (N, D) x (K, D) -> (N, K) float64 in [0, 2]."""
    # einsum without BLAS: a row's distance must not depend on how many rows are asked for at once.
    products = np.einsum("nd,kd->nk", np.asarray(points, np.float64), np.asarray(centroids, np.float64), optimize=False)
    return np.asarray(np.clip(1.0 - products, 0.0, 2.0))


@contextmanager
def one_thread() -> Iterator[None]:
    """BLAS and OpenMP (scikit-learn's k-means sums in thread order) on one thread for as long as the block runs."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):
        yield


def _lloyd(points: np.ndarray, weights: np.ndarray, k: int, seed: int, inits: int) -> np.ndarray:
    """Centroids (k, D) of unit length of weighted points on the sphere, by scikit-learn's Lloyd iterations."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than k: repaired after assignment
        model = KMeans(k, n_init=inits, random_state=seed).fit(points, sample_weight=weights)
    return unit_rows(model.cluster_centers_)


def fine_count(fine: int, k: int, groups: int) -> int:
    """Fine centroids used: what was asked for, at most a third of the training groups, at least k."""
    return min(groups, max(k, min(fine, groups // 3)))


def fit(groups: Groups, mean: np.ndarray, k: int, fine: int, seed: int) -> Centroids:
    """Centroids of training groups. Raises ArchipelError where there are fewer training groups than clusters."""
    if k > len(groups.names):
        raise ArchipelError(
            f"partition.k = {k} is larger than the number of content groups to train on, {len(groups.names)}: "
            f"a group stays whole, so at most {len(groups.names)} works"
        )
    first, second = (int(n) for n in np.random.default_rng([seed, 0x6B6D]).integers(2**31 - 1, size=2))
    weights = groups.clips.astype(np.float64)
    with one_thread():
        centres = _lloyd(groups.points, weights, fine_count(fine, k, len(groups.names)), first, _FINE_INITS)
        centres = centres.astype(np.float32)
        owner = distances(groups.points, centres).argmin(1)
        mass = np.bincount(owner, weights, len(centres))
        # A fine centroid that holds nothing (duplicate points) must not be a point of the coarse problem.
        held = mass > 0
        if k < len(centres) and int(held.sum()) >= k:
            coarse = _lloyd(centres[held].astype(np.float64), mass[held], k, second, _COARSE_INITS).astype(np.float32)
        else:
            coarse = centres[:k]
    return Centroids(np.asarray(mean, np.float32), coarse, centres, distances(centres, coarse).argmin(1))


def repair(
    assignment: np.ndarray, distance: np.ndarray, clips: np.ndarray, minimum: int = MINIMUM
) -> tuple[np.ndarray, int]:
    """Fill clusters of fewer than ``minimum`` training clips with the groups that lose least by moving there.

    assignment: (G,) cluster per training group; distance: (G, K); clips: (G,). A group moves only from a cluster that
    keeps ``minimum`` clips without it. Returns the new assignment and how many groups moved. Raises ArchipelError
    naming the sizes where whole groups cannot fill every cluster.
    """
    fixed, moved = assignment.copy(), 0
    sizes = np.bincount(fixed, clips, distance.shape[1])
    for cluster in np.argsort(sizes, kind="stable"):
        while sizes[cluster] < minimum:
            free = (fixed != cluster) & (sizes[fixed] - clips >= minimum)
            if not free.any():
                break
            loss = np.where(free, distance[:, cluster] - distance[np.arange(len(fixed)), fixed], np.inf)
            group = int(loss.argmin())
            sizes[fixed[group]] -= clips[group]
            sizes[cluster] += clips[group]
            fixed[group] = cluster
            moved += 1
    if sizes.min() < minimum:
        raise ArchipelError(
            f"clusters of {', '.join(str(int(n)) for n in sizes)} training clips: each needs at least {minimum}, "
            f"and content groups stay whole. Use a smaller partition.k (now {distance.shape[1]}), more clips, "
            "or partition.balanced = true"
        )
    return fixed, moved
