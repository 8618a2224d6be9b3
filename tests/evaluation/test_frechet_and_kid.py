from __future__ import annotations

import numpy as np
import pytest

from archipel.errors import ArchipelError
from archipel.evaluation import distances
from archipel.evaluation.distances import GroupKernel, HalfPlan, HalfReference, Moments, UnitMoments


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).normal(size=shape)


def test_streamed_moments_are_those_of_the_whole() -> None:
    rows = normal(1, 57, 6) + 3
    moments = Moments.stream(rows[begin : begin + 10] for begin in range(0, 57, 10))
    assert moments.n == 57
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(rows, rowvar=False), rtol=1e-10, atol=1e-12)


def test_moments_subtract_to_the_rest() -> None:
    rows = normal(2, 30, 4)
    rest = Moments.of(rows) - Moments.of(rows[:7])
    np.testing.assert_allclose(rest.covariance, np.cov(rows[7:], rowvar=False), atol=1e-12)


def test_moments_accumulate_in_double() -> None:
    rows = (normal(3, 4000, 3) * 1e-2 + 100).astype(np.float32)
    exact = np.cov(rows.astype(np.float64), rowvar=False)
    streamed = Moments.stream(np.array_split(rows, 9)).covariance
    np.testing.assert_allclose(streamed, exact, rtol=1e-4, atol=1e-9)


def test_too_few_clips_are_refused() -> None:
    with pytest.raises(ArchipelError, match="at least one batch"):
        Moments.stream([])
    with pytest.raises(ArchipelError, match="at least 2"):
        _ = Moments.of(normal(1, 1, 4)).covariance
    with pytest.raises(ArchipelError, match="at least 2"):
        distances.kid(normal(1, 1, 4), normal(2, 5, 4))


def test_known_gaussians_in_closed_form() -> None:
    # Commuting covariances: |ma - mb|^2 + sum (sa - sb)^2 over the common axes.
    turn, _ = np.linalg.qr(normal(4, 7, 7))
    sa, sb = np.linspace(0.5, 2, 7), np.linspace(2, 0.1, 7)
    ma, mb = normal(5, 7), normal(6, 7)
    value = distances.frechet_gaussian(ma, turn * sa**2 @ turn.T, mb, turn * sb**2 @ turn.T)
    assert value == pytest.approx(((ma - mb) ** 2).sum() + ((sa - sb) ** 2).sum(), rel=1e-10)


def test_frechet_is_zero_for_equal_sets_and_symmetric_even_when_singular() -> None:
    a, b = normal(7, 9, 20), normal(8, 11, 20) * 2  # fewer clips than dimensions
    one, two = Moments.of(a), Moments.of(b)
    assert distances.frechet(one, one) == pytest.approx(0, abs=1e-6)
    assert distances.frechet(one, two) == pytest.approx(distances.frechet(two, one), rel=1e-9)


def test_batched_frechet_equals_one_by_one() -> None:
    sets = [normal(seed, 30, 5) * (1 + seed % 3) for seed in range(6)]
    moments = [Moments.of(one) for one in sets]
    mean, cov = np.stack([m.mean for m in moments]), np.stack([m.covariance for m in moments])
    batched = distances.frechet_gaussian(mean[:3], cov[:3], mean[3:], cov[3:])
    np.testing.assert_allclose(batched, [distances.frechet(moments[i], moments[i + 3]) for i in range(3)], rtol=1e-10)


def test_pca_is_capped_by_the_clips_and_says_so() -> None:
    pca = distances.fit_pca(normal(9, 12, 40), 32)
    assert (pca.dims, pca.asked) == (11, 32)
    assert pca.explained == pytest.approx(1.0)
    assert distances.fit_pca(normal(9, 60, 40), 8).dims == 8
    with pytest.raises(ArchipelError, match="at least 3"):
        distances.fit_pca(normal(9, 2, 40), 8)


def test_pca_of_constant_features_is_harmless() -> None:
    pca = distances.fit_pca(np.ones((10, 5)), 4)
    assert np.isfinite(pca(np.ones((3, 5)))).all()


def test_pca_keeps_distances_within_its_space() -> None:
    basis = normal(10, 3, 20)
    rows = normal(11, 50, 3) @ basis + 5
    projected = distances.fit_pca(rows, 3)(rows)
    np.testing.assert_allclose(projected @ projected.T, (rows - rows.mean(0)) @ (rows - rows.mean(0)).T, atol=1e-8)


# --- halves ----------------------------------------------------------------------------------------------------------


def test_halves_are_balanced_disjoint_and_repeatable() -> None:
    half = distances.halves(11, 6, seed=3)
    assert set(half.sum(1)) == {5}
    assert (half == distances.halves(11, 6, seed=3)).all()
    plan = HalfPlan.make(11, 6, seed=3)
    assert not (plan.first & plan.second).any()
    assert plan.first.shape == (12, 12, 11)
    for unit in range(11):
        assert not (plan.first[1 + unit, :, unit] | plan.second[1 + unit, :, unit]).any()


def test_half_distances_equal_a_direct_computation() -> None:
    real, arm = normal(12, 40, 4), normal(13, 40, 4) * 1.3 + 0.2
    unit = np.arange(40) % 10
    plan = HalfPlan.make(10, 3)
    side = HalfReference(UnitMoments.of(real, unit, 10), plan)
    found = side.distances(UnitMoments.of(arm, unit, 10))

    def direct(left_out: int | None) -> float:
        values = []
        for half in [*distances.halves(10, 3), *~distances.halves(10, 3)]:
            keep = np.arange(10) != (-1 if left_out is None else left_out)
            first, second = np.flatnonzero(half & keep), np.flatnonzero(~half & keep)
            a, b = arm[np.isin(unit, first)], real[np.isin(unit, second)]
            values.append(distances.frechet(Moments.of(a), Moments.of(b)))
        return float(np.mean(values))

    assert found[0] == pytest.approx(direct(None), rel=1e-9)
    for left_out in (0, 7):
        assert found[1 + left_out] == pytest.approx(direct(left_out), rel=1e-9)


def test_a_half_with_one_clip_gives_nan_and_no_crash() -> None:
    unit = np.array([0, 1, 2, 3])
    plan = HalfPlan.make(4, 2)
    side = HalfReference(UnitMoments.of(normal(14, 4, 3), unit, 4), plan)
    found = side.distances(UnitMoments.of(normal(15, 4, 3), unit, 4))
    assert np.isfinite(found[0])
    assert np.isnan(found[1:]).all()


# --- KID -------------------------------------------------------------------------------------------------------------


def kid_by_loops(a: np.ndarray, b: np.ndarray, group_a: np.ndarray, group_b: np.ndarray) -> float:
    def mean(x: np.ndarray, y: np.ndarray, gx: np.ndarray, gy: np.ndarray) -> float:
        values = [
            (float(x[i] @ y[j]) / x.shape[1] + 1) ** 3 for i in range(len(x)) for j in range(len(y)) if gx[i] != gy[j]
        ]
        return float(np.mean(values))

    return mean(a, a, group_a, group_a) + mean(b, b, group_b, group_b) - 2 * mean(a, b, group_a, group_b)


def test_grouped_kid_and_its_leave_outs_equal_double_loops() -> None:
    a, b = normal(16, 14, 5), normal(17, 20, 5) + 0.3
    ga, gb = np.arange(14) % 6, np.arange(20) % 8
    found = GroupKernel.of(a, ga, b, gb, 8).estimate()
    assert found[0] == pytest.approx(kid_by_loops(a, b, ga, gb), rel=1e-10)
    for left in (0, 5, 7):
        ka, kb = ga != left, gb != left
        assert found[1 + left] == pytest.approx(kid_by_loops(a[ka], b[kb], ga[ka], gb[kb]), rel=1e-10)


def test_kernel_sums_of_many_clips_are_those_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(21, 14, 5), normal(22, 20, 5) + 0.3
    ga, gb = np.arange(14) % 6, np.arange(20) % 8
    whole = GroupKernel.of(a, ga, b, gb, 9)  # one group has no clip
    monkeypatch.setattr(distances, "WHOLE", 0)
    added = GroupKernel.of(a, ga, b, gb, 9)
    for name in ("aa", "bb", "ab", "n_a", "n_b"):
        np.testing.assert_allclose(getattr(added, name), getattr(whole, name), rtol=1e-12)


def test_kid_without_groups_equals_grouped_kid_of_independent_sets() -> None:
    a, b = normal(18, 9, 4), normal(19, 12, 4)
    groups = np.arange(9), np.arange(9, 21)
    assert GroupKernel.of(a, groups[0], b, groups[1], 21).estimate()[0] == pytest.approx(distances.kid(a, b), rel=1e-10)


def test_kid_between_halves_equals_kid_of_the_halves() -> None:
    real, groups = normal(20, 24, 6), np.arange(24) % 12
    kernel = GroupKernel.of(real, groups, real, groups, 12)
    half = distances.halves(12, 1)[0]
    a, b = half[groups], ~half[groups]
    expected = kid_by_loops(real[a], real[b], groups[a], groups[b])
    assert kernel.between(half, ~half) == pytest.approx(expected, rel=1e-10)


def test_kid_does_not_reward_a_dependence_on_the_own_caption() -> None:
    # Each generated clip equals the real clip of its caption up to noise: pairs of one group must not enter.
    values = []
    for seed in range(60):
        real = normal(100 + seed, 20, 4)
        arm = real + 1e-3 * normal(200 + seed, 20, 4)
        values.append(GroupKernel.of(arm, np.arange(20), real, np.arange(20), 20).estimate()[0])
    assert abs(np.mean(values)) < 1e-2
    assert np.isnan(GroupKernel.of(real, np.zeros(20, int), real, np.zeros(20, int), 1).estimate()[0])
