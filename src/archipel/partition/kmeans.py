"""Fine-to-coarse spherical k-means over content groups.

McAllister et al., Decentralized Diffusion Models, arXiv 2501.05450 (method.md 2.2, after MoDE): features -> many fine
centroids -> consolidation to K coarse centroids -> everything to its nearest coarse centroid. Two things are ours.
The points are content groups, each the mean direction of its clips, weighted by how many clips it has: k-means over
clips under the constraint that a group stays whole (exactly so where the clips of a group agree). And features
are centred on the training clips and scaled to unit length, so that "nearest" is by cosine, no cluster can draw
everything towards it by having a short centroid, and a feature with a large common offset does not hide the rest.

All arithmetic is float64 on one thread, so that the result does not depend on the machine's thread count. What does not fit
into memory is read by block (``points``); of very many groups a sample is fitted on (``sample``), and all are assigned.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from archipel.errors import ArchipelError
from archipel.partition.points import HELD, GroupPoints, Table, blocks, project, unit_rows

__all__ = ["Centroids", "Groups", "closest", "distances", "fit", "gather", "project", "repair", "unit_rows"]

_FINE_INITS = 4
_COARSE_INITS = 20
SAMPLE = 20_000  # content groups up to which all are fitted on
_PER_CENTROID = (
    256  # as faiss's Clustering (max_points_per_centroid): more move a mean by less than its neighbours lie apart
)
MINIMUM = 2  # training clips that every cluster must have: an expert needs something to learn from and to compare


@dataclass(frozen=True)
class Groups:
    """Content groups of some clips, in order of first appearance.

    names: G group names; points: (G, D) float64, mean of the group's unit features, of unit length, held or made by block;
    clips: (G,) int64, how many clips each has; of_clip: (N,) int64, each clip's group.
    """

    names: list[str]
    points: Table
    clips: np.ndarray
    of_clip: np.ndarray


@dataclass(frozen=True)
class Centroids:
    """mean (D,), subtracted first; coarse (K, D) and fine (M, D) of unit length: all float32; fine_cluster (M,) int64."""

    mean: np.ndarray
    coarse: np.ndarray
    fine: np.ndarray
    fine_cluster: np.ndarray


def gather(points: Table, names: Sequence[str], rows: np.ndarray | None = None) -> Groups:
    """Clips' points (N, D), or the ``rows`` of them, and their group names -> groups."""
    order: dict[str, int] = {}
    of_clip = np.array([order.setdefault(name, len(order)) for name in names], np.int64)
    clips = np.bincount(of_clip, minlength=len(order)).astype(np.int64)
    rows = np.arange(len(points)) if rows is None else rows
    if 8 * len(order) * points.shape[1] > HELD:
        return Groups(list(order), GroupPoints(points, rows, of_clip, clips), clips, of_clip)
    sums = np.zeros((len(order), points.shape[1]))
    for part in blocks(len(rows)):
        np.add.at(sums, of_clip[part], points[rows[part]])
    return Groups(list(order), unit_rows(sums), clips, of_clip)


def distances(points: Table, centroids: np.ndarray) -> np.ndarray:
    """Cosine distances 1 - <point, centroid>, (N, D) x (K, D) -> (N, K) float64 in [0, 2]."""
    found = np.empty((len(points), len(centroids)))
    for part in blocks(len(points)):
        found[part] = _distances(points[part], centroids)
    return found


def closest(points: Table, centroids: np.ndarray) -> np.ndarray:
    """The nearest centroid (N,) int64 of every point: ``distances(...).argmin(1)``, of which a block is held at a time."""
    found = np.empty(len(points), np.int64)
    for part in blocks(len(points)):
        found[part] = _distances(points[part], centroids).argmin(1)
    return found


def _distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
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


def sample(groups: int, fine: int, seed: int) -> slice | np.ndarray:
    """Groups that centroids are fitted on: all of them up to ``SAMPLE`` (or ``_PER_CENTROID`` for each fine centroid, where
    that is more), beyond that so many, drawn by seed, in order."""
    most = max(SAMPLE, _PER_CENTROID * fine)
    if groups <= most:
        return slice(None)
    return np.sort(np.random.default_rng([seed, 0x736D]).permutation(groups)[:most])


def fit(groups: Groups, mean: np.ndarray, k: int, fine: int, seed: int) -> Centroids:
    """Centroids of training groups. Raises ArchipelError where there are fewer training groups than clusters."""
    if k > len(groups.names):
        raise ArchipelError(
            f"partition.k = {k} is larger than the number of content groups to train on, {len(groups.names)}: "
            f"a group stays whole, so at most {len(groups.names)} works"
        )
    first, second = (int(n) for n in np.random.default_rng([seed, 0x6B6D]).integers(2**31 - 1, size=2))
    count = fine_count(fine, k, len(groups.names))
    chosen = sample(len(groups.names), count, seed)
    points, weights = groups.points[chosen], groups.clips[chosen].astype(np.float64)
    with one_thread():
        centres = _lloyd(points, weights, count, first, _FINE_INITS)
        centres = centres.astype(np.float32)
        owner = closest(points, centres)
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
