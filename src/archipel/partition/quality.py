"""What a partition is worth, in numbers: sizes, silhouette, stability over seeds, the share of the fine centroids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from archipel.manifest import SPLITS, Clip
from archipel.partition.kmeans import one_thread

RERUNS = 4
_SILHOUETTE_CLIPS = 3000  # the silhouette is quadratic in clips; beyond this an evenly spaced sample is taken


def sizes(clips: Sequence[Clip], cluster: np.ndarray, k: int) -> dict[str, dict[str, list[int]]]:
    """Clips and content groups of every cluster by split: {"clips": {"train": [K ints], ...}, "groups": {...}}."""
    found: dict[str, dict[str, list[int]]] = {"clips": {}, "groups": {}}
    for split in SPLITS:
        rows = [row for row, clip in enumerate(clips) if clip.split == split]
        owner = {clips[row].group: int(cluster[row]) for row in rows}
        found["clips"][split] = np.bincount(cluster[rows].astype(np.int64), minlength=k).tolist()
        found["groups"][split] = np.bincount(np.array(list(owner.values()), np.int64), minlength=k).tolist()
    return found


def spaced(count: int) -> np.ndarray:
    """The rows that a silhouette of ``count`` points is computed of: all, or an evenly spaced sample."""
    if count <= _SILHOUETTE_CLIPS:
        return np.arange(count)
    return np.linspace(0, count - 1, _SILHOUETTE_CLIPS).astype(np.int64)


def silhouette(points: np.ndarray, cluster: np.ndarray) -> float | None:
    """Mean cosine silhouette in [-1, 1] (Rousseeuw 1987) of points (N, D); None for one cluster or one point each."""
    from sklearn.metrics import silhouette_score

    chosen = spaced(len(points))
    points, cluster = points[chosen], cluster[chosen]
    if not 2 <= len(np.unique(cluster)) < len(points):
        return None
    with one_thread():
        return float(silhouette_score(points, cluster, metric="cosine"))


def stability(labels: np.ndarray, again: Callable[[int], np.ndarray], reruns: int = RERUNS) -> dict[str, Any]:
    """Agreement of ``labels`` (N,) with reruns from other seeds: adjusted Rand indices (Hubert and Arabie 1985).

    ``again(i)`` gives the labels of rerun i = 1, 2, ... 1 means the same partition, 0 what chance gives.
    """
    from sklearn.metrics import adjusted_rand_score

    indices = [float(adjusted_rand_score(labels, again(i))) for i in range(1, reruns + 1)]
    return {"adjusted_rand": indices, "mean": float(np.mean(indices)), "min": float(np.min(indices)), "reruns": reruns}
