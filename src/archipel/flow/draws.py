"""Random numbers as functions of what they are for: (seed, purpose, step, item), never of what was drawn before.

Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is a block cipher over a counter. The seed
and the purpose are its key; step and item stand in the two upper words of its counter, which drawing never reaches.
So any two streams are disjoint by construction, a batch's composition changes nobody's numbers, and resuming needs no
state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

# Purposes: streams of one seed that must not share numbers. Never renumber: runs would change. 2 and 3 are retired (time
# and dropout now come first in an item's NOISE stream).
NOISE = 1
ROUTE = 4
CHOICE = 5
PHASE = 6
TASK = 7
POOLED = 8

ROUTE_NOISES = 8  # fixed noises that p(k | c) is averaged over: the router's forwards per clip for "ancestral"


def generator(seed: int, purpose: int, step: int = 0, item: int = 0) -> np.random.Generator:
    """The stream of (seed, purpose, step, item): whole numbers in [0, 2^63). Raises ValueError outside."""
    words = (seed, purpose, step, item)
    if any(not 0 <= word < 2**63 for word in words):
        raise ValueError(f"seed, purpose, step and item must lie in [0, 2^63), got {words}")
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, 0, step, item], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normals(
    seed: int, items: Iterable[int], shape: Sequence[int], *, step: int = 0, purpose: int = NOISE
) -> np.ndarray:
    """Standard normals, float32 (B, *shape): row i depends on (seed, purpose, step, items[i]) and nothing else."""
    rows = [generator(seed, purpose, step, item).standard_normal(tuple(shape), dtype=np.float32) for item in items]
    return np.stack(rows) if rows else np.empty((0, *shape), np.float32)


def uniforms(seed: int, items: Iterable[int], *, step: int = 0, purpose: int = CHOICE) -> np.ndarray:
    """Uniforms in [0, 1), float64 (B,): row i depends on (seed, purpose, step, items[i]) and nothing else."""
    return np.array([generator(seed, purpose, step, item).random() for item in items], dtype=np.float64)


def clip_noise(seeds: Iterable[int], shape: Sequence[int]) -> np.ndarray:
    """The noise a clip starts from when generated, float32 (B, *shape): a function of each clip's own seed only."""
    rows = [normals(seed, [0], shape)[0] for seed in seeds]
    return np.stack(rows) if rows else np.empty((0, *shape), np.float32)
