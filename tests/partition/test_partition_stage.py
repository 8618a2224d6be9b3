"""The stage on a run whose features have known clusters."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

from archipel import store
from archipel.cache import open_kind
from archipel.errors import ArchipelError, MissingStageError, Stopped
from archipel.manifest import read_manifest
from archipel.partition.stage import load_assignment, nearest, partition, unit_scale
from archipel.progress import StopFlag
from archipel.run import Run

Make = Callable[..., Any]


def files_of(run: Run) -> dict[str, bytes]:
    roots = (run.partition, run.root / "shards")
    return {
        str(p.relative_to(run.root)): p.read_bytes() for root in roots for p in sorted(root.rglob("*")) if p.is_file()
    }


def test_finds_known_clusters_and_reports_them(make_run: Make, make_blobs: Make) -> None:
    features, groups, truth = make_blobs([20, 12, 8])
    run = make_run(features, groups, k=3, fine=12)
    partition(run)
    cluster = load_assignment(run)
    assert adjusted_rand_score(truth, cluster) == 1.0
    numbers = store.read_json(run.partition / "quality.json")
    train = np.array([clip.split == "train" for clip in read_manifest(run.manifest)])
    assert sorted(numbers["sizes"]["clips"]["train"]) == sorted(np.bincount(truth[train]).tolist())
    assert sum(sum(sizes) for sizes in numbers["sizes"]["clips"].values()) == len(truth)
    assert sum(sum(sizes) for sizes in numbers["sizes"]["groups"].values()) == len(set(groups))
    assert numbers["silhouette"] > 0.8
    assert numbers["stability"]["mean"] == 1.0
    assert numbers["fine"]["centroids"] == 8  # a third of 24 training groups, fewer than the 12 asked for
    assert sum(numbers["fine"]["share"]) == pytest.approx(1.0)
    assert nearest(run, features).tolist() == cluster.tolist()


def test_groups_stay_whole_even_where_their_clips_disagree(make_run: Make) -> None:
    generator = np.random.default_rng(3)
    features = generator.normal(size=(90, 6))
    groups = generator.integers(0, 30, 90).tolist()
    run = make_run(features, groups, k=4, fine=20)
    partition(run)
    owner: dict[int, set[int]] = {}
    for group, cluster in zip(groups, load_assignment(run), strict=True):
        owner.setdefault(group, set()).add(int(cluster))
    assert all(len(clusters) == 1 for clusters in owner.values())


def test_fits_on_train_alone(make_run: Make, make_blobs: Make) -> None:
    features, groups, _ = make_blobs([15, 15])
    run = make_run(features, groups, name="plain", k=2)
    partition(run)
    held_out = np.array([clip.split != "train" for clip in read_manifest(run.manifest)])
    moved = features.copy()
    moved[held_out] = np.random.default_rng(5).normal(size=moved[held_out].shape) * 50
    other = make_run(moved, groups, name="moved", k=2)
    partition(other)
    name = "centroids.safetensors"
    assert (run.partition / name).read_bytes() == (other.partition / name).read_bytes()
    assert np.array_equal(load_assignment(run)[~held_out], load_assignment(other)[~held_out])


@pytest.mark.parametrize("method", ["kmeans", "random"])
@pytest.mark.parametrize("balanced", [False, True])
def test_same_bytes_again_on_any_number_of_threads(make_run: Make, method: str, balanced: bool) -> None:
    features = np.random.default_rng(0).normal(size=(160, 32))
    groups = (np.arange(160) // 2).tolist()
    runs = [make_run(features, groups, name=name, k=3, fine=16, method=method, balanced=balanced) for name in "ab"]
    partition(runs[0])
    with threadpool_limits(limits=4):
        partition(runs[1])
    assert files_of(runs[0]) == files_of(runs[1])


def test_random_control_is_even_whole_and_not_semantic(make_run: Make, make_blobs: Make) -> None:
    features, groups, truth = make_blobs([40, 20, 20])
    run = make_run(features, groups, k=3, method="random")
    partition(run)
    cluster = load_assignment(run)
    clips = read_manifest(run.manifest)
    for split in ("train", "validation", "test"):
        sizes = np.bincount(cluster[[clip.split == split for clip in clips]], minlength=3)
        assert sizes.max() - sizes.min() <= 2  # one group of two clips
    assert adjusted_rand_score(truth, cluster) < 0.1
    assert len({(clip.group, int(cluster[row])) for row, clip in enumerate(clips)}) == 80


def test_balanced_bounds_every_cluster(make_run: Make, make_blobs: Make) -> None:
    features, groups, _ = make_blobs([40, 5, 5])
    run = make_run(features, groups, k=3, balanced=True)
    partition(run)
    train = store.read_json(run.partition / "quality.json")["sizes"]["clips"]["train"]
    assert max(train) <= -(-sum(train) // 3) - 1 + 2
    assert min(train) >= 2


def test_held_out_clips_of_a_balanced_partition_follow_the_rule_of_the_training_clips(make_run: Make) -> None:
    """By distance alone the centroid with the most training clips around it would take nearly all of them."""
    generator = np.random.default_rng(7)
    features = np.concatenate([generator.normal(size=(300, 8)) + 2, generator.normal(size=(60, 8)) - 2])
    run = make_run(features, list(range(360)), k=3, balanced=True)
    partition(run)
    cluster, manifest = load_assignment(run), read_manifest(run.manifest)
    train = np.array([clip.split == "train" for clip in manifest])
    followed = nearest(run, features)
    assert np.array_equal(followed[~train], cluster[~train])
    assert np.abs(np.bincount(followed[train], minlength=3) / train.sum() - 1 / 3).max() < 0.02
    shares = np.bincount(cluster[~train], minlength=3) / (~train).sum()
    assert shares.min() > 0.2 and shares.max() < 0.47
    offset = store.map_tensors(run.partition / "centroids.safetensors")["offset"]
    assert offset.min() == 0 and offset.max() > 0


def test_every_expert_has_clips_where_all_features_are_alike(make_run: Make) -> None:
    run = make_run(np.ones((40, 4)), (np.arange(40) // 2).tolist(), k=4)
    partition(run)
    numbers = store.read_json(run.partition / "quality.json")
    assert min(numbers["sizes"]["clips"]["train"]) >= 2
    assert numbers["moved_groups"] > 0


def test_refusals_name_numbers_and_write_nothing(make_run: Make) -> None:
    features, groups = np.random.default_rng(0).normal(size=(10, 4)), list(range(10))
    many = make_run(features, groups, name="many", k=7)
    with pytest.raises(ArchipelError, match=r"partition\.k = 7 .* at most 6"):
        partition(many)
    single = make_run(features, groups, name="single", k=4)
    with pytest.raises(ArchipelError, match=r"clusters of .* training clips"):
        partition(single)
    straddling = make_run(features, [0] * 10, name="straddling", splits=["train"] * 5 + ["test"] * 5, k=2)
    with pytest.raises(ArchipelError, match=r"'group 0' has clips in train and in test \(clip 5\.webp\)"):
        partition(straddling)
    for run in (many, single, straddling):
        assert not (run.partition / "card.json").exists()
        with pytest.raises(MissingStageError, match="archipel partition"):
            load_assignment(run)


def test_idempotent_and_continues_after_a_stop(make_run: Make, make_blobs: Make) -> None:
    features, groups, _ = make_blobs([12, 12])
    run = make_run(features, groups, k=2)
    stop = StopFlag()
    stop.signal = 2
    with pytest.raises(Stopped):
        partition(run, stop)
    assert not run.done(run.partition)
    partition(run)
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*") if path.is_file() and path.suffix != ".log"}
    partition(run)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert "clips per cluster" in run.log("partition").read_text()


def test_sheets_and_captions_show_the_nearest_clips_of_each_cluster(make_run: Make, make_blobs: Make) -> None:
    features, groups, _ = make_blobs([20, 12])
    run = make_run(features, groups, k=2)
    partition(run)
    captions = json.loads((run.partition / "captions.json").read_text())
    table = pq.read_table(run.partition / "assignment.parquet").to_pylist()
    assert set(table[0]) == {"id", "group", "split", "cluster", "fine", "distance"}
    by_id = {row["id"]: row for row in table}
    for which in range(2):
        shown = captions[str(which)]
        assert all(by_id[item["id"]]["cluster"] == which and by_id[item["id"]]["split"] == "train" for item in shown)
        assert [item["distance"] for item in shown] == sorted(item["distance"] for item in shown)
        assert len({by_id[item["id"]]["group"] for item in shown}) == len(shown)
        picture = np.asarray(Image.open(run.partition / f"sheet-{which}.png"))
        row = int(shown[0]["id"], 16)
        assert picture[6 + 48, 6 + 48].tolist() == [row] * 3  # the first cell shows the nearest clip's pixels
    assert not store.check_card(run.partition)


def test_features_are_the_configured_ones(make_run: Make, make_blobs: Make) -> None:
    features, groups, _ = make_blobs([12, 12])
    run = make_run(features, groups, k=2, features="efficientnet")
    partition(run)
    card = store.read_card(run.partition, "partition")
    assert card is not None
    assert card["features"].endswith("/efficientnet-appearance")
    with pytest.raises(ArchipelError, match="width 8"):
        nearest(run, np.zeros((2, 5)))
    assert np.array_equal(nearest(run, features[:, ::-1].astype(np.float32)), load_assignment(run))


def test_says_which_stage_is_missing(make_run: Make) -> None:
    run = make_run(np.ones((4, 2)), [0, 1, 2, 3], k=2)
    (run.clips / "card.json").unlink()
    with pytest.raises(MissingStageError, match="archipel prepare"):
        partition(run)


@pytest.mark.parametrize("settings", [{}, {"balanced": True}, {"method": "random"}])
def test_one_cluster_is_everything(make_run: Make, make_blobs: Make, settings: dict[str, Any]) -> None:
    features, groups, _ = make_blobs([6, 6], per_group=1)
    run = make_run(features, groups, k=1, **settings)
    partition(run)
    assert not load_assignment(run).any()
    assert store.read_json(run.partition / "quality.json")["silhouette"] is None
    whole, only = (store.map_tensors(run.shard(name) / "train.safetensors") for name in ("monolith", "0"))
    assert all(np.array_equal(whole[key], only[key]) for key in whole)


def test_the_partition_s_seed_is_its_own(make_run: Make) -> None:
    generator = np.random.default_rng(3)
    features, groups = generator.normal(size=(60, 6)), np.repeat(np.arange(30), 2).tolist()

    def clusters(name: str, **part: Any) -> list[int]:
        run = make_run(features, groups, name=name, k=3, method="random", **part)
        partition(run)
        return load_assignment(run).tolist()

    plain = clusters("plain")
    assert clusters("same", seed=0) == plain != clusters("other", seed=1)


def test_two_features_side_by_side_count_alike_whatever_their_scale(make_run: Make, make_blobs: Make) -> None:
    values, groups, truth = make_blobs([20, 12, 8], noise=0.02)
    run = make_run(values, groups, k=3, features="appearance+motion")
    partition(run)
    raw = [np.asarray(open_kind(run.cache, "features")[f"efficientnet-{one}"][:]) for one in ("appearance", "motion")]
    train = np.flatnonzero([clip.split == "train" for clip in read_manifest(run.manifest)])
    scaled = np.concatenate(raw, 1) * unit_scale(raw, train)
    width = values.shape[1]
    for part in (scaled[:, :width], scaled[:, width:]):
        assert part[train].var(0).sum() == pytest.approx(1, rel=1e-5)
    cluster = load_assignment(run)
    assert adjusted_rand_score(truth, cluster) == 1.0
    assert nearest(run, np.concatenate(raw, 1)).tolist() == cluster.tolist()  # raw: the scale is in the partition
    card = store.read_card(run.partition)
    assert card is not None and card["features"].endswith("/efficientnet-appearance+efficientnet-motion")
    still = [raw[0], np.zeros_like(raw[1])]  # clips of one frame have no motion: nothing is divided by zero
    assert np.isfinite(unit_scale(still, train)).all()


def test_one_feature_leaves_no_scale_behind(make_run: Make, make_blobs: Make) -> None:
    values, groups, _ = make_blobs([10, 10])
    run = make_run(values, groups, k=2, features="motion")
    partition(run)
    assert "scale" not in store.map_tensors(run.partition / "centroids.safetensors")
    motion = np.asarray(open_kind(run.cache, "features")["efficientnet-motion"][:])
    assert nearest(run, motion).tolist() == load_assignment(run).tolist()
