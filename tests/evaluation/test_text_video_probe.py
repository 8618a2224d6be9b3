from __future__ import annotations

import numpy as np
import pytest

from archipel.errors import ArchipelError
from archipel.evaluation import probe


def world(seed: int, clips: int, noise: float, wide: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, captions and groups that share eight linear factors."""
    fixed = np.random.Generator(np.random.PCG64(0))
    to_video, to_text = fixed.normal(size=(8, wide)), fixed.normal(size=(8, 20))
    draw = np.random.Generator(np.random.PCG64(seed))
    factors = draw.normal(size=(clips, 8))
    video = factors @ to_video * (noise < 5) + noise * draw.normal(size=(clips, wide)) + 7
    return video, factors @ to_text + 1, np.arange(clips) // 2


def test_linear_world_is_retrieved_far_above_chance() -> None:
    fitted = probe.fit(*world(1, 120, 0.3))
    video, text, _ = world(2, 40, 0.3)
    found = probe.retrieve(fitted, video, np.arange(40), text)
    assert found.chance1 == 1 / 40
    assert found.top1.mean() > 0.7
    assert found.top5.mean() >= found.top1.mean()
    assert found.similarity.mean() > 0.8
    assert probe.trusted(found)


def test_the_probe_of_many_clips_is_that_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """By clips and by features: the same weights; features beyond the clips' number stay with the first."""
    dual = probe.fit(*world(1, 120, 0.3))
    monkeypatch.setattr(probe, "DUAL", 0)
    primal = probe.fit(*world(1, 120, 0.3))
    assert primal.penalty == dual.penalty and not np.array_equal(primal.weight, dual.weight)
    np.testing.assert_allclose(primal.weight, dual.weight, rtol=1e-6, atol=1e-9)
    few = world(1, 40, 0.3)
    assert np.isfinite(probe.fit(*few).weight).all()


def test_noise_is_near_chance_and_withheld() -> None:
    fitted = probe.fit(*world(3, 120, 9.0))
    video, text, _ = world(4, 40, 9.0)
    found = probe.retrieve(fitted, video, np.arange(40), text)
    assert found.top1.mean() < 3 / 40
    assert not probe.trusted(found)
    assert abs(fitted.score) < 0.2


def test_a_constant_prediction_scores_exactly_chance() -> None:
    fitted = probe.fit(*world(5, 40, 0.3))
    frozen = probe.Probe(fitted.mean, fitted.scale, fitted.weight * 0, fitted.text_mean, 1.0, 0.0)
    video, text, _ = world(6, 10, 0.3)
    found = probe.retrieve(frozen, video, np.arange(10), text)
    assert found.top1.mean() == pytest.approx(0.1)
    assert found.top5.mean() == pytest.approx(0.5)


def test_cross_validation_keeps_groups_whole_and_prefers_more_penalty_for_more_noise() -> None:
    groups = np.array(["a", "b", "a", "c", "b", "d", "e", "f"])
    fold = probe.fold_of(groups, 5, 0)
    assert all(len(set(fold[groups == name])) == 1 for name in set(groups))
    assert len(set(fold)) == 5
    assert probe.fit(*world(7, 80, 3.0)).penalty > probe.fit(*world(7, 80, 0.05)).penalty


def test_ridge_weights_are_those_of_the_normal_equations() -> None:
    draw = np.random.Generator(np.random.PCG64(8))
    x, y = draw.normal(size=(15, 6)), draw.normal(size=(15, 3))
    direct = np.linalg.solve(x.T @ x + 0.2 * 15 * np.eye(6), x.T @ y)
    np.testing.assert_allclose(probe._solve(x, y, [0.2])[0], direct, rtol=1e-9)


def test_duplicated_groups_do_not_leak_into_the_score() -> None:
    # Pure noise, every clip four times: held-out copies would look predictable if groups were split.
    video, text, _ = world(9, 30, 9.0)
    copies = np.tile(np.arange(30), 4)
    assert probe.fit(video[copies], text[copies], copies).score < 0.25


def test_one_group_is_refused() -> None:
    video, text, _ = world(10, 6, 0.3)
    with pytest.raises(ArchipelError, match="at least 2 content groups"):
        probe.fit(video, text, np.zeros(6))


def test_static_and_reversed_clips() -> None:
    clips = np.arange(2 * 3 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 3, 2, 2, 3)
    still = probe.static(clips)
    assert (still == clips[:, :1]).all()
    assert (probe.backwards(clips)[:, 0] == clips[:, 2]).all()
    assert still.flags.c_contiguous
