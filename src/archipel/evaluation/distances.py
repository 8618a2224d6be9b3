"""Distances between two sets of clips, from features: Frechet, excess Frechet, and the unbiased kernel distance (KID).

Everything is float64 numpy. Frechet distances come from sums and outer products (never from a list of all frames) and
from symmetric eigen-decompositions, which need no matrix square root of a non-symmetric product.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from archipel.errors import ArchipelError

DIVISOR = "n-1"  # the divisor of covariances, named in the protocol of a score
DIVISORS = {"n-1": 1, "n": 0}  # "n" is for comparisons with programs that divide by it (cd-fvd, StyleGAN-V)

_COLUMNS = 128
WHOLE = 2048  # clips up to which kernels are summed over groups by products of matrices


# --- moments ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of outer products of feature rows; sets add and subtract.

    n: number of rows; total (d,) float64; outer (d, d) float64.
    """

    n: int
    total: np.ndarray
    outer: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Moments of rows (n, d) of any float dtype."""
        rows = np.asarray(features, np.float64)
        return cls(len(rows), rows.sum(0), rows.T @ rows)

    @classmethod
    def stream(cls, batches: Iterable[np.ndarray]) -> Moments:
        """Moments of batches (n_i, d), holding one batch and one (d, d) at a time.

        Raises ArchipelError where there is none.
        """
        n, total, outer = 0, np.empty(0), np.empty((0, 0))
        for batch in batches:
            rows = np.asarray(batch, np.float64)
            if not outer.size:
                total, outer = np.zeros(rows.shape[1]), np.zeros((rows.shape[1],) * 2)
            n += len(rows)
            total += rows.sum(0)
            for begin in range(0, len(outer), _COLUMNS):  # the product itself would be as large as the sum
                outer[:, begin : begin + _COLUMNS] += rows.T @ rows[:, begin : begin + _COLUMNS]
        if not outer.size:
            raise ArchipelError("moments of no features at all: at least one batch is needed")
        return cls(n, total, outer)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.n + other.n, self.total + other.total, self.outer + other.outer)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.n - other.n, self.total - other.total, self.outer - other.outer)

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.n

    @property
    def covariance(self) -> np.ndarray:
        """(d, d), divisor n - 1. Raises ArchipelError below two rows."""
        return self.covariance_over(DIVISOR)

    def covariance_over(self, divisor: str) -> np.ndarray:
        """(d, d) with the divisor "n-1" or "n". Raises ArchipelError below two rows or for another divisor."""
        if divisor not in DIVISORS:
            raise ArchipelError(f"{divisor!r} is not a divisor of a covariance: there are {', '.join(DIVISORS)}")
        if self.n < 2:
            raise ArchipelError(f"a covariance of {self.n} clip(s) does not exist: at least 2 are needed")
        return (self.outer - np.outer(self.total, self.total) / self.n) / (self.n - DIVISORS[divisor])


# --- Frechet ---------------------------------------------------------------------------------------------------------


def symmetric_sqrt(matrices: np.ndarray) -> np.ndarray:
    """Square roots of symmetric positive semi-definite matrices (..., d, d); rounding's negative eigenvalues become 0."""
    values, vectors = np.linalg.eigh(matrices)
    roots = np.sqrt(np.clip(values, 0, None))
    return np.asarray((vectors * roots[..., None, :]) @ np.swapaxes(vectors, -1, -2))


def frechet_gaussian(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray, *, root_b: np.ndarray | None = None
) -> np.ndarray:
    """Squared Frechet (2-Wasserstein) distance of Gaussians, |ma - mb|^2 + tr(A + B - 2 (B^1/2 A B^1/2)^1/2).

    means (..., d), covariances (..., d, d), any matching batch dimensions; returns (...). ``root_b`` = B^1/2 where the
    caller has it. Source: Dowson & Landau 1982, eq. 4; used for images by Heusel et al. 2017, eq. 6.
    """
    root = symmetric_sqrt(cov_b) if root_b is None else root_b
    middle = root @ cov_a @ root
    values = np.linalg.eigvalsh((middle + np.swapaxes(middle, -1, -2)) / 2)
    cross = np.sqrt(np.clip(values, 0, None)).sum(-1)
    trace = np.trace(cov_a, axis1=-2, axis2=-1) + np.trace(cov_b, axis1=-2, axis2=-1)
    return np.asarray(((mean_a - mean_b) ** 2).sum(-1) + trace - 2 * cross)


def frechet(a: Moments, b: Moments, divisor: str = DIVISOR) -> float:
    """Frechet distance of two sets of clips from their moments (covariance ``divisor`` "n-1" or "n").

    Biased upwards, the more so the fewer clips there are.
    """
    return float(frechet_gaussian(a.mean, a.covariance_over(divisor), b.mean, b.covariance_over(divisor)))


@dataclass(frozen=True)
class Projection:
    """A PCA fitted once on real training clips; ``explained`` is the share of their variance that it keeps."""

    mean: np.ndarray
    basis: np.ndarray
    explained: float
    asked: int

    @property
    def dims(self) -> int:
        return int(self.basis.shape[1])

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(n, D) -> (n, dims) float64: rotated and centred, not rescaled, so distances keep the features' units."""
        return np.asarray((np.asarray(features, np.float64) - self.mean) @ self.basis)


def fit_pca(train: np.ndarray, dims: int) -> Projection:
    """PCA of real training features (n, D), at most ``dims``, and at most what n clips support (n - 1, and D).

    Raises ArchipelError below 3 clips. The signs of components are fixed, so that equal data give equal bytes.
    """
    rows = np.asarray(train, np.float64)
    if len(rows) < 3:
        raise ArchipelError(
            f"a PCA needs at least 3 real training clips, there are {len(rows)}: take more clips (clips.count)"
        )
    mean = rows.mean(0)
    _, singular, rotation = np.linalg.svd(rows - mean, full_matrices=False)
    support = int((singular > singular[0] * 1e-10).sum()) if singular[0] > 0 else 1
    kept = max(1, min(dims, len(rows) - 1, rows.shape[1], support))
    basis = rotation[:kept].T
    basis = basis * np.where(basis[np.abs(basis).argmax(0), np.arange(kept)] < 0, -1.0, 1.0)
    power = singular**2
    return Projection(mean, basis, float(power[:kept].sum() / max(power.sum(), 1e-300)), dims)


# --- Frechet over halves of the content groups -----------------------------------------------------------------------


@dataclass(frozen=True)
class UnitMoments:
    """Moments per unit (a content group or a few of them): n (U,), total (U, d), outer (U, d, d), all float64."""

    n: np.ndarray
    total: np.ndarray
    outer: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, unit: np.ndarray, units: int) -> UnitMoments:
        """features (n, d), unit (n,) int in [0, units): the unit of each clip."""
        rows = np.asarray(features, np.float64)
        member = (np.asarray(unit)[None, :] == np.arange(units)[:, None]).astype(np.float64)
        outer = np.stack([(rows * weight[:, None]).T @ rows for weight in member])
        return cls(member.sum(1), member @ rows, outer)

    def pooled(self, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean (M, d) and covariance (M, d, d) of the units that each row of ``masks`` (M, U) names.

        Rows with fewer than two clips give nan.
        """
        weight = masks.astype(np.float64)
        n = weight @ self.n
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = (weight @ self.total) / n[:, None]
            outer = np.tensordot(weight, self.outer, 1)
            cov = (outer - n[:, None, None] * mean[:, :, None] * mean[:, None, :]) / (n - 1)[:, None, None]
        bad = n < 2
        mean[bad], cov[bad] = np.nan, np.nan
        return mean, cov


def halves(units: int, count: int, seed: int = 0) -> np.ndarray:
    """``count`` random halves of ``units`` as bool (count, units); sizes differ by at most one."""
    generator = np.random.Generator(np.random.PCG64([seed, units, count]))
    member = np.zeros((count, units), bool)
    for row in member:
        row[generator.permutation(units)[: units // 2]] = True
    return member


@dataclass(frozen=True)
class HalfPlan:
    """Which halves are compared with which: all pairs of (half of the arm, other half of the reference).

    first, second: bool (1 + U, P, U); row 0 is the full sample, row 1 + u leaves unit u out (for the jackknife).
    """

    first: np.ndarray
    second: np.ndarray

    @classmethod
    def make(cls, units: int, count: int, seed: int = 0) -> HalfPlan:
        """``count`` random halvings, each used in both directions."""
        half = halves(units, count, seed)
        one, other = np.concatenate([half, ~half]), np.concatenate([~half, half])
        keep = np.concatenate([np.ones((1, units), bool), ~np.eye(units, dtype=bool)])[:, None, :]
        return cls(one[None] & keep, other[None] & keep)


class HalfReference:
    """The reference's side of a plan, with its square roots computed once for all arms."""

    def __init__(self, reference: UnitMoments, plan: HalfPlan) -> None:
        self.plan = plan
        units = plan.first.shape[-1]
        self.mean, self.cov = reference.pooled(plan.second.reshape(-1, units))
        self.usable = np.isfinite(self.mean).all(1)
        self.root = np.full_like(self.cov, np.nan)
        self.root[self.usable] = symmetric_sqrt(self.cov[self.usable])

    def distances(self, arm: UnitMoments) -> np.ndarray:
        """Mean over the plan's halves of FD(arm's half, reference's other half): (1 + U,); row 0 is the estimate.

        nan where a half (or a half less one unit) holds fewer than two clips.
        """
        units = self.plan.first.shape[-1]
        mean, cov = arm.pooled(self.plan.first.reshape(-1, units))
        usable = self.usable & np.isfinite(mean).all(1)
        values = np.full(len(mean), np.nan)
        if usable.any():
            values[usable] = frechet_gaussian(
                mean[usable], cov[usable], self.mean[usable], self.cov[usable], root_b=self.root[usable]
            )
        return np.asarray(values.reshape(self.plan.first.shape[:2]).mean(1))


# --- KID -------------------------------------------------------------------------------------------------------------


def polynomial_kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(x.y / D + 1)^3 for rows of a (n, D) and b (m, D): (n, m). Source: Binkowski et al. 2018, section 4."""
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.asarray((first @ second.T / first.shape[1] + 1.0) ** 3)


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with the cubic kernel between independent sets (n, D) and (m, D).

    May be negative. Source: Gretton et al. 2012, eq. 3; Binkowski et al. 2018. Raises ArchipelError below two rows.
    """
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise ArchipelError(f"KID needs at least 2 clips a side, there are {n} and {m}")
    aa, bb, ab = polynomial_kernel(a, a), polynomial_kernel(b, b), polynomial_kernel(a, b)
    return float((aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1)) - 2 * ab.mean())


@dataclass(frozen=True)
class GroupKernel:
    """Kernel sums between content groups, from which KID and all its leave-one-group-out values are cheap.

    aa, bb, ab: (G, G) sums of the kernel over clips of group g (row) and h (column); n_a, n_b: (G,) clips per group.
    Only pairs of *different* groups are used: clips of one group (variants, repeated captions, a generated clip and
    the real clip of its caption) are dependent, and their pairs would bias the estimate.
    """

    aa: np.ndarray
    bb: np.ndarray
    ab: np.ndarray
    n_a: np.ndarray
    n_b: np.ndarray

    @classmethod
    def of(
        cls,
        a: np.ndarray,
        group_a: np.ndarray,
        b: np.ndarray,
        group_b: np.ndarray,
        groups: int,
        *,
        other: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> GroupKernel:
        """a (n, D), b (m, D) features; group_a (n,), group_b (m,) int in [0, groups).

        ``other``: bb and n_b where the caller has them from another arm held against the same b.
        """
        n_a, n_b = (np.bincount(group, minlength=groups).astype(np.float64) for group in (group_a, group_b))
        bb = other[0] if other is not None else _group_sums(polynomial_kernel(b, b), group_b, group_b, groups)
        aa = _group_sums(polynomial_kernel(a, a), group_a, group_a, groups)
        return cls(aa, bb, _group_sums(polynomial_kernel(a, b), group_a, group_b, groups), n_a, n_b)

    def estimate(self) -> np.ndarray:
        """KID (row 0) and KID without each group (row 1 + g): (1 + G,); nan where no pair of different groups is left."""
        terms = [
            _pair_means(self.aa, np.outer(self.n_a, self.n_a)),
            _pair_means(self.bb, np.outer(self.n_b, self.n_b)),
            _pair_means(self.ab, np.outer(self.n_a, self.n_b)),
        ]
        return np.asarray(terms[0] + terms[1] - 2 * terms[2])

    def between(self, first: np.ndarray, second: np.ndarray) -> float:
        """KID between a's groups ``first`` and b's groups ``second`` (bool (G,), disjoint): independent sets."""
        keep_a, keep_b = np.ix_(first, first), np.ix_(second, second)
        aa = _pair_means(self.aa[keep_a], np.outer(self.n_a[first], self.n_a[first]))[0]
        bb = _pair_means(self.bb[keep_b], np.outer(self.n_b[second], self.n_b[second]))[0]
        cross = np.ix_(first, second)
        ab = self.ab[cross].sum() / max(float(np.outer(self.n_a[first], self.n_b[second]).sum()), 1e-300)
        return float(aa + bb - 2 * ab)


def _group_sums(kernel: np.ndarray, rows: np.ndarray, columns: np.ndarray, groups: int) -> np.ndarray:
    """Sums (G, G) of a kernel (n, m) over rows of group g and columns of group h."""
    if max(*kernel.shape, groups) <= WHOLE:
        one, two = (
            (np.asarray(of)[None, :] == np.arange(groups)[:, None]).astype(np.float64) for of in (rows, columns)
        )
        return np.asarray(one @ kernel @ two.T)
    # The products grow with the cube of the clips; here every number is added once.
    found = np.zeros((groups, groups))
    held = np.zeros((groups, kernel.shape[1]))
    np.add.at(held, rows, kernel)
    np.add.at(found.T, columns, held.T)
    return found


def _pair_means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over pairs of different groups: of all groups (row 0), and without each group (row 1 + g)."""

    def off_diagonal(matrix: np.ndarray) -> np.ndarray:
        hollow = matrix - np.diag(np.diag(matrix))
        return np.concatenate([[hollow.sum()], hollow.sum() - hollow.sum(0) - hollow.sum(1)])

    with np.errstate(divide="ignore", invalid="ignore"):
        total, pairs = off_diagonal(sums), off_diagonal(counts)
        return np.where(pairs > 0.5, total / pairs, np.nan)
