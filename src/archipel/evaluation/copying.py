"""Copying and coverage: are generated clips new, and do they cover what the real clips cover?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from archipel.partition.points import Table

WHOLE = 1 << 24  # pairs whose distances are held at once (128 MB)
_ROWS = 16_384  # rows read at once where b is not held


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances between rows of a (n, D) and b (m, D): (n, m) float64."""
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    # A common shift keeps the expansion accurate where features have a large mean.
    shift = second.mean(0)
    first, second = first - shift, second - shift
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1)[None] - 2 * first @ second.T
    return np.asarray(np.sqrt(np.clip(squares, 0, None)))


class Chosen:
    """Rows (M,) of a table (N, D) that is not held in memory, for ``nearest``."""

    def __init__(self, table: Table, rows: np.ndarray) -> None:
        self._table, self._rows, self.shape = table, rows, (len(rows), table.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self._table[self._rows[rows]]


def nearest(a: np.ndarray, b: Table, hidden: np.ndarray | None = None) -> np.ndarray:
    """Distance of every row of a (n, D) to its nearest row of b (m, D): (n,); ``hidden`` (n, m) bool are passed over.

    Beyond ``WHOLE`` pairs b is read and compared by block, so that memory does not grow with it.
    """
    if isinstance(b, np.ndarray) and len(a) * len(b) <= WHOLE:
        return np.asarray(_shown(distances(a, b), hidden).min(1))
    found, step = np.full(len(a), np.inf), max(1, min(_ROWS, WHOLE // max(len(a), 1)))
    for begin in range(0, len(b), step):
        part = slice(begin, begin + step)
        table = _shown(distances(a, b[part]), None if hidden is None else hidden[:, part])
        np.minimum(found, table.min(1), out=found)
    return found


def _shown(table: np.ndarray, hidden: np.ndarray | None) -> np.ndarray:
    return table if hidden is None else np.where(hidden, np.inf, table)


def nearer_than(values: np.ndarray, real: np.ndarray) -> np.ndarray:
    """For every value (n,) the share of ``real`` (m,) that is larger, ties counting half: (n,) in [0, 1].

    With distances to the nearest training clip its mean is the probability that a generated clip is nearer to the
    training clips than an unseen real clip is (Mann & Whitney 1947): 0.5 where nothing was copied.
    """
    order = np.sort(real)
    below = np.searchsorted(order, values, "left")
    upto = np.searchsorted(order, values, "right")
    return np.asarray(1 - (below + upto) / 2 / len(order))


def train_over_test(
    a: np.ndarray,
    train: Table,
    test: np.ndarray,
    hidden: np.ndarray | None = None,
    to_train: np.ndarray | None = None,
) -> np.ndarray:
    """Distance to the nearest training clip over distance to the nearest test clip: (n,), 1 where there is no test clip.

    a (n, D), train (m, D), test (k, D); ``hidden`` (n, k) bool are passed over; to_train: ``nearest(a, train)`` where the caller
    has it. Held against the same ratio of unseen
    real clips (``nearer_than``) it separates copying from blur: a mean-like clip is near to everything, hence nearer to
    training clips than real clips are, but nearer to test clips as well. The idea is that of the three-sample test of
    Meehan et al. 2020 (generated, training, test). Test clips beyond the number of training clips are left out, evenly:
    with more of them than training clips, blur would pass for copying. An arm that has collapsed to few clips gives few
    independent ratios: read it beside coverage.
    """
    if len(test) > len(train):
        kept = np.linspace(0, len(test) - 1, len(train)).round().astype(np.int64)
        test, hidden = test[kept], None if hidden is None else hidden[:, kept]
    to_train = nearest(a, train) if to_train is None else to_train
    to_test = nearest(a, test, hidden)
    return np.where(np.isfinite(to_test), to_train / np.maximum(to_test, 1e-12), 1.0)


@dataclass(frozen=True)
class Coverage:
    """Per-clip terms; their means are the four numbers.

    precision, density: (n,) one per generated clip; recall, coverage: (m,) one per real clip.
    """

    precision: np.ndarray
    density: np.ndarray
    recall: np.ndarray
    coverage: np.ndarray


def neighbours(n: int, asked: int = 5) -> int:
    """k of the k-NN balls: ``asked``, less where there are fewer clips."""
    return max(1, min(asked, n - 1))


def coverage(
    real: np.ndarray,
    generated: np.ndarray,
    k: int,
    group_real: np.ndarray | None = None,
    group_generated: np.ndarray | None = None,
) -> Coverage:
    """Precision and recall (Kynkaanniemi et al. 2019, eq. 2), density and coverage (Naeem et al. 2020, eq. 4 and 6).

    real (m, D), generated (n, D). With groups (ints, one numbering), pairs of one content group are not looked at:
    neither for the balls' radii nor for membership, so that the real clips themselves can be scored by the same rule.
    """
    m, n = len(real), len(generated)
    rows = np.arange(m) if group_real is None else np.asarray(group_real)
    columns = np.arange(n) if group_generated is None else np.asarray(group_generated)
    rr, gg, rg = distances(real, real), distances(generated, generated), distances(real, generated)
    rr[rows[:, None] == rows[None]] = np.inf
    gg[columns[:, None] == columns[None]] = np.inf
    if group_real is not None and group_generated is not None:
        rg[rows[:, None] == columns[None]] = np.inf
    radius_real, radius_generated = _kth(rr, k), _kth(gg, k)
    inside_real: np.ndarray = rg < radius_real[:, None]  # generated j lies in real i's ball
    inside_generated: np.ndarray = rg < radius_generated[None]  # real i lies in generated j's ball
    return Coverage(
        precision=np.any(inside_real, 0).astype(np.float64),
        density=inside_real.sum(0) / k,
        recall=np.any(inside_generated, 1).astype(np.float64),
        coverage=np.any(inside_real, 1).astype(np.float64),
    )


def _kth(table: np.ndarray, k: int) -> np.ndarray:
    """Distance to the k-th nearest row, or to the farthest finite one where there are fewer than k."""
    ordered = np.sort(table, 1)
    finite = np.isfinite(ordered).sum(1)
    pick = np.clip(np.minimum(k, finite) - 1, 0, None)
    radius = ordered[np.arange(len(ordered)), pick]
    return np.where(finite > 0, radius, 0.0)
