from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archipel.data.splits import assign_splits
from archipel.errors import ArchipelError

SHARES = (0.7, 0.1, 0.2)


@given(
    groups=st.lists(st.integers(0, 30).map(str), min_size=1, max_size=80),
    fixed=st.dictionaries(st.integers(0, 30).map(str), st.sampled_from(["train", "validation", "test"]), max_size=8),
    shares=st.sampled_from([SHARES, (1.0, 0.0, 0.0), (0.5, 0.0, 0.5), (0.34, 0.33, 0.33)]),
    seed=st.integers(0, 5),
)
def test_groups_are_dealt_out_whole_and_given_splits_are_kept(
    groups: list[str], fixed: dict[str, str], shares: tuple[float, float, float], seed: int
) -> None:
    given_splits = [fixed.get(group) for group in groups]
    splits = assign_splits(groups, given_splits, shares, seed)
    place = {}
    for group, split in zip(groups, splits, strict=True):
        assert place.setdefault(group, split) == split
        assert fixed.get(group, split) == split
    if any(group not in fixed for group in groups):
        assert "train" in splits
    if len(place) >= 3 and not set(place) & set(fixed):
        for share, split in zip(shares, ("train", "validation", "test"), strict=True):
            assert (split in splits) == (share > 0)


def test_shares_are_of_groups_and_come_out_as_asked() -> None:
    groups = [f"g{i % 100}" for i in range(400)]
    splits = assign_splits(groups, [None] * 400, SHARES, 0)
    sizes = {
        s: len({g for g, p in zip(groups, splits, strict=True) if p == s}) for s in ("train", "validation", "test")
    }
    assert sizes == {"train": 70, "validation": 10, "test": 20}


@pytest.mark.parametrize(
    ("count", "expected"), [(1, {"train"}), (3, {"train", "validation", "test"}), (5, {"train", "validation", "test"})]
)
def test_small_sets_fill_every_split_as_soon_as_they_can(count: int, expected: set[str]) -> None:
    groups = [f"g{i}" for i in range(count)]
    assert set(assign_splits(groups, [None] * count, SHARES, 0)) == expected


def test_the_order_of_clips_does_not_matter_and_the_seed_does() -> None:
    groups = [f"g{i}" for i in range(40)]
    splits = dict(zip(groups, assign_splits(groups, [None] * 40, SHARES, 1), strict=True))
    backwards = dict(zip(groups[::-1], assign_splits(groups[::-1], [None] * 40, SHARES, 1), strict=True))
    assert splits == backwards
    assert splits != dict(zip(groups, assign_splits(groups, [None] * 40, SHARES, 2), strict=True))


def test_given_splits_count_towards_the_shares() -> None:
    groups = [f"g{i}" for i in range(20)]
    fixed: list[str | None] = ["test"] * 4 + [None] * 16
    splits = assign_splits(groups, fixed, SHARES, 0)
    assert splits.count("test") == 4 and splits.count("validation") == 2


def test_a_group_in_two_splits_is_refused_by_name() -> None:
    with pytest.raises(ArchipelError, match=r"group 'kitchen' is in two splits, train and test"):
        assign_splits(["kitchen", "hall", "kitchen"], ["train", None, "test"], SHARES, 0)
