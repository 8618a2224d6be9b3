"""The real clips' side of every measure: what depends on no arm is computed once and held against many arms.

Used by one run's evaluation (``measure``) and by a study's table (``archipel.study.scores``): one implementation, so that
a number of the one means what a number of the other means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from archipel.evaluation import copying, distances, intervals, probe
from archipel.evaluation.distances import GroupKernel, HalfPlan, HalfReference, Projection, UnitMoments
from archipel.evaluation.intervals import Interval
from archipel.partition.points import Table

HALVINGS = 8
UNITS = 24  # groups are packed into at most so many units for the Frechet jackknife
FLOOR_HALVINGS = 200
WHOLE_HALVINGS = 2  # in all dimensions every half costs a decomposition of its own
NEIGHBOURS = 5
CLIPS_PER_DIMENSION = 3
FITTED = 20_000  # real training clips that PCA and probe are fitted on
SHARES = ("share-nearer-train", "train-over-test", "precision", "recall", "coverage")


def fitted_rows(train: np.ndarray) -> np.ndarray:
    """What PCA and probe are fitted on: all training clips, beyond ``FITTED`` so many of them, evenly spaced."""
    if len(train) <= FITTED:
        return train
    return np.asarray(train[np.linspace(0, len(train) - 1, FITTED).astype(np.int64)])


def pca_dims(asked: int, clips: int) -> int:
    """Dimensions for Frechet distances: at most a third of the clips, so that half of them span the space.

    Beyond that the bias is no longer of order 1/n and its correction fails (measured: 24 clips in 32 dimensions gave
    0.00 where the truth was 0.96; in 8 dimensions 0.33 where it was 0.27).
    """
    return max(1, min(asked, clips // CLIPS_PER_DIMENSION))


def caption_passes(rows: np.ndarray) -> list[np.ndarray]:
    """Indices of the first, second, ... clip of every caption; only passes that are as long as the first.

    Frechet distances depend on N, so an estimate must hold one clip per caption, like the real clips it is held against.
    """
    seen: dict[int, int] = {}
    turn = np.empty(len(rows), np.int64)
    for index, row in enumerate(rows.tolist()):
        turn[index] = seen.get(row, 0)
        seen[row] = int(turn[index]) + 1
    found = [np.flatnonzero(turn == number) for number in range(int(turn.max()) + 1)]
    return [indices for indices in found if len(indices) == len(found[0])]


def half_plan(count: int, seed: int) -> tuple[np.ndarray, HalfPlan | None]:
    """The Frechet unit of each of ``count`` content groups (count,) int, and halves of the units (None below 4 units)."""
    unit = intervals.pack_units(count, UNITS, seed)
    units = int(unit.max()) + 1
    return unit, HalfPlan.make(units, HALVINGS, seed) if units >= 4 else None


class FrechetSide:
    """PCA of real training clips and the halves of the reference, with square roots, for one extractor.

    ``floor`` (1 + U,): FD of real clips (one per caption) to the other half of the reference: what no arm can beat.
    """

    def __init__(
        self,
        pca: Projection,
        unit: np.ndarray,
        plan: HalfPlan,
        reference: tuple[np.ndarray, np.ndarray],
        own: tuple[np.ndarray, np.ndarray],
    ) -> None:
        """unit (G,) of each content group; reference, own: features (n, D) and content groups (n,) of the real clips
        held against, and of those whose captions the arms use (one per caption)."""
        self.pca, self.unit = pca, unit
        self.units = int(unit.max()) + 1
        self._side = HalfReference(self._moments(*reference), plan)
        self.floor = self._side.distances(self._moments(*own))

    def _moments(self, features: np.ndarray, group: np.ndarray) -> UnitMoments:
        return UnitMoments.of(self.pca(features), self.unit[group], self.units)

    def distances(self, features: np.ndarray, group: np.ndarray, passes: Sequence[np.ndarray]) -> np.ndarray:
        """FD of an arm's clips (n, D) of content groups (n,), mean over passes through the captions: (1 + U,)."""
        parts = [self._side.distances(self._moments(features[one], group[one])) for one in passes]
        return np.asarray(np.mean(parts, axis=0))


class WholeFrechetSide:
    """Frechet distances in all dimensions over disjoint halves, for a score that is called FVD: no PCA, same-N floor.

    tr (A B)^1/2 of the covariances of centred rows X, Y is the sum of the singular values of X Y^T / sqrt((n-1)(m-1)), so
    that nothing of size (D, D) is made, and few clips cost little whatever D is.
    """

    def __init__(
        self,
        unit: np.ndarray,
        seed: int,
        reference: tuple[np.ndarray, np.ndarray],
        own: tuple[np.ndarray, np.ndarray],
    ) -> None:
        """unit, reference and own as for ``FrechetSide``; at least 4 units."""
        self._shift = np.asarray(reference[0], np.float64).mean(0)
        self._rows = np.asarray(reference[0], np.float64) - self._shift
        self._own_gram = self._rows @ self._rows.T
        self._unit, self._reference_unit = unit, unit[reference[1]]
        self._plan = HalfPlan.make(int(unit.max()) + 1, WHOLE_HALVINGS, seed)
        self.floor = self.distances(*own, [np.arange(len(own[0]))])

    def distances(self, features: np.ndarray, group: np.ndarray, passes: Sequence[np.ndarray]) -> np.ndarray:
        """FD of an arm's clips (n, D) of content groups (n,), mean over passes: (1 + U,); nan below two clips a half."""
        return np.asarray(np.mean([self._pass(features[one], self._unit[group[one]]) for one in passes], axis=0))

    def _pass(self, features: np.ndarray, unit: np.ndarray) -> np.ndarray:
        rows = np.asarray(features, np.float64) - self._shift
        squares, cross = rows @ rows.T, rows @ self._rows.T
        first, second = self._plan.first[..., unit], self._plan.second[..., self._reference_unit]
        found = [
            [_gram_frechet(squares, self._own_gram, cross, a, b) for a, b in zip(ones, others, strict=True)]
            for ones, others in zip(first, second, strict=True)
        ]
        return np.asarray(np.mean(found, axis=1))


def _gram_frechet(aa: np.ndarray, bb: np.ndarray, ab: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance (divisor n - 1) of the rows ``first`` and ``second`` (bool) from inner products of all rows."""
    n, m = int(first.sum()), int(second.sum())
    if min(n, m) < 2:
        return float("nan")
    one, two, cross = aa[np.ix_(first, first)], bb[np.ix_(second, second)], ab[np.ix_(first, second)]
    apart = one.mean() + two.mean() - 2 * cross.mean()
    spread = (np.trace(one) - n * one.mean()) / (n - 1) + (np.trace(two) - m * two.mean()) / (m - 1)
    centred = cross - cross.mean(0) - cross.mean(1)[:, None] + cross.mean()
    return float(apart + spread - 2 * np.linalg.svd(centred, compute_uv=False).sum() / ((n - 1) * (m - 1)) ** 0.5)


class KernelSide:
    """The reference's own kernel sums for one extractor."""

    def __init__(self, reference: np.ndarray, group: np.ndarray, groups: int) -> None:
        """reference (M, D) of content groups (M,) int in [0, groups)."""
        self.reference, self.group, self.groups = np.asarray(reference, np.float64), group, groups
        self._own = GroupKernel.of(self.reference, group, self.reference, group, groups)

    def distances(self, features: np.ndarray, group: np.ndarray) -> np.ndarray:
        """KID of an arm's clips (n, D) of content groups (n,), and without each group: (1 + G,)."""
        own = self._own
        return GroupKernel.of(
            features, group, self.reference, self.group, self.groups, other=(own.bb, own.n_b)
        ).estimate()

    def floor(self, seed: int) -> Interval | None:
        """KID between halves of the real clips; bounds: the spread over halvings. None below 4 groups."""
        if self.groups < 4:
            return None
        halves = distances.halves(self.groups, FLOOR_HALVINGS, seed)
        values = np.array([self._own.between(half, ~half) for half in halves])
        low, high = np.quantile(values, [(1 - intervals.LEVEL) / 2, (1 + intervals.LEVEL) / 2])
        return Interval(float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class Term:
    """A measure that is a mean over clips: values (n,), their content groups (n,), the rule in words, share or not."""

    values: np.ndarray
    group: np.ndarray
    rule: str
    share: bool = False


class CopyingSide:
    """What generated clips are held against to tell copying: the reference and training clips, for one extractor."""

    def __init__(
        self, reference: np.ndarray, group: np.ndarray, split: str, train: Table | None, *, k: int = NEIGHBOURS
    ) -> None:
        """reference (M, D) of content groups (M,); train (T, D), or None where the reference are training clips
        themselves: then nothing can be said about copying, and those terms are left out."""
        self.reference, self.group, self.split = np.asarray(reference, np.float64), group, split
        self.train = np.asarray(train, np.float64) if isinstance(train, np.ndarray) else train
        self.k = copying.neighbours(len(reference), k)
        if self.train is not None:
            own = group[:, None] == group[None]
            self._distance = copying.nearest(self.reference, self.train)
            self._ratio = copying.train_over_test(self.reference, self.train, self.reference, own, self._distance)

    def terms(self, features: np.ndarray, group: np.ndarray) -> dict[str, Term]:
        """All measures of an arm's clips (n, D) of content groups (n,), by name."""
        found: dict[str, tuple[np.ndarray, np.ndarray, str]] = {}
        same = group[:, None] == self.group[None]
        if self.train is not None:
            to_train = copying.nearest(features, self.train)
            found["nearest-train"] = (to_train, group, f"nearest of {len(self.train)} training clips")
            found["share-nearer-train"] = (
                copying.nearer_than(to_train, self._distance),
                group,
                "probability to be nearer to training clips than a real clip of the split",
            )
            found["train-over-test"] = (
                copying.nearer_than(
                    copying.train_over_test(features, self.train, self.reference, same, to_train), self._ratio
                ),
                group,
                "probability that nearest training over nearest real distance is below that of a real clip of the split",
            )
        if not same.all(1).any():
            if self.train is not None:
                to_test = copying.nearest(features, self.reference, same)
                found["nearest-test"] = (to_test, group, f"nearest real {self.split} clip of another group")
            cover = copying.coverage(self.reference, features, self.k, self.group, group)
            rule = f"k = {self.k}, pairs of different groups"
            found["precision"] = (cover.precision, group, rule)
            found["recall"] = (cover.recall, self.group, rule)
            found["density"] = (cover.density, group, rule)
            found["coverage"] = (cover.coverage, self.group, rule)
        return {name: Term(*term, share=name in SHARES) for name, term in found.items()}


class ProbeSide:
    """The text-video probe, fitted once on real training clips, and the pool of captions that it searches."""

    def __init__(
        self,
        train: np.ndarray,
        train_text: np.ndarray,
        train_groups: np.ndarray,
        own: np.ndarray,
        pool: np.ndarray,
        seed: int,
    ) -> None:
        """train (T, D), train_text (T, P), train_groups (T,); own (n,) int: each clip's caption in ``pool`` (Q, P).

        Raises ArchipelError below two content groups.
        """
        self.fitted = probe.fit(train, train_text, train_groups, seed)
        self.own, self.pool = own, pool

    def retrieve(self, features: np.ndarray, pick: np.ndarray | None = None) -> probe.Retrieval:
        """Retrieval of clips (n, D); ``pick``: their places among the captions, where they are not all."""
        return probe.retrieve(self.fitted, features, self.own if pick is None else self.own[pick], self.pool)


def withheld(real: probe.Retrieval) -> str:
    """Why the probe is not shown, in words; empty where it may be shown."""
    if probe.trusted(real):
        return ""
    return (
        f"retrieval@1 of real clips is {real.top1.mean():.1%}, under {probe.TIMES_CHANCE:g} times chance "
        f"({real.chance1:.1%}): the probe cannot tell captions apart and says nothing about generated clips"
    )
