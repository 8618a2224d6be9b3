"""Shards hold exactly what a job trains on, and say so with checksums."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from archipel import store
from archipel.errors import DamagedError
from archipel.manifest import read_manifest, rows_of
from archipel.partition.shards import INIT, carries_start, write_rows, write_shards
from archipel.partition.stage import load_assignment, partition
from archipel.run import TRUNK, Run

Make = Callable[..., Any]


@pytest.fixture
def parted(make_run: Make, make_blobs: Make) -> Run:
    features, groups, _ = make_blobs([9, 8, 7])
    run: Run = make_run(features, groups, k=3)
    partition(run)
    return run


def test_each_shard_holds_its_cluster_and_all_holds_everything(parted: Run) -> None:
    clips, cluster = read_manifest(parted.manifest), load_assignment(parted)
    for name in ("0", "1", "2", "monolith"):
        for split in ("train", "validation"):
            tensors = store.map_tensors(parted.shard(name) / f"{split}.safetensors")
            rows = np.array(rows_of(clips, split))  # type: ignore[arg-type]
            wanted = rows if name == "monolith" else rows[cluster[rows] == int(name)]
            assert tensors["row"].tolist() == wanted.tolist()
            assert tensors["cluster"].tolist() == cluster[wanted].tolist()
            # every tensor's rows were made from the manifest row's number
            for key in ("latents", "tokens", "pooled"):
                assert tensors[key].dtype == np.float32
                assert np.array_equal(tensors[key][(slice(None), *[0] * (tensors[key].ndim - 1))], wanted)
            assert np.array_equal(tensors["mask"].sum(1), wanted % 4 + 1)
            assert tensors["latents"].shape[1:] == (3, 1, 2, 2)
    assert parted.shard("router") == parted.shard("monolith")


def test_no_shard_holds_a_test_clip_and_clusters_are_disjoint(parted: Run) -> None:
    clips = read_manifest(parted.manifest)
    seen: list[int] = []
    for name in parted.expert_names:
        for split in ("train", "validation"):
            seen += store.map_tensors(parted.shard(name) / f"{split}.safetensors")["row"].tolist()
    assert len(seen) == len(set(seen))
    assert {clips[row].split for row in seen} == {"train", "validation"}


def test_cards_verify_and_name_a_damaged_file(parted: Run) -> None:
    for name in ("0", "1", "2", "all"):
        folder = parted.root / "shards" / name
        card = store.read_card(folder, "shard")
        assert card is not None
        assert store.check_card(folder) == []
        assert card["run"] == parted.id
        assert card["cluster"] == (None if name == "all" else int(name))
        assert card["latent_shape"] == [3, 1, 2, 2]
        assert card["text_shape"] == [4, 5]
        assert card["pooled_width"] == 6
    whole = store.read_card(parted.shard("monolith"), "shard")
    assert whole is not None
    train = store.map_tensors(parted.shard("monolith") / "train.safetensors")["cluster"]
    assert whole["prior"] == (np.bincount(train, minlength=3) / len(train)).tolist()
    path = parted.shard("1") / "train.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert [problem.path for problem in store.check_card(parted.shard("1"))] == [path]


def test_torn_or_foreign_shards_are_made_again_and_whole_ones_kept(parted: Run) -> None:
    torn, kept = parted.shard("0") / "train.safetensors", parted.shard("1") / "train.safetensors"
    whole, before = torn.read_bytes(), kept.stat().st_mtime_ns
    torn.write_bytes(whole[:-5])
    card = store.read_json(parted.shard("2") / "card.json")
    store.write_sealed(parted.shard("2") / "card.json", {**card, "source": {"assignment": "other"}})
    write_shards(parted)
    assert torn.read_bytes() == whole
    assert kept.stat().st_mtime_ns == before
    assert store.read_json(parted.shard("2") / "card.json") == card


def test_written_rows_are_what_the_reference_reader_reads(tmp_path: Any) -> None:
    generator = np.random.default_rng(0)
    tensors = {"wide": generator.normal(size=(600, 3)).astype(np.float32), "flag": generator.random((600, 5)) > 0.5}
    rows = generator.permutation(600)[:517]
    write_rows(tmp_path / "x.safetensors", tensors, rows, {"row": rows})
    for loaded in (load_file(tmp_path / "x.safetensors"), store.map_tensors(tmp_path / "x.safetensors")):
        assert set(loaded) == {"wide", "flag", "row"}
        assert all(np.array_equal(loaded[key], tensors[key][rows]) for key in tensors)
        assert np.array_equal(loaded["row"], rows)


def test_a_cluster_may_have_no_validation_clip(tmp_path: Any) -> None:
    write_rows(
        tmp_path / "x.safetensors",
        {"a": np.ones((3, 2), np.float32)},
        np.empty(0, np.int64),
        {"row": np.empty(0, np.int64)},
    )
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded["a"].shape == (0, 2)
    assert store.map_tensors(tmp_path / "x.safetensors")["a"].shape == (0, 2)


def make_trunk(run: Run, weights: float) -> dict[str, Any]:
    """A trained shared start, and what shards say of it."""
    folder = run.expert(TRUNK)
    store.write_tensors(folder / "model.safetensors", {"w": np.full(3, weights, np.float32)})
    start = {"sha256": store.sha256_file(folder / "model.safetensors"), "flops": 7, "steps": 5}
    store.write_card(folder, "expert", run.id, ["model.safetensors"], **start, name=TRUNK)
    return start


@pytest.fixture
def warm(parted: Run) -> Run:
    """A warm run, partitioned before its trunk was trained."""
    part = parted.config.expert.model_copy(update={"warm_start": "trunk", "trunk_steps": 5})
    return Run(parted.root, parted.config.model_copy(update={"expert": part}), parted.id)


def test_the_shared_start_goes_into_every_shard_once_it_is_trained(warm: Run) -> None:
    write_shards(warm)
    assert not carries_start(warm) and not list(warm.root.rglob(INIT))
    before = {path: path.stat().st_mtime_ns for path in warm.root.glob("shards/*/*.safetensors")}
    cards = {name: store.read_card(warm.shard(name)) for name in ("0", "monolith")}
    start = make_trunk(warm, 1.0)
    write_shards(warm)
    assert carries_start(warm)
    for name in (*warm.expert_names, "monolith"):
        folder, card = warm.shard(name), store.read_card(warm.shard(name), "shard")
        assert card is not None and card["init"] == start and store.check_card(folder) == []
        assert (folder / INIT).read_bytes() == (warm.expert(TRUNK) / "model.safetensors").read_bytes()
        if name in cards:
            old = cards[name] or {}
            assert {key: card[key] for key in old if key not in ("files", "check")} == {
                key: old[key] for key in old if key not in ("files", "check")
            }
    assert {path: path.stat().st_mtime_ns for path in before} == before  # the clips are not written again
    stamps = {path: path.stat().st_mtime_ns for path in warm.root.glob("shards/*/*")}
    write_shards(warm)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    again = make_trunk(warm, 2.0)
    write_shards(warm)
    assert {(store.read_card(warm.shard(name)) or {})["init"]["sha256"] for name in ("0", "2")} == {again["sha256"]}


def test_shards_that_brought_the_start_along_keep_it(warm: Run) -> None:
    make_trunk(warm, 1.0)
    write_shards(warm)
    shutil.rmtree(warm.expert(TRUNK))
    stamps = {path: path.stat().st_mtime_ns for path in warm.root.glob("shards/*/*")}
    write_shards(warm)
    assert carries_start(warm) and {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_damaged_trunk_is_carried_nowhere(warm: Run) -> None:
    make_trunk(warm, 1.0)
    path = warm.expert(TRUNK) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(DamagedError, match="trunk is not what its card says"):
        write_shards(warm)
