"""The control that a semantic partition is held against: content groups dealt out at random."""

from __future__ import annotations

import heapq

import numpy as np

from archipel.manifest import SPLITS, Split


def deal(clips: np.ndarray, k: int, seed: int, split: Split = "train") -> np.ndarray:
    """Whole groups in random order, each to the cluster with fewest clips so far: clips (G,) -> (G,) int64 in [0, k).

    Sizes differ by at most the largest group. Splits are dealt apart, each with a stream of its own.
    """
    generator = np.random.default_rng([seed, 0x6374, SPLITS.index(split)])
    result = np.zeros(len(clips), np.int64)
    # How ties are broken matters in small splits: always the lowest number would favour cluster 0 in each of them.
    smallest = [(0, rank, cluster) for cluster, rank in enumerate(generator.permutation(k).tolist())]
    heapq.heapify(smallest)
    for group in generator.permutation(len(clips)).tolist():
        size, rank, cluster = smallest[0]
        result[group] = cluster
        heapq.heapreplace(smallest, (size + int(clips[group]), rank, cluster))
    return result
