"""Order, noise, time and dropout are functions of (seed, step, item) and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from archipel import store
from archipel.errors import ArchipelError, DamagedError, MissingStageError
from archipel.run import MONOLITH
from archipel.training.batches import numbered, open_shard, training_batch, validation_batches

ARGUMENTS = {"shift": 1.0, "text_dropout": 0.5}


def test_a_batch_is_the_same_whatever_was_drawn_before(small_run) -> None:
    clips = open_shard(small_run.shard("0")).train
    late = training_batch(clips, 7, 9, 5, **ARGUMENTS)
    torch.manual_seed(0)
    np.random.seed(0)
    for step in range(9):
        training_batch(clips, 7, step, 5, **ARGUMENTS)
    again = training_batch(open_shard(small_run.shard("0")).train, 7, 9, 5, **ARGUMENTS)
    for name in ("x0", "noise", "t", "cluster", "x_t"):
        assert torch.equal(getattr(late, name), getattr(again, name)), name
    assert torch.equal(late.cond.pooled, again.cond.pooled)
    other = training_batch(clips, 8, 9, 5, **ARGUMENTS)
    assert not torch.equal(late.noise, other.noise)


def test_a_clip_meets_the_same_noise_in_the_experts_and_the_monoliths_batch(small_run) -> None:
    # The monolith's shard, with expert 0's clips among its rows, as a real partition has it.
    own = store.map_tensors(small_run.shard("0") / "train.safetensors")
    others = store.map_tensors(small_run.shard("1") / "train.safetensors")
    both = {name: np.concatenate([others[name], own[name]]) for name in own}
    folder = small_run.shard(MONOLITH)
    store.write_tensors(folder / "train.safetensors", both)
    store.write_card(folder, "shard", small_run.id, ["train.safetensors", "validation.safetensors"])
    seen = []
    for name, size in (("0", 12), (MONOLITH, 24)):
        clips = open_shard(small_run.shard(name)).train
        batch = training_batch(clips, 3, 0, size, **ARGUMENTS)
        seen.append({batch.x0[i].sum().item(): i for i in range(size)} | {"batch": batch})
    shared = [key for key in seen[0] if key in seen[1] and key != "batch"]
    assert len(shared) == 12
    for key in shared:
        a, b = seen[0]["batch"], seen[1]["batch"]
        i, j = seen[0][key], seen[1][key]
        assert torch.equal(a.noise[i], b.noise[j]) and a.t[i] == b.t[j]
        assert torch.equal(a.cond.mask[i], b.cond.mask[j])


def test_every_clip_is_seen_once_an_epoch(small_run) -> None:
    clips = open_shard(small_run.shard("0")).train
    sums = [training_batch(clips, 0, step, 4, **ARGUMENTS).x0.sum((1, 2, 3, 4)).tolist() for step in range(6)]
    first, second = ([x for part in half for x in part] for half in (sums[:3], sums[3:]))
    assert len(set(first)) == 12 and sorted(first) == sorted(second) and first != second


def test_a_clip_that_a_large_batch_holds_twice_gets_two_noises(small_run) -> None:
    clips = open_shard(small_run.shard("0")).train
    batch = training_batch(clips, 0, 0, 30, **ARGUMENTS)
    assert len({tuple(n.flatten().tolist()) for n in batch.noise}) == 30
    assert len(set(batch.t.tolist())) == 30
    assert numbered([5, 6, 5, 5]) == [5, 6, 5 + 2**40, 5 + 2**41]


def test_text_is_dropped_as_often_as_asked_and_whole(small_run) -> None:
    clips = open_shard(small_run.shard("0")).train
    batches = [training_batch(clips, 0, step, 32, shift=1.0, text_dropout=0.3) for step in range(40)]
    dropped = torch.cat([~batch.cond.mask.any(1) for batch in batches])
    assert abs(dropped.float().mean() - 0.3) < 0.06
    tokens, pooled = torch.cat([b.cond.tokens for b in batches]), torch.cat([b.cond.pooled for b in batches])
    assert not tokens[dropped].any() and not pooled[dropped].any()
    assert pooled[~dropped].abs().amax(1).min() > 0
    kept = training_batch(clips, 0, 0, 32, shift=1.0, text_dropout=0.0)
    assert kept.cond.mask.any(1).all()


def test_the_path_joins_clip_and_noise(small_run) -> None:
    batch = training_batch(open_shard(small_run.shard("0")).train, 0, 0, 8, **ARGUMENTS)
    t = batch.t[:, None, None, None, None]
    torch.testing.assert_close(batch.x_t, (1 - t) * batch.x0 + t * batch.noise)
    noise = torch.cat(
        [training_batch(open_shard(small_run.shard("0")).train, 0, s, 8, **ARGUMENTS).noise for s in range(9)]
    )
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_validation_noise_is_fixed_and_apart_from_training_noise(small_run) -> None:
    clips = open_shard(small_run.shard("0")).validation
    first, again = (list(validation_batches(clips, 0, 0.5, bin_number=2, limit=64)) for _ in range(2))
    other = list(validation_batches(clips, 0, 0.5, bin_number=3, limit=64))
    assert len(first) == 1 and len(first[0]) == 4 and (first[0].t == 0.5).all()
    assert torch.equal(first[0].noise, again[0].noise) and not torch.equal(first[0].noise, other[0].noise)
    few = list(validation_batches(clips, 0, 0.5, bin_number=2, limit=3, chunk=2))
    assert [len(batch) for batch in few] == [2, 1]
    assert not list(validation_batches(clips, 0, 0.5, bin_number=2, limit=0))


def test_shards_that_are_missing_damaged_or_empty_are_named(small_run) -> None:
    folder = small_run.shard("0")
    data = (folder / "train.safetensors").read_bytes()
    (folder / "train.safetensors").write_bytes(data[:-4])
    with pytest.raises(DamagedError, match=r"train\.safetensors"):
        open_shard(folder)
    flipped = bytearray(data)
    flipped[-5] ^= 4
    (folder / "train.safetensors").write_bytes(flipped)
    with pytest.raises(DamagedError, match="sha256"):
        open_shard(folder)
    empty = {name: array[:0] for name, array in store.map_tensors(small_run.shard("1") / "train.safetensors").items()}
    store.write_tensors(folder / "train.safetensors", empty)
    store.write_card(folder, "shard", small_run.id, ["train.safetensors", "validation.safetensors"])
    with pytest.raises(ArchipelError, match=r"partition\.k"):
        open_shard(folder)
    halved = dict(store.map_tensors(small_run.shard("1") / "train.safetensors"))
    halved["mask"] = halved["mask"].astype(np.int64)
    store.write_tensors(folder / "train.safetensors", halved)
    store.write_card(folder, "shard", small_run.id, ["train.safetensors", "validation.safetensors"])
    with pytest.raises(DamagedError, match="mask is int64"):
        open_shard(folder)
    (folder / "card.json").unlink()
    with pytest.raises(MissingStageError, match="archipel partition"):
        open_shard(folder)
