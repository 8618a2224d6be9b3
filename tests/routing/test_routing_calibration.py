"""Temperatures, calibration error and the prior's correction against cases that are known exactly."""

from __future__ import annotations

import numpy as np
import pytest

from archipel.errors import DamagedError
from archipel.routing import calibration, quality
from archipel.routing.calibration import Calibration, Draws

PRIOR = np.array([0.5, 0.3, 0.2])


def honest(count: int, spread: float = 1.5, seed: int = 0, prior: np.ndarray = PRIOR) -> tuple[np.ndarray, np.ndarray]:
    """Calibrated log p (n, K) and labels drawn from it."""
    generator = np.random.default_rng(seed)
    log_p = calibration.log_softmax(np.log(prior) + spread * generator.normal(size=(count, len(prior))))
    u = generator.random((count, 1))
    return log_p, np.minimum((np.exp(log_p).cumsum(1) < u).sum(1), len(prior) - 1)


def draws_of(logits: np.ndarray, labels: np.ndarray, null: np.ndarray | None = None, bins: int = 2) -> Draws:
    """The same logits (N, K) in every bin, one draw each."""
    both = np.stack([logits, logits if null is None else null])
    whole = np.broadcast_to(both[:, None, None], (2, bins, 1, *logits.shape))
    times = np.broadcast_to(calibration.centres(bins)[:, None, None], (bins, 1, len(labels)))
    return Draws(whole, times, labels)


@pytest.mark.parametrize("known", [0.4, 1.0, 2.5])
def test_recovers_a_known_temperature(known: float) -> None:
    log_p, labels = honest(20_000)
    logits = np.log(PRIOR) + known * (log_p - np.log(PRIOR))
    found = calibration.fit_temperature(logits, labels, PRIOR, clips=len(labels), width=1.0)
    assert found == pytest.approx(known, rel=0.05)
    np.testing.assert_allclose(calibration.temper(logits, PRIOR, known), log_p, atol=1e-9)


def test_for_equal_shares_it_is_ordinary_temperature_scaling() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 4))
    np.testing.assert_allclose(
        calibration.temper(logits, np.full(4, 0.25), 1.7), calibration.log_softmax(logits / 1.7), atol=1e-12
    )


def test_logits_that_know_nothing_become_the_prior() -> None:
    generator = np.random.default_rng(2)
    labels = generator.choice(3, size=4000, p=PRIOR)
    logits = 4 * generator.normal(size=(4000, 3))
    found = calibration.fit(draws_of(logits, labels), PRIOR)
    log_p = found.log_p(draws_of(logits, labels))[0].reshape(-1, 3)
    entropy = -float((PRIOR * np.log(PRIOR)).sum())
    repeated = np.tile(labels, 2)
    assert calibration.nll(calibration.log_softmax(logits), labels) > 2 * entropy
    assert calibration.nll(log_p, repeated) == pytest.approx(entropy, abs=0.03)


def test_few_clips_and_perfect_answers_leave_temperatures_moderate() -> None:
    labels = np.array([0, 1, 2, 0])
    logits = 6 * np.eye(3)[labels]
    found = calibration.fit(draws_of(logits, labels), np.full(3, 1 / 3))
    assert (found.temperatures > 0.2).all()
    assert (found.temperatures < 1.5).all()
    none = calibration.fit(draws_of(logits[:0], labels[:0]), PRIOR)
    assert (none.temperatures == 1).all()


def test_branches_and_bins_have_temperatures_of_their_own() -> None:
    log_p, labels = honest(8000)
    beyond = log_p - np.log(PRIOR)
    logits = np.stack([np.stack([np.log(PRIOR) + scale * beyond for scale in row]) for row in ((3.0, 1.5), (1.0, 0.7))])
    times = np.broadcast_to(calibration.centres(2)[:, None, None], (2, 1, len(labels)))
    found = calibration.fit(Draws(logits[:, :, None], times, labels), PRIOR)
    np.testing.assert_allclose(found.temperatures, [[3.0, 1.5], [1.0, 0.7]], rtol=0.08)


def test_temperature_is_continuous_in_t_and_level_beyond_the_bins() -> None:
    fitted = Calibration(np.array([[1.0, 4.0], [2.0, 2.0]]), np.array([0.25, 0.75]), PRIOR)
    t = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(fitted.at(t, np.zeros(5, bool)), [1, 1, 2, 4, 4])
    np.testing.assert_allclose(fitted.at(t, np.ones(5, bool)), 2)
    fine = fitted.at(np.linspace(0, 1, 1001), np.zeros(1001, bool))
    assert np.abs(np.diff(np.log(fine))).max() < 0.004


def test_ece_of_honest_probabilities_is_near_zero_and_of_boasting_ones_is_not() -> None:
    log_p, labels = honest(40_000)
    assert calibration.ece(log_p, labels) < 0.01
    boasting = calibration.log_softmax(3 * log_p)
    assert calibration.ece(boasting, labels) > 0.1
    certain_and_wrong = np.log(np.array([[1 - 2e-9, 1e-9, 1e-9]]))
    assert calibration.ece(certain_and_wrong, np.array([1])) == pytest.approx(1.0)
    assert sum(row["share"] for row in calibration.reliability(log_p, labels)) == pytest.approx(1.0)


def test_prior_shift_is_exact_for_a_known_posterior() -> None:
    generator = np.random.default_rng(0)
    x, means = generator.normal(size=(200, 1)), np.array([-1.0, 0.5, 2.0])
    likelihood = -0.5 * (x - means) ** 2
    trained, wanted = np.array([1 / 3, 1 / 3, 1 / 3]), np.array([0.7, 0.2, 0.1])
    under = calibration.log_softmax(likelihood + np.log(trained)) + 5.0  # logits are free up to a constant
    shifted = calibration.log_softmax(calibration.shift_prior(under, wanted, trained))
    np.testing.assert_allclose(shifted, calibration.log_softmax(likelihood + np.log(wanted)), atol=1e-12)
    assert np.array_equal(calibration.shift_prior(under, wanted, wanted), under)


def test_round_trip_and_refusal_of_impossible_calibrations() -> None:
    fitted = Calibration(np.array([[1.0, 4.0], [2.0, 2.0]]), np.array([0.25, 0.75]), PRIOR)
    again = Calibration.from_json(fitted.to_json(), "x")
    assert np.array_equal(again.temperatures, fitted.temperatures)
    good = fitted.to_json()
    for bad in (
        {"temperature": [1.0, 0.0]},
        {"temperature": [1.0]},
        {"t": [0.7, 0.2]},
        {"prior": [0.5, 0.3, 0.1]},
        {"temperature_null": ["x", 1]},
    ):
        with pytest.raises(DamagedError, match=r"calibration\.json"):
            Calibration.from_json({**good, **bad}, "calibration.json")
    with pytest.raises(DamagedError):
        Calibration.from_json({}, "calibration.json")


def test_cross_fitting_never_judges_a_clip_by_itself() -> None:
    """Temperatures of a clip do not change when its own fold's labels do."""
    log_p, labels = honest(200, seed=4)
    groups = [f"g{i // 2}" for i in range(200)]
    fold = quality.folds(groups)
    assert set(fold) == {0, 1}
    before = quality.cross_fitted(draws_of(3 * log_p, labels), PRIOR, groups)
    changed = np.where(fold == 0, (labels + 1) % 3, labels)
    after = quality.cross_fitted(draws_of(3 * log_p, changed), PRIOR, groups)
    assert np.array_equal(before[:, :, :, fold == 0], after[:, :, :, fold == 0])
    assert not np.allclose(before[:, :, :, fold == 1], after[:, :, :, fold == 1])


def test_measured_quality_holds_the_prior_both_branches_and_confusion() -> None:
    log_p, labels = honest(600, seed=5)
    groups = [f"g{i // 2}" for i in range(600)]
    draws = draws_of(2.5 * log_p, labels, null=np.zeros_like(log_p), bins=4)
    fitted = calibration.fit(draws, PRIOR)
    found = quality.measure(draws, PRIOR, groups, fitted)
    text, null = found["with_text"], found["without_text"]
    assert text["cross_entropy"] < text["uncalibrated"]["cross_entropy"]
    assert text["ece"] < text["uncalibrated"]["ece"]
    assert text["cross_entropy"] < found["prior"]["cross_entropy"]
    assert null["cross_entropy"] == pytest.approx(found["prior"]["cross_entropy"], rel=0.02)  # it knows nothing
    assert np.sum(found["confusion"]["with_text"]) == 600 * 4
    assert np.sum(found["confusion"]["with_text"], axis=1).tolist() == (np.bincount(labels, minlength=3) * 4).tolist()
    assert [row["t"] for row in text["bins"]] == [0.125, 0.375, 0.625, 0.875]
    assert found["groups"] == 300


def test_one_expert_is_certain_and_needs_no_temperature() -> None:
    draws = draws_of(np.random.default_rng(0).normal(size=(20, 1)), np.zeros(20, np.int64))
    fitted = calibration.fit(draws, np.ones(1))
    np.testing.assert_allclose(fitted.temperatures, 1.0, rtol=0.01)
    found = quality.measure(draws, np.ones(1), [str(i) for i in range(20)], fitted)
    assert found["with_text"]["accuracy"] == 1.0
    assert found["with_text"]["cross_entropy"] == pytest.approx(0.0, abs=1e-12)
