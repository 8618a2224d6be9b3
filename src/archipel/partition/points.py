"""Clips' features and their points on the sphere, read a block at a time where they would not fit into memory.

Whatever is held and whatever is read anew, a row's numbers are the same to the last bit: sums run over rows in their order, and
no row's result depends on how many are asked for at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

BLOCK = 4096  # rows at a time
HELD = 256 << 20  # bytes of float64 points up to which they are held


class Table(Protocol):
    """Rows (N, D) that slices and integer arrays are taken of: an array, or rows of the cache."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


def blocks(count: int) -> Iterator[slice]:
    """[0, count) in pieces of at most ``BLOCK``."""
    for begin in range(0, count, BLOCK):
        yield slice(begin, min(begin + BLOCK, count))


def unit_rows(values: np.ndarray) -> np.ndarray:
    """Rows (N, D) scaled to unit length in float64; a row of zeros stays zeros."""
    rows = np.asarray(values, np.float64)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def project(features: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Raw features (N, D) -> points on the unit sphere around the training mean (D,), float64."""
    return unit_rows(np.asarray(features, np.float64) - np.asarray(mean, np.float64))


def total(table: Table, rows: np.ndarray, less: np.ndarray | None = None) -> np.ndarray:
    """Sum (D,) float64 of the rows, or of their squared differences to ``less`` (D,): bit for bit numpy's sum over axis 0."""
    found = np.zeros((1, table.shape[1]))
    for part in blocks(len(rows)):
        values = np.asarray(table[rows[part]], np.float64)
        values = values if less is None else np.square(values - less)
        # The sum so far is the first row: numpy adds rows one after the other. (0 + x is x, but for the sign of zero.)
        found = (np.concatenate([found, values]) if part.start else values).sum(0, keepdims=True)
    return np.asarray(found[0])


class Side:
    """Several features (N, D_i) side by side, times ``scale`` (sum of D_i,): (N, D) float64 by block."""

    def __init__(self, parts: Sequence[Table], scale: np.ndarray | None = None) -> None:
        self.parts, self.scale = parts, scale
        self.shape = (len(parts[0]), sum(part.shape[1] for part in parts))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        found = [np.asarray(part[rows], np.float64) for part in self.parts]
        joined = np.concatenate(found, 1) if len(found) > 1 else found[0]
        return joined if self.scale is None else np.asarray(joined * self.scale)


class Points:
    """Points (N, D) of raw features around ``mean`` (D,): held where they take at most ``HELD`` bytes."""

    def __init__(self, raw: Table, mean: np.ndarray) -> None:
        self._mean, self.shape = mean, (len(raw), raw.shape[1])
        self._raw: Table | None = raw
        self._held: np.ndarray | None = None
        if 8 * self.shape[0] * self.shape[1] <= HELD:
            held = np.empty(self.shape)
            for part in blocks(len(self)):
                held[part] = project(raw[part], mean)
            self._held, self._raw = held, None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        if self._held is not None:
            return np.asarray(self._held[rows])
        assert self._raw is not None
        return project(self._raw[rows], self._mean)


class GroupPoints:
    """Mean directions (G, D) of content groups, made from their clips' points whenever they are asked for."""

    def __init__(self, points: Table, rows: np.ndarray, of_clip: np.ndarray, clips: np.ndarray) -> None:
        """rows (N,) of ``points``, the group of each (N,), and how many each group has (G,)."""
        self._points, self.shape = points, (len(clips), points.shape[1])
        self._rows = rows[np.argsort(of_clip, kind="stable")]
        self._ends = np.cumsum(clips)
        self._clips = clips

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, groups: Any) -> np.ndarray:
        wanted = np.arange(len(self))[groups]
        found = np.empty((len(wanted), self.shape[1]))
        for part in blocks(len(wanted)):
            found[part] = self._block(wanted[part])
        return found

    def _block(self, wanted: np.ndarray) -> np.ndarray:
        counts = self._clips[wanted]
        owner = np.repeat(np.arange(len(wanted)), counts)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = self._rows[(self._ends[wanted] - counts)[owner] + within]
        sums = np.zeros((len(wanted), self.shape[1]))
        np.add.at(sums, owner, self._points[rows])
        return unit_rows(sums)
