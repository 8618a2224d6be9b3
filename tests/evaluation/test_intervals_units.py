from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from archipel.evaluation import intervals
from archipel.evaluation.intervals import Interval


@pytest.mark.parametrize("df", [1, 2, 3, 8, 23, 95, 200, 2000])
def test_student_quantile_is_scipys(df: int) -> None:
    assert intervals.student(df) == pytest.approx(scipy.stats.t.ppf(0.975, df), rel=4e-3 if df > 400 else 1e-6)


def test_jackknife_of_a_mean_is_the_textbook_interval() -> None:
    values = np.random.Generator(np.random.PCG64(1)).normal(size=25)
    found = intervals.mean_interval(values, np.arange(25))
    low, high = scipy.stats.t.interval(0.95, 24, values.mean(), scipy.stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), low, high))


def test_jackknife_correction_removes_the_bias_of_a_variance() -> None:
    values = np.random.Generator(np.random.PCG64(2)).normal(size=12)
    left = np.array([values.var(), *(np.delete(values, i).var() for i in range(12))])
    assert intervals.jackknife(left, correct=True).value == pytest.approx(values.var(ddof=1))
    assert intervals.jackknife(left).value == values.var()


@pytest.mark.parametrize("left", [[1.0], [1.0, 2.0], [1.0, 2.0, float("nan")]])
def test_too_few_units_have_unknown_bounds(left: list[float]) -> None:
    found = intervals.jackknife(np.array(left))
    assert found.value == 1.0
    assert np.isnan(found.low)
    assert np.isnan(found.high)


def test_share_never_has_width_zero_and_stays_in_range() -> None:
    groups = np.arange(12)
    for hits in (np.zeros(12), np.ones(12)):
        found = intervals.share_interval(hits, groups)
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.high - found.low > 0.1
    assert intervals.share_interval(np.ones(5), np.zeros(5)) == Interval(1.0, 0.0, 1.0)


def test_groups_are_numbered_in_common_and_packed_evenly() -> None:
    (a, b), count = intervals.number_groups(["x", "z", "x"], ["y", "z"])
    assert count == 3
    assert a.tolist() == [0, 2, 0]
    assert b.tolist() == [1, 2]
    unit = intervals.pack_units(50, 24)
    assert set(np.bincount(unit)) == {2, 3}
    assert sorted(intervals.pack_units(5, 24)) == [0, 1, 2, 3, 4]


def test_leave_out_means_keep_the_mean_where_a_group_has_no_clip() -> None:
    left = intervals.leave_out_means(np.array([1.0, 3.0]), np.array([0, 2]), 3)
    assert left.tolist() == [2.0, 3.0, 2.0, 1.0]


def test_numbers_are_written_short() -> None:
    assert str(Interval(0.01234, -0.5, 123.4)) == "0.0123 [-0.5, 123]"
    assert intervals.short(1.23456e-5) == "1.23e-05"
