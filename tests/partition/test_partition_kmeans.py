"""Centroids, repair, balance and the random control, on points small enough to reason about."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archipel.errors import ArchipelError
from archipel.partition import balance, controls, kmeans


def random_groups(count: int, width: int = 5, seed: int = 0) -> kmeans.Groups:
    generator = np.random.default_rng(seed)
    clips = generator.integers(1, 4, count)
    names = [f"g{group}" for group, n in enumerate(clips) for _ in range(n)]
    return kmeans.gather(kmeans.unit_rows(generator.normal(size=(len(names), width))), names)


def test_group_points_are_mean_directions_weighted_by_clips() -> None:
    points = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    groups = kmeans.gather(points, ["b", "a", "b"])
    assert groups.names == ["b", "a"]
    assert groups.clips.tolist() == [2, 1]
    assert groups.of_clip.tolist() == [0, 1, 0]
    np.testing.assert_allclose(groups.points, [[0.5**0.5, 0.5**0.5], [0.0, 1.0]])


def test_projection_ignores_a_common_offset_and_length() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(6, 4))
    lengths = generator.uniform(1, 9, size=(6, 1))
    same = kmeans.project(features, np.zeros(4))
    np.testing.assert_allclose(kmeans.project(features * lengths + 100.0, np.full(4, 100.0)), same, atol=1e-9)
    assert not kmeans.project(np.full((1, 4), 5.0), np.full(4, 5.0)).any()  # a feature at the mean stays a zero


def test_distance_of_a_row_does_not_depend_on_its_batch() -> None:
    generator = np.random.default_rng(1)
    points, centroids = generator.normal(size=(33, 1024)), generator.normal(size=(5, 1024)).astype(np.float32)
    whole = kmeans.distances(kmeans.unit_rows(points), centroids)
    alone = np.concatenate([kmeans.distances(kmeans.unit_rows(points[i : i + 1]), centroids) for i in range(33)])
    assert np.array_equal(whole, alone)


def test_fine_count_is_bounded_by_a_third_of_the_groups_and_never_below_k() -> None:
    assert kmeans.fine_count(48, 3, 300) == 48
    assert kmeans.fine_count(48, 3, 60) == 20
    assert kmeans.fine_count(48, 8, 12) == 8
    assert kmeans.fine_count(2, 4, 100) == 4


def test_fit_refuses_more_clusters_than_groups() -> None:
    with pytest.raises(ArchipelError, match=r"partition\.k = 9 .* at most 4 works"):
        kmeans.fit(random_groups(4), np.zeros(5), 9, 48, 0)


def test_fit_survives_identical_points_and_repair_fills_every_cluster() -> None:
    points = np.tile([[1.0, 0.0, 0.0]], (12, 1))
    groups = kmeans.gather(points, [f"g{i // 2}" for i in range(12)])
    found = kmeans.fit(groups, np.zeros(3), 3, 48, 0)
    distance = kmeans.distances(groups.points, found.coarse)
    fixed, moved = kmeans.repair(distance.argmin(1), distance, groups.clips)
    assert moved > 0
    assert np.bincount(fixed, groups.clips, 3).min() >= kmeans.MINIMUM


def test_repair_moves_the_group_that_loses_least_and_spares_small_donors() -> None:
    assignment = np.array([0, 0, 0, 1])
    clips = np.array([2, 2, 2, 2])
    distance = np.array([[0.0, 0.9, 0.9], [0.0, 0.9, 0.5], [0.0, 0.9, 0.7], [0.9, 0.0, 0.01]])
    fixed, moved = kmeans.repair(assignment, distance, clips)
    assert fixed.tolist() == [0, 2, 0, 1]  # group 3 would lose least, but leaves cluster 1 empty
    assert moved == 1


def test_repair_refuses_with_the_sizes_where_groups_cannot_fill_the_clusters() -> None:
    with pytest.raises(ArchipelError, match="clusters of 0, 5 training clips"):
        kmeans.repair(np.array([1]), np.zeros((1, 2)), np.array([5]))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(6, 40), st.integers(0, 10_000))
def test_balanced_sizes_stay_within_the_share_rounded_up_to_whole_groups(k: int, count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    clips = generator.integers(1, 6, count)
    owner = balance.assign(generator.random((count, k)), clips)
    sizes = np.bincount(owner, clips, k)
    assert owner.min() >= 0
    assert sizes.sum() == clips.sum()
    assert sizes.max() <= balance.capacity(clips, k) - 1 + clips.max()


def test_balanced_assignment_is_the_nearest_one_where_that_is_balanced_already() -> None:
    distance = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.6], [0.7, 0.4]])
    assert balance.assign(distance, np.ones(4, np.int64)).tolist() == [0, 1, 0, 1]


def test_balanced_assignment_sends_away_who_loses_least() -> None:
    distance = np.array([[0.0, 0.9], [0.0, 0.1], [0.0, 0.8], [0.0, 0.2]])
    assert balance.assign(distance, np.ones(4, np.int64)).tolist() == [0, 1, 0, 1]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(6, 40), st.integers(0, 10_000))
def test_random_control_sizes_differ_by_at_most_one_group(k: int, count: int, seed: int) -> None:
    clips = np.random.default_rng(seed).integers(1, 6, count)
    sizes = np.bincount(controls.deal(clips, k, seed), clips, k)
    assert sizes.max() - sizes.min() <= clips.max()


def test_random_control_depends_on_seed_and_split_alone() -> None:
    clips = np.ones(40, np.int64)
    first = controls.deal(clips, 4, 1)
    assert np.array_equal(first, controls.deal(clips, 4, 1))
    assert not np.array_equal(first, controls.deal(clips, 4, 2))
    assert not np.array_equal(first, controls.deal(clips, 4, 1, "test"))
