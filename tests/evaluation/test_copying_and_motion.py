from __future__ import annotations

import numpy as np
import pytest

from archipel.errors import ArchipelError
from archipel.evaluation import copying, protocol
from archipel.evaluation.motion import motion


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).normal(size=shape)


def test_planted_copies_are_found() -> None:
    train, test, fresh = normal(1, 200, 12), normal(2, 80, 12), normal(3, 80, 12)
    real = copying.nearest(test, train)
    assert copying.nearer_than(copying.nearest(fresh, train), real).mean() == pytest.approx(0.5, abs=0.1)
    copied = fresh.copy()
    copied[:40] = train[:40] + 0.01 * normal(4, 40, 12)
    share = copying.nearer_than(copying.nearest(copied, train), real)
    assert (share[:40] == 1).all()
    assert share.mean() > 0.7


def test_nearest_by_block_is_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, hidden = normal(11, 9, 6) + 50, normal(12, 40, 6) + 50, normal(13, 9, 40) > 0.5
    whole, shown = copying.nearest(a, b), copying.nearest(a, b, hidden)
    rows = np.random.default_rng(0).permutation(40)
    read = copying.nearest(a, copying.Chosen(b, rows))
    np.testing.assert_allclose(read, whole, rtol=1e-9)
    monkeypatch.setattr(copying, "WHOLE", 64)  # seven rows of b at a time
    np.testing.assert_allclose(copying.nearest(a, b), whole, rtol=1e-9)
    np.testing.assert_allclose(copying.nearest(a, b, hidden), shown, rtol=1e-9)
    np.testing.assert_allclose(copying.nearest(a, copying.Chosen(b, rows)), whole, rtol=1e-9)
    own = np.eye(9, dtype=bool)
    np.testing.assert_allclose(
        copying.train_over_test(a, b, a, own, whole), copying.train_over_test(a, b, a, own), rtol=1e-9
    )


def test_real_clips_against_themselves_are_exactly_one_half() -> None:
    values = np.array([3.0, 1.0, 1.0, 2.0])
    assert copying.nearer_than(values, values).mean() == 0.5


@pytest.mark.parametrize(("train", "test"), [(200, 60), (40, 90)])
def test_ratio_of_distances_is_even_for_new_clips_and_sees_copies_but_no_blur(train: int, test: int) -> None:
    found: dict[str, list[float]] = {"fresh": [], "blurred": [], "half": []}
    for seed in range(20):
        a, b, fresh = normal(100 + seed, train, 6), normal(200 + seed, test, 6), normal(300 + seed, 40, 6)
        mixed = fresh.copy()
        mixed[:20] = a[:20] + 1e-3
        real = copying.train_over_test(b, a, b, np.eye(test, dtype=bool))
        for name, clips in (("fresh", fresh), ("blurred", 0.2 * fresh), ("half", mixed)):
            found[name].append(copying.nearer_than(copying.train_over_test(clips, a, b), real).mean())
    assert np.mean(found["fresh"]) == pytest.approx(0.5, abs=4 * np.std(found["fresh"]) / 20**0.5)
    assert np.mean(found["blurred"]) < 0.5 + 3 * np.std(found["blurred"]) / 20**0.5
    assert np.mean(found["half"]) == pytest.approx(0.75, abs=0.05)


def test_ratio_without_a_test_clip_to_compare_with_is_one() -> None:
    a = normal(30, 4, 3)
    assert copying.train_over_test(a, a + 1, a, np.ones((4, 4), bool)).tolist() == [1.0] * 4


def test_distances_survive_a_large_common_offset() -> None:
    a, b = normal(5, 6, 30), normal(6, 7, 30)
    direct = np.linalg.norm(a[:, None] - b[None], axis=2)
    np.testing.assert_allclose(copying.distances(a + 1e5, b + 1e5), direct, rtol=1e-5)


def test_nearest_passes_over_hidden_pairs() -> None:
    a = np.array([[0.0], [1.0]])
    assert copying.nearest(a, a).tolist() == [0.0, 0.0]
    assert copying.nearest(a, a, np.eye(2, dtype=bool)).tolist() == [1.0, 1.0]


def naeem(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, float]:
    """Precision, recall, density and coverage as their papers write them, by loops."""

    def radius(rows: np.ndarray) -> list[float]:
        return [sorted(float(np.linalg.norm(a - b)) for b in rows)[k] for a in rows]

    ball_real, ball_fake = radius(real), radius(fake)
    inside = np.array([[np.linalg.norm(x - y) < r for y in fake] for x, r in zip(real, ball_real, strict=True)])
    other = np.array([[np.linalg.norm(x - y) < r for y, r in zip(fake, ball_fake, strict=True)] for x in real])
    return {
        "precision": float(inside.any(0).mean()),
        "density": float(inside.sum() / k / len(fake)),
        "recall": float(other.any(1).mean()),
        "coverage": float(inside.any(1).mean()),
    }


def test_density_and_coverage_follow_their_definition() -> None:
    real, fake = normal(7, 30, 3), normal(8, 25, 3) * 0.7 + 0.4
    found = copying.coverage(real, fake, 4)
    for name, value in naeem(real, fake, 4).items():
        assert getattr(found, name).mean() == pytest.approx(value), name


def test_collapse_keeps_precision_and_loses_coverage() -> None:
    real = normal(9, 60, 4)
    found = copying.coverage(real, 0.05 * normal(10, 60, 4), 5)
    assert found.precision.mean() > 0.9
    assert found.coverage.mean() < 0.5
    assert found.recall.mean() < 0.2


def test_real_clips_are_covered_by_other_groups_alone() -> None:
    real, groups = normal(11, 80, 3), np.arange(80) // 2
    alone = copying.coverage(real, real, 5, groups, groups)
    assert alone.density.mean() == pytest.approx(1, abs=0.25)
    assert 0.9 < alone.coverage.mean() <= 1


def test_k_is_bounded_by_the_clips() -> None:
    assert copying.neighbours(3) == 2
    assert copying.neighbours(100) == 5
    one_group = copying.coverage(normal(12, 4, 2), normal(13, 4, 2), 3, np.zeros(4, int), np.zeros(4, int))
    assert one_group.coverage.sum() == 0


def test_motion_is_the_mean_absolute_frame_difference() -> None:
    clips = np.zeros((2, 3, 4, 4, 3), np.uint8)
    clips[1, 1] = 255  # on, off: both steps change everything
    assert motion(clips).tolist() == [0.0, 1.0]
    assert motion(clips[:, :1]).tolist() == [0.0, 0.0]


# --- protocols -------------------------------------------------------------------------------------------------------


def row(**changes: object) -> dict[str, object]:
    record = protocol.Protocol("kid", "transnet", "ab", "last", 27, 8, 96, "ef", 120, 90, "", "test", "cd").as_dict()
    return {"arm": "top1", "metric": "KID-transnet", "value": 0.5, "protocol": {**record, **changes}}


def test_equal_protocols_compare() -> None:
    assert protocol.compare({**row(), "value": 0.75}, {**row(), "arm": "monolith"}) == 0.25


@pytest.mark.parametrize(
    ("key", "value"), [("n", 48), ("pca", 32), ("weights", "ff"), ("split", "validation"), ("new", 1)]
)
def test_other_protocols_are_refused_naming_the_first_difference(key: str, value: object) -> None:
    with pytest.raises(ArchipelError, match=rf"{key} is .* in one and {value!r} in the other"):
        protocol.require_same(row(), row(**{key: value}))


def test_other_metrics_and_missing_protocols_are_refused() -> None:
    with pytest.raises(ArchipelError, match="metric is"):
        protocol.compare(row(), {**row(), "metric": "KID-efficientnet-motion"})
    with pytest.raises(ArchipelError, match="no protocol"):
        protocol.compare(row(), {"arm": "a", "metric": "KID-transnet", "value": 1.0})
