"""Do 95 % intervals hold the truth about 95 times in 100? On Gaussians whose distance is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from archipel.evaluation import distances, intervals
from archipel.evaluation.distances import GroupKernel, HalfPlan, HalfReference, UnitMoments

REPEATS = 200
NOMINAL = (0.89, 1.0)  # 0.95 less four standard errors of 200 repeats


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def covered(hits: list[bool]) -> bool:
    return NOMINAL[0] <= float(np.mean(hits)) <= NOMINAL[1]


def half_distances(sets: list[np.ndarray], unit: np.ndarray, plan: HalfPlan, units: int) -> list[np.ndarray]:
    """Leave-out distances of every set to the first (the first: its floor)."""
    moments = [UnitMoments.of(one, unit, units) for one in sets]
    side = HalfReference(moments[0], plan)
    return [side.distances(one) for one in moments]


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.6, 1.0), (0.0, 0.6), (0.5, 1.3)])
def test_excess_frechet_covers_the_true_distance(shift: float, scale: float) -> None:
    clips, dims, units = 60, 5, 15
    spread = np.linspace(1, 0.4, dims)
    truth = shift**2 + (((1 - scale) * spread) ** 2).sum()
    unit, plan = intervals.pack_units(clips, units), HalfPlan.make(units, 4)
    hits, values = [], []
    for seed in range(REPEATS):
        draw = generator(seed)
        real = draw.normal(size=(clips, dims)) * spread
        arm = draw.normal(size=(clips, dims)) * spread * scale
        arm[:, 0] += shift
        floor, raw = half_distances([real, arm], unit, plan, units)
        found = intervals.jackknife(raw - floor, correct=True)
        hits.append(found.low <= truth <= found.high)
        values.append(found.value)
    assert covered(hits), np.mean(hits)
    standard_error = np.std(values) / REPEATS**0.5
    assert abs(np.mean(values) - truth) < 0.05 * truth + 4 * standard_error


@pytest.mark.slow
def test_paired_difference_of_excess_frechet_covers() -> None:
    clips, dims, units = 60, 4, 15
    unit, plan = intervals.pack_units(clips, units), HalfPlan.make(units, 4)
    truth = 0.5**2 - 0.9**2
    hits, apart = [], []
    for seed in range(REPEATS):
        draw = generator(1000 + seed)
        real = draw.normal(size=(clips, dims))
        common = draw.normal(size=(clips, dims))  # both arms start from the same noise
        one, two = (0.8 * common + 0.6 * draw.normal(size=(clips, dims)) for _ in range(2))
        one[:, 0] += 0.5
        two[:, 0] += 0.9
        _, a, b = half_distances([real, one, two], unit, plan, units)
        found = intervals.difference(a, b, correct=True)
        hits.append(found.low <= truth <= found.high)
        apart.append((found.high - found.low) / np.ptp(_bounds(a, b)))
    assert covered(hits), np.mean(hits)
    assert np.mean(apart) < 0.85  # pairing is worth having


def _bounds(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    one, two = intervals.jackknife(a, correct=True), intervals.jackknife(b, correct=True)
    return one.low - two.high, one.high - two.low


def expected_kernel(d: int, m: np.ndarray, n: np.ndarray) -> float:
    """E (x.y/d + 1)^3 for independent x ~ N(m, I), y ~ N(n, I)."""
    dot, mm, nn = float(m @ n), float(m @ m), float(n @ n)
    first, second = dot, dot**2 + mm + nn + d
    third = dot**3 + 3 * dot * mm + 3 * dot * (nn + d + 2)
    return third / d**3 + 3 * second / d**2 + 3 * first / d + 1


@pytest.mark.parametrize("shift", [0.0, 0.25, 0.6])
def test_kid_covers_its_closed_form(shift: float) -> None:
    d, clips = 6, 60
    zero, mean = np.zeros(d), np.full(d, shift)
    truth = expected_kernel(d, zero, zero) + expected_kernel(d, mean, mean) - 2 * expected_kernel(d, zero, mean)
    hits, values = [], []
    for seed in range(REPEATS):
        draw = generator(2000 + seed)
        real, arm = draw.normal(size=(clips, d)), draw.normal(size=(clips, d)) + shift
        groups = np.arange(clips)
        left = GroupKernel.of(arm, groups, real, groups, clips).estimate()
        found = intervals.jackknife(left)
        hits.append(found.low <= truth <= found.high)
        values.append(found.value)
    assert covered(hits), np.mean(hits)
    assert abs(np.mean(values) - truth) < 4 * np.std(values) / REPEATS**0.5


def test_mean_over_dependent_clips_covers_only_with_groups() -> None:
    hits, naive = [], []
    for seed in range(REPEATS):
        draw = generator(3000 + seed)
        groups = np.repeat(np.arange(20), 6)
        values = draw.normal(size=20)[groups] + 0.2 * draw.normal(size=120)
        found, alone = intervals.mean_interval(values, groups), intervals.mean_interval(values, np.arange(120))
        hits.append(found.low <= 0 <= found.high)
        naive.append(alone.low <= 0 <= alone.high)
    assert covered(hits), np.mean(hits)
    assert np.mean(naive) < 0.7


@pytest.mark.parametrize("share", [0.03, 0.3])
def test_shares_cover(share: float) -> None:
    hits = []
    for seed in range(REPEATS):
        draw = generator(4000 + seed)
        groups = np.arange(80) // 2
        found = intervals.share_interval((draw.random(80) < share).astype(float), groups)
        hits.append(found.low <= share <= found.high)
    assert covered(hits), np.mean(hits)


def test_ratio_covers_and_is_refused_where_the_denominator_reaches_zero() -> None:
    hits = []
    groups = np.arange(50)
    for seed in range(REPEATS):
        draw = generator(5000 + seed)
        base = draw.normal(size=50)
        a = intervals.leave_out_means(1.0 + 0.3 * base + 0.2 * draw.normal(size=50), groups, 50)
        b = intervals.leave_out_means(2.0 + 0.5 * base, groups, 50)
        found = intervals.ratio(a, b)
        assert found is not None
        hits.append(found.low <= 0.5 <= found.high)
    assert covered(hits), np.mean(hits)
    near_zero = intervals.leave_out_means(base, groups, 50)
    assert intervals.ratio(a, near_zero) is None


# --- why these and not others ----------------------------------------------------------------------------------------


def test_excess_is_unbiased_where_raw_frechet_is_not() -> None:
    clips, dims, units = 48, 8, 12
    unit, plan = intervals.pack_units(clips, units), HalfPlan.make(units, 4)
    raw, excess = [], []
    for seed in range(40):
        draw = generator(6000 + seed)
        real, arm = draw.normal(size=(2, clips, dims))
        floor, value = half_distances([real, arm], unit, plan, units)
        raw.append(value[0])
        excess.append(intervals.jackknife(value - floor, correct=True).value)
    assert np.mean(raw) > 1.0  # the truth is 0
    assert abs(np.mean(excess)) < 4 * np.std(excess) / 40**0.5
    assert abs(np.mean(excess)) < 0.25


def test_the_correction_finds_an_arm_of_too_little_variance_that_plain_excess_hides() -> None:
    clips, dims, units = 60, 16, 20
    unit, plan = intervals.pack_units(clips, units), HalfPlan.make(units, 4)
    truth = dims * 0.3**2
    plain, corrected = [], []
    for seed in range(12):
        draw = generator(7000 + seed)
        real, arm = draw.normal(size=(2, clips, dims))
        floor, value = half_distances([real, 0.7 * arm], unit, plan, units)
        plain.append(float((value - floor)[0]))
        corrected.append(intervals.jackknife(value - floor, correct=True).value)
    assert np.mean(plain) < 0.3 * truth
    assert abs(np.mean(corrected) - truth) < 0.35 * truth


def test_a_percentile_bootstrap_of_frechet_excludes_its_own_estimate_and_the_jackknife_does_not() -> None:
    draw = generator(8000)
    real, arm = draw.normal(size=(2, 60, 12))
    moments = distances.Moments.of
    estimate = distances.frechet(moments(arm), moments(real))
    again = [
        distances.frechet(moments(arm[draw.integers(60, size=60)]), moments(real[draw.integers(60, size=60)]))
        for _ in range(200)
    ]
    assert np.quantile(again, 0.025) > estimate
    left = [estimate] + [
        distances.frechet(moments(np.delete(arm, i, 0)), moments(np.delete(real, i, 0))) for i in range(60)
    ]
    found = intervals.jackknife(np.array(left))
    assert found.low < estimate == found.value < found.high
