"""Shards carry the latents of first and last frames where expert.tasks gives them, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archipel import cache, store
from archipel import config as configuration
from archipel.errors import DamagedError
from archipel.manifest import Clip, write_manifest
from archipel.partition.shards import write_shards
from archipel.run import Run
from archipel.training.batches import Clips

N, C, T, H, W = 10, 3, 2, 2, 2


def make_run(root: Path, *, tasks: list[float], stills: bool = True, phases: int = 1) -> Run:
    """Every array of clip i is i, its stills i + 0.25 and i + 0.5, its further windows 100 p more."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sections: dict[str, Any] = {"expert": {"tasks": tasks}, "partition": {"k": 2}, "clips": {"phases": phases}}
    run = Run.create(root, configuration.build(sections))
    clips = [
        Clip(
            f"{i:016x}", f"{i:064x}", f"{i}.mp4", f"caption {i}", f"group {i}", "train" if i < 7 else "validation", 0.1
        )
        for i in range(N)
    ]
    write_manifest(run.manifest, clips)
    value = np.arange(N, dtype=np.float32)
    latents = {"latents": value.reshape(-1, 1, 1, 1, 1) + np.zeros((1, C, T, H, W), np.float32)}
    for name, more in (("first", 0.25), ("last", 0.5)) if stills else ():
        latents[name] = latents["latents"][:, :, 0] + np.float32(more)
    if phases > 1:
        shift = 100 * np.arange(1, phases, dtype=np.float32)
        for name in list(latents):
            array = latents[name][:, None]
            added = array + shift.reshape(1, -1, *[1] * (array.ndim - 2))
            latents["phases" if name == "latents" else f"phases_{name}"] = added
    text = {
        "tokens": np.zeros((N, 4, 5), np.float32),
        "mask": np.ones((N, 4), bool),
        "pooled": np.zeros((N, 6), np.float32),
    }
    for kind, arrays in (("latents", latents), ("text", text)):
        entry = cache.build(
            run.cache, kind, {}, N, lambda a, b, t=arrays: {k: v[a:b] for k, v in t.items()}, run_id=run.id, label=kind
        )
        cache.set_index(run.cache, {kind: entry.folder.name})
    run.partition.mkdir()
    pq.write_table(
        pa.table({"id": [c.id for c in clips], "cluster": np.arange(N) % 2}), run.partition / "assignment.parquet"
    )
    store.write_card(run.partition, "partition", run.id, ["assignment.parquet"])
    return run


def test_stills_go_with_their_clips(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tasks=[1, 5, 1, 1], phases=3)
    write_shards(run)
    for name, split in (("0", "train"), ("1", "validation"), ("monolith", "train")):
        path = run.shard(name) / f"{split}.safetensors"
        found, row = store.map_tensors(path), store.map_tensors(path)["row"]
        assert len(row) and Clips(path).stills
        for key, more in (("first", 0.25), ("last", 0.5)):
            assert found[key].shape == (len(row), C, H, W) and found[key].dtype == np.float32
            assert (found[key] == row.reshape(-1, 1, 1, 1) + more).all()
            assert (f"phases_{key}" in found) == (split == "train"), "further windows are for training only"
        if split == "train":
            assert found["phases_last"].shape == (len(row), 2, C, H, W)
            assert (found["phases_last"][:, 1] == row.reshape(-1, 1, 1, 1) + 200.5).all()


def test_runs_that_give_no_frames_carry_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tasks=[1, 0, 0, 0])
    write_shards(run)
    path = run.shard("0") / "train.safetensors"
    assert {"first", "last"}.isdisjoint(store.map_tensors(path)) and not Clips(path).stills


def test_a_cache_without_stills_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tasks=[0, 1, 0, 0], stills=False)
    with pytest.raises(DamagedError, match=r"expert\.tasks = .* gives: run `archipel prepare` again"):
        write_shards(run)
