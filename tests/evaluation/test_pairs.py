"""Leave-out values of two sets without content groups: equal to recomputation, and intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest

from archipel.evaluation import distances, intervals, pairs
from archipel.evaluation.distances import Moments


def draw(seed: int, n: int, d: int, shift: float = 0.0, mean: float = 3.0) -> np.ndarray:
    spread = np.arange(1, d + 1) ** -0.5
    return (np.random.Generator(np.random.PCG64(seed)).normal(size=(n, d)) * (1 + shift) + shift) * spread + mean


def fd(a: np.ndarray, b: np.ndarray) -> float:
    return distances.frechet(Moments.of(a), Moments.of(b))


@pytest.mark.parametrize(("n", "m", "d"), [(30, 25, 6), (10, 9, 60)])
def test_frechet_leave_out_values_are_those_of_the_remaining_clips(n: int, m: int, d: int) -> None:
    a, b = draw(1, n, d), draw(2, m, d, 0.4)
    values = pairs.frechet_left_out(a, b, units=n + m)  # so many units: every clip is its own
    assert len(values) == 1 + n + m
    assert values[0] == pytest.approx(fd(a, b), rel=1e-6)
    without_a = sorted(fd(np.delete(a, i, 0), b) for i in range(n))
    without_b = sorted(fd(a, np.delete(b, i, 0)) for i in range(m))
    np.testing.assert_allclose(np.sort(values[1 : 1 + n]), without_a, rtol=1e-6)
    np.testing.assert_allclose(np.sort(values[1 + n :]), without_b, rtol=1e-6)


def test_clips_are_packed_into_units_so_that_many_clips_stay_cheap() -> None:
    assert len(pairs.frechet_left_out(draw(1, 100, 3), draw(2, 90, 3))) == 1 + 2 * pairs.UNITS


def test_kid_leave_out_values_are_those_of_the_remaining_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_BLOCK", 4)  # several blocks
    a, b = draw(3, 11, 5), draw(4, 9, 5, 0.3)
    values = pairs.kid_left_out(a, b)
    assert values[0] == pytest.approx(distances.kid(a, b), rel=1e-9, abs=1e-12)
    expected = [distances.kid(np.delete(a, i, 0), b) for i in range(11)]
    expected += [distances.kid(a, np.delete(b, i, 0)) for i in range(9)]
    np.testing.assert_allclose(values[1:], expected, rtol=1e-9, atol=1e-12)


def test_too_few_clips_have_a_value_and_no_interval() -> None:
    a, b = draw(5, 2, 4), draw(6, 2, 4, 1)
    for values in (pairs.frechet_left_out(a, b), pairs.kid_left_out(a, b)):
        assert np.isfinite(values[0]) and np.isnan(values[1:]).all()
        assert np.isnan(intervals.jackknife(values).low)


@pytest.mark.parametrize(("n", "m"), [(60, 60), (80, 40)])
def test_an_interval_covers_what_sets_of_this_size_give_on_average(n: int, m: int) -> None:
    """FD is biased in N: its interval is one of FD at this N. KID's is one of the distance itself."""

    def two(number: int, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        return draw(2 * number, n, 24, mean=0), draw(2 * number + 1, m, 24, 0.3, mean=0)

    repeats = 400
    truth = np.mean([fd(*two(1000 + i, n, m)) for i in range(600)])
    kid = np.mean([distances.kid(*two(2000 + i, 300, 300)) for i in range(150)])
    hits = np.zeros(2)
    for i in range(repeats):
        bounds = [intervals.jackknife(f(*two(i, n, m))) for f in (pairs.frechet_left_out, pairs.kid_left_out)]
        hits += [one.low <= value <= one.high for one, value in zip(bounds, (truth, kid), strict=True)]
    assert (hits / repeats >= 0.89).all(), hits / repeats


def test_halves_are_disjoint_and_of_one_size() -> None:
    a = draw(7, 21, 4)
    floor, same, h = pairs.frechet_halves(a, a[:8] + 50, halvings=5)
    assert h == 8 and floor.shape == same.shape == (5,)
    assert (floor > 0).all()  # halves that overlapped wholly would be at 0
    assert (same > 1000).all() and floor.max() < 100
    again = pairs.frechet_halves(a, a[:8] + 50, halvings=5)
    np.testing.assert_array_equal(again[0], floor)
