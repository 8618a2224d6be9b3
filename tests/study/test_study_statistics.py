"""Do intervals over content groups and seeds hold the truth? And is one seed what an evaluation says today?"""

from __future__ import annotations

import numpy as np
import pytest

from archipel.errors import ArchipelError
from archipel.evaluation import intervals
from archipel.evaluation.distances import GroupKernel, HalfPlan, HalfReference, UnitMoments
from archipel.study import statistics
from archipel.study.statistics import Estimate

GROUPS, REPEATS = 60, 200
LEAST = {2: 0.82, 3: 0.86, 5: 0.9}  # of 95 % intervals by number of seeds: two are too few, and said to be


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def covered(hits: list[bool], least: float = LEAST[5]) -> bool:
    return least <= float(np.mean(hits)) <= 1.0


def crossed(
    draw: np.random.Generator, seeds: int, mean: float, *, by_seed: float, by_group: np.ndarray, noise: float
) -> np.ndarray:
    """Leave-out means of values mean + a_s + b_g + c_sg: (seeds, 1 + GROUPS)."""
    effect = by_seed * draw.normal(size=seeds)
    table = mean + effect[:, None] + by_group[None] + noise * draw.normal(size=(seeds, len(by_group)))
    return np.stack([statistics.leave_out(row, np.arange(len(by_group))) for row in table])


def expected_kernel(d: int, m: np.ndarray, n: np.ndarray, v: float, w: float) -> float:
    """E (x.y/d + 1)^3 for independent x ~ N(m, v I), y ~ N(n, w I)."""
    dot, mm, nn = float(m @ n), float(m @ m), float(n @ n)
    second = dot**2 + w * mm + v * nn + d * v * w
    third = dot**3 + 3 * dot * (w * mm + v * nn + (d + 2) * v * w)
    return third / d**3 + 3 * second / d**2 + 3 * dot / d + 1


def true_kid(d: int, mean: np.ndarray, extra: float, at: float) -> float:
    """KID of N(mean, (1 + extra) I), of which ``extra`` is common to a seed's clips, to N(at, I).

    ``extra`` enters the cross term only: pairs of one seed's clips share the seed's shift, which is part of that seed's
    model. The mean over seeds of KID(model_s, real) is E over shifts: aa = E k(x, y | same shift).
    """
    zero = np.full(d, at)
    draw = generator(99)
    shifts = mean + extra**0.5 * draw.normal(size=(4000, d))
    own = np.mean([expected_kernel(d, one, one, 1.0, 1.0) for one in shifts])
    cross = np.mean([expected_kernel(d, one, zero, 1.0, 1.0) for one in shifts])
    return float(own + expected_kernel(d, zero, zero, 1.0, 1.0) - 2 * cross)


def kid_estimate(
    draw: np.random.Generator, real: np.ndarray, seeds: int, mean: np.ndarray, extra: float, common: np.ndarray
) -> Estimate:
    """KID of an arm over seeds: every seed's model lies elsewhere, clips of one group are alike over seeds."""
    groups = np.arange(len(real))
    rows = []
    for _ in range(seeds):
        shift = mean + extra**0.5 * draw.normal(size=real.shape[1])
        clips = shift + 0.7 * common + 0.51**0.5 * draw.normal(size=real.shape)
        rows.append(GroupKernel.of(clips, groups, real, groups, len(real)).estimate())
    return Estimate(np.stack(rows), tuple(range(seeds)))


def test_kid_its_difference_and_its_ratio_cover_the_truth_over_groups_and_seeds() -> None:
    d, seeds, extra = 4, 5, 0.03
    near, far = np.full(d, 1.0), np.full(d, 1.3)
    truth = [true_kid(d, mean, extra, 0.0) for mean in (near, far)]
    hits: dict[str, list[bool]] = {"kid": [], "difference": [], "ratio": [], "groups only": []}
    for seed in range(120):
        draw = generator(seed)
        real, common = draw.normal(size=(2, GROUPS, d))
        one, two = (kid_estimate(draw, real, seeds, mean, extra, common) for mean in (near, far))
        found = statistics.mean_interval(one)
        hits["kid"].append(found.low <= truth[0] <= found.high)
        gap = statistics.difference(one, two)
        hits["difference"].append(gap.low <= truth[0] - truth[1] <= gap.high)
        blind = intervals.difference(one.left.mean(0), two.left.mean(0))
        hits["groups only"].append(blind.low <= truth[0] - truth[1] <= blind.high)
        quotient = statistics.ratio(two, one)
        if quotient is not None:
            hits["ratio"].append(quotient.low <= truth[1] / truth[0] <= quotient.high)
    assert len(hits["ratio"]) > 110
    for name in ("kid", "difference", "ratio"):
        assert covered(hits[name]), (name, np.mean(hits[name]))
    assert (
        np.mean(hits["groups only"]) < np.mean(hits["difference"]) - 0.05
    )  # an interval that is blind to seeds misleads


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("by_seed", "noise"), [(0.0, 1.0), (0.3, 0.3), (1.0, 0.0)])
def test_means_differences_and_ratios_cover_for_any_mix_of_effects(seeds: int, by_seed: float, noise: float) -> None:
    hits: dict[str, list[bool]] = {"mean": [], "difference": [], "ratio": []}
    for seed in range(REPEATS):
        draw = generator(1000 + seed)
        group = draw.normal(size=GROUPS)
        names = tuple(range(seeds))
        one = Estimate(crossed(draw, seeds, 10.0, by_seed=by_seed, by_group=group, noise=noise), names)
        two = Estimate(crossed(draw, seeds, 5.0, by_seed=by_seed, by_group=0.5 * group, noise=noise), names)
        found = statistics.mean_interval(one)
        hits["mean"].append(found.low <= 10 <= found.high)
        gap = statistics.difference(one, two)
        hits["difference"].append(gap.low <= 5 <= gap.high)
        quotient = statistics.ratio(one, two)
        if quotient is not None:
            hits["ratio"].append(quotient.low <= 2 <= quotient.high)
    for name, found_hits in hits.items():
        assert len(found_hits) > 0.4 * REPEATS, name
        assert covered(found_hits, LEAST[seeds]), (name, np.mean(found_hits))


def test_excess_frechet_over_seeds_covers_and_keeps_its_bias_correction() -> None:
    d, units, seeds, clips = 3, 15, 4, 45
    plan, unit = HalfPlan.make(units, 2), intervals.pack_units(clips, units)
    spreads, shift = np.array([1.0, 0.8, 0.6]), 0.8
    truth = shift**2 + ((0.3 * spreads) ** 2).sum() + 0.01 * d  # a seed's model lies elsewhere: variance 0.01 per axis
    hits, values, plain = [], [], []
    for seed in range(100):
        draw = generator(2000 + seed)
        real = draw.normal(size=(clips, d)) * spreads
        side = HalfReference(UnitMoments.of(real, unit, units), plan)
        floor = side.distances(UnitMoments.of(real, unit, units))
        rows = []
        for _ in range(seeds):
            arm = 0.7 * draw.normal(size=(clips, d)) * spreads + 0.1 * draw.normal(size=d)
            arm[:, 0] += shift
            rows.append(side.distances(UnitMoments.of(arm, unit, units)) - floor)
        one = Estimate(np.stack(rows), tuple(range(seeds)), correct=True)
        found = statistics.mean_interval(one)
        hits.append(found.low <= truth <= found.high)
        values.append(found.value)
        plain.append(one.left[:, 0].mean())
    assert covered(hits), np.mean(hits)
    assert abs(np.mean(values) - truth) < abs(np.mean(plain) - truth)
    assert abs(np.mean(values) - truth) < 0.05 * truth


def test_shares_over_seeds_cover_and_stay_within_bounds() -> None:
    hits = []
    for seed in range(REPEATS):
        draw = generator(3000 + seed)
        chance = 0.3 + 0.05 * draw.normal(size=5)
        rows = [statistics.leave_out(1.0 * (draw.random(80) < one), np.arange(80) // 2) for one in chance]
        found = statistics.share_interval(Estimate(np.stack(rows), tuple(range(5))), 400)
        hits.append(found.low <= 0.3 <= found.high)
    assert covered(hits), np.mean(hits)
    none = np.stack([statistics.leave_out(np.zeros(80), np.arange(80) // 2)] * 3)
    found = statistics.share_interval(Estimate(none, (0, 1, 2)), 240)
    assert (found.value, found.low) == (0, 0) and 0 < found.high < 0.2


# --- one seed, other seeds -------------------------------------------------------------------------------------------


def test_one_seed_gives_the_interval_of_an_evaluation_to_the_last_bit() -> None:
    draw = generator(7)
    groups = np.repeat(np.arange(30), 2)
    values, base = draw.random(60) + 1, draw.random(60) + 1
    a, b = statistics.leave_out(values, groups), statistics.leave_out(base, groups)
    one, two = Estimate(a[None], (3,)), Estimate(b[None], (3,))
    assert statistics.mean_interval(one) == intervals.jackknife(a) == intervals.mean_interval(values, groups)
    corrected = Estimate(a[None], (3,), correct=True)
    assert statistics.mean_interval(corrected) == intervals.jackknife(a, correct=True)
    assert statistics.difference(one, two) == intervals.difference(a, b)
    assert statistics.ratio(one, two) == intervals.ratio(a, b)
    hits = (values > 1.4) * 1.0
    share = Estimate(statistics.leave_out(hits, groups)[None], (3,))
    assert statistics.share_interval(share, 60) == intervals.share_interval(hits, groups)


def test_equal_seeds_add_nothing_and_different_ones_widen() -> None:
    draw = generator(8)
    left = statistics.leave_out(draw.normal(size=40), np.arange(40))
    same = statistics.mean_interval(Estimate(np.stack([left] * 3), (0, 1, 2)))
    once = intervals.jackknife(left)
    assert np.allclose([same.value, same.low, same.high], [once.value, once.low, once.high])
    other = np.stack([left - 0.5, left, left + 0.5])
    found = statistics.spread(Estimate(other, (0, 1, 2)))
    assert found is not None
    assert found.seeds == pytest.approx(0.25 / 3)
    assert 2 < found.df < 39
    wider = statistics.mean_interval(Estimate(other, (0, 1, 2)))
    assert wider.high - wider.low > 1.5 * (same.high - same.low)


def test_pairs_are_made_over_common_seeds_only() -> None:
    draw = generator(9)
    rows = draw.normal(size=(5, 41))
    all_seeds, some = Estimate(rows, (0, 1, 2, 3, 4)), Estimate(rows[[3, 1]] + 2.0, (3, 1))
    gap = statistics.difference(some, all_seeds)
    assert (gap.value, gap.low, gap.high) == pytest.approx((2.0, 2.0, 2.0))
    without = Estimate(rows[:1], ())  # the codec: no seed changes it
    assert statistics.difference(all_seeds, without).value == pytest.approx(rows[:, 0].mean() - rows[0, 0])
    with pytest.raises(ArchipelError, match="no seed is common"):
        statistics.difference(some, Estimate(rows[:1], (0,)))
    with pytest.raises(ArchipelError, match="content groups"):
        statistics.difference(some, Estimate(rows[:2, :-1], (3, 1)))
    with pytest.raises(ArchipelError, match="no seed twice"):
        Estimate(rows[:2], (1, 1))


def test_a_ratio_is_refused_where_the_denominator_may_be_zero_over_groups_or_over_seeds() -> None:
    draw = generator(10)
    table = 1.0 + 0.1 * draw.normal(size=(3, 40))
    flat = Estimate(np.stack([statistics.leave_out(row, np.arange(40)) for row in table]), (0, 1, 2))
    assert statistics.ratio(flat, flat) is not None
    torn = Estimate(flat.left + np.array([[-0.9], [0.0], [0.9]]), (0, 1, 2))
    assert statistics.ratio(flat, torn) is None
    unknown = Estimate(np.where(np.arange(41) == 4, np.nan, flat.left), (0, 1, 2))
    assert np.isnan(statistics.mean_interval(unknown).low) and statistics.mean_interval(unknown).value == flat.value
    assert statistics.ratio(unknown, flat) is None
