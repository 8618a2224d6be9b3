"""Beyond memory: what is read by block is what is held, bit for bit; of very many groups a sample is fitted on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archipel.partition import balance, controls, kmeans, points, quality, stage
from archipel.partition.stage import partition, unit_scale

Make = Callable[..., Any]


def by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "HELD", 0)
    monkeypatch.setattr(kmeans, "HELD", 0)
    monkeypatch.setattr(stage, "HELD", 0)
    monkeypatch.setattr(points, "BLOCK", 11)


@pytest.mark.parametrize("settings", [{}, {"balanced": True}, {"features": "appearance+motion"}])
def test_a_partition_by_block_has_the_bytes_of_one_in_memory(
    make_run: Make, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    draw = np.random.default_rng(4)
    groups = draw.permutation(np.repeat(np.arange(50), 3))  # clips of a group lie far apart
    values = draw.normal(size=(50, 9))[groups] + 0.5 * draw.normal(size=(150, 9)) + 3
    held = make_run(values, groups.tolist(), name="held", k=4, **settings)
    read = make_run(values, groups.tolist(), name="read", k=4, **settings)
    partition(held)
    by_block(monkeypatch)
    partition(read)
    for name in ("assignment.parquet", "centroids.safetensors", "quality.json", "captions.json"):
        assert (held.partition / name).read_bytes() == (read.partition / name).read_bytes(), name


def test_sums_by_block_are_numpy_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "BLOCK", 7)
    draw = np.random.default_rng(0)
    table, rows = draw.normal(size=(60, 5)).astype(np.float32), np.sort(draw.permutation(60)[:41])
    whole = table[rows].astype(np.float64)
    assert np.array_equal(points.total(table, rows) / 41, whole.mean(0))
    scale = unit_scale([table, 3 * table], rows)
    assert np.array_equal(scale[:5], np.full(5, 1 / np.sqrt(whole.var(0).sum()), np.float32))


def test_groups_by_block_take_any_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    rows, names = np.arange(3, 63), [f"g{n}" for n in draw.integers(0, 20, 60)]
    table = kmeans.unit_rows(draw.normal(size=(70, 6)))
    held = kmeans.gather(table, names, rows)
    by_block(monkeypatch)
    read = kmeans.gather(table, names, rows)
    assert not isinstance(read.points, np.ndarray) and held.names == read.names
    for wanted in (slice(None), slice(2, 9), np.array([5, 0, 5, 11])):
        assert np.array_equal(held.points[wanted], read.points[wanted])


def test_a_sample_finds_the_clusters_of_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.metrics import adjusted_rand_score

    draw = np.random.default_rng(2)
    truth = draw.integers(0, 4, 3000)
    values = 3 * np.eye(8)[truth] + 0.4 * draw.normal(size=(3000, 8))
    groups = kmeans.gather(kmeans.unit_rows(values - values.mean(0)), [str(n) for n in range(3000)])
    whole = kmeans.fit(groups, np.zeros(8), 4, 12, 0)
    monkeypatch.setattr(kmeans, "SAMPLE", 300)
    monkeypatch.setattr(kmeans, "_PER_CENTROID", 1)
    chosen = kmeans.sample(3000, 12, 0)
    assert isinstance(chosen, np.ndarray) and len(set(chosen.tolist())) == 300
    assert not np.array_equal(chosen, kmeans.sample(3000, 12, 1))
    some = kmeans.fit(groups, np.zeros(8), 4, 12, 0)
    assert not np.array_equal(whole.coarse, some.coarse)
    labels = [kmeans.closest(groups.points, found.coarse) for found in (whole, some)]
    assert adjusted_rand_score(truth, labels[1]) > 0.98 and adjusted_rand_score(*labels) > 0.98
    monkeypatch.setattr(balance, "SAMPLE", 300)
    distance = kmeans.distances(groups.points, some.coarse)
    shares = np.bincount((distance + balance.offsets(distance, groups.clips)).argmin(1), minlength=4) / 3000
    assert np.abs(shares - 0.25).max() < 0.04


def test_up_to_a_bound_all_groups_are_fitted_on() -> None:
    assert kmeans.sample(kmeans.SAMPLE, 48, 0) == slice(None)
    assert kmeans.sample(25_600, 100, 0) == slice(None)  # 256 for each of 100 fine centroids
    assert len(kmeans.sample(kmeans.SAMPLE + 1, 48, 0)) == kmeans.SAMPLE  # type: ignore[arg-type]


def test_groups_are_dealt_to_the_smallest_cluster_first_in_rank() -> None:
    """What the search through all clusters gave, without the search."""
    clips = np.random.default_rng(3).integers(1, 4, 200)
    generator = np.random.default_rng([5, 0x6374, 0])
    sizes, expected, ranks = np.zeros(7, np.int64), np.zeros(200, np.int64), generator.permutation(7)
    for group in generator.permutation(200):
        cluster = int(np.lexsort((ranks, sizes))[0])
        expected[group] = cluster
        sizes[cluster] += clips[group]
    assert controls.deal(clips, 7, 5).tolist() == expected.tolist()


def test_the_silhouette_s_sample_is_evenly_spaced() -> None:
    assert quality.spaced(3000).tolist() == list(range(3000))
    assert len(quality.spaced(10_000)) == 3000 and quality.spaced(10_000)[[0, -1]].tolist() == [0, 9999]


CHILD = """
import resource, sys
import numpy as np
import sklearn.cluster
from archipel.partition import kmeans, points
from archipel.partition.points import Points, Side

table = np.memmap(sys.argv[1], np.float32, "r", shape=(60_000, 128))  # 61 MB as float64
points.HELD = kmeans.HELD = 1 << 20
rows = np.arange(len(table))
resident = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) // 1024
kmeans.SAMPLE, kmeans._PER_CENTROID = 1000, 1
small = Points(Side([table[:2000]]), np.zeros(128, np.float32))
kmeans.fit(kmeans.gather(small, [str(n) for n in range(2000)]), np.zeros(128), 4, 8, 0)  # what libraries take for themselves
before = resident()
seen = Points(Side([table]), np.zeros(128, np.float32))
groups = kmeans.gather(seen, [str(n) for n in rows], rows)
found = kmeans.fit(groups, np.zeros(128), 4, 8, 0)
assert len(kmeans.closest(groups.points, found.coarse)) == len(table)
print(resident() - before)
"""


def test_memory_stays_bounded_where_points_do_not_fit(tmp_path: Path) -> None:
    """The points alone would take 61 MB, twice (clips and groups). The mapped file's 31 MB may be resident."""
    values = np.memmap(tmp_path / "table", np.float32, "w+", shape=(60_000, 128))
    values[:] = np.random.default_rng(0).standard_normal((60_000, 128), np.float32)
    values.flush()
    words = [sys.executable, "-c", CHILD, str(tmp_path / "table")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 31 + 45
