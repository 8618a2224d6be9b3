"""Balanced assignment: whole content groups to clusters of bounded size."""

from __future__ import annotations

import numpy as np

from archipel.partition.kmeans import SAMPLE, Centroids, Groups, closest, distances
from archipel.partition.points import blocks, unit_rows

_ROUNDS = 20
_STEPS, _STEP, _COOLING = 2000, 0.05, 0.998


def capacity(clips: np.ndarray, k: int) -> int:
    """Clips at which a cluster is full: the equal share ceil(N / k). Only whole groups are added below it, so that no
    cluster holds more than ``capacity - 1 + max(clips)`` clips."""
    return -(-int(clips.sum()) // k)


def assign(distance: np.ndarray, clips: np.ndarray) -> np.ndarray:
    """Groups to clusters by regret: distance (G, K), clips (G,) -> (G,) int64.

    The group that would lose most by going to its second choice is placed first; a full cluster takes no more and the
    regrets are recomputed. Some cluster is below its share as long as a group is left, so every group finds a place.
    """
    count, k = distance.shape
    full = capacity(clips, k)
    sizes = np.zeros(k, np.int64)
    result = np.full(count, -1, np.int64)
    left = np.arange(count)
    while len(left):
        costs = np.where(sizes < full, distance[left], np.inf)
        best = costs.argmin(1)
        ranked = np.partition(costs, 1, axis=1) if k > 1 else np.concatenate([costs, costs + np.inf], 1)
        with np.errstate(invalid="ignore"):
            regret = ranked[:, 1] - ranked[:, 0]
        for place in np.argsort(-regret, kind="stable"):
            cluster = best[place]
            if sizes[cluster] >= full:
                break  # it filled up while placing: the regrets of who wanted it have changed
            result[left[place]] = cluster
            sizes[cluster] += clips[left[place]]
        left = left[result[left] < 0]
    return result


def refine(groups: Groups, centroids: Centroids) -> tuple[Centroids, np.ndarray]:
    """Alternate balanced assignment and centroids until nothing moves: centroids, and cluster (G,) of every group."""
    coarse, before = centroids.coarse, None
    for _ in range(_ROUNDS):
        assignment = assign(distances(groups.points, coarse), groups.clips)
        if before is not None and np.array_equal(assignment, before):
            break
        coarse, before = means(groups, assignment, coarse), assignment
    else:
        assignment = assign(distances(groups.points, coarse), groups.clips)
    return Centroids(centroids.mean, coarse, centroids.fine, closest(centroids.fine, coarse)), assignment


def offsets(distance: np.ndarray, clips: np.ndarray) -> np.ndarray:
    """What to add to distances (G, K) so that the nearest centroid fills clusters evenly: (K,) float32, smallest 0.

    The prices of the transport problem that ``assign`` solves greedily, by subgradient steps (Bertsekas 1988): clips that
    nothing was fitted on are placed by the same rule as those that were, instead of by distance alone. For clips (G,).
    Beyond ``SAMPLE`` groups as many, evenly spaced, stand for all.
    """
    if len(clips) > SAMPLE:
        chosen = np.linspace(0, len(clips) - 1, SAMPLE).astype(np.int64)
        distance, clips = distance[chosen], clips[chosen]
    shares = clips / clips.sum()
    price = best = np.zeros(distance.shape[1])
    worst = np.inf
    for number in range(_STEPS):
        excess = np.bincount((distance + price).argmin(1), shares, len(price)) - 1 / len(price)
        if np.abs(excess).max() < worst:
            worst, best = float(np.abs(excess).max()), price
        price = price + _STEP * _COOLING**number * len(price) * excess
    return np.asarray(best - best.min(), np.float32)


def means(groups: Groups, assignment: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """Unit mean directions (K, D) float32 of assigned groups; a cluster without any keeps its ``fallback`` row."""
    sums = np.zeros(fallback.shape)
    for part in blocks(len(assignment)):
        np.add.at(sums, assignment[part], groups.points[part] * groups.clips[part, None])
    empty = np.linalg.norm(sums, axis=1) < 1e-12
    return np.where(empty[:, None], fallback, unit_rows(sums)).astype(np.float32)
