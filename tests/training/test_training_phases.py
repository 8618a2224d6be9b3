"""Training draws one of a clip's windows as a function of (seed, step, clip)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from archipel import store
from archipel.errors import DamagedError
from archipel.training.batches import Clips, training_batch


def shard(path: Path, phases: int, n: int = 6) -> Path:
    """Latents of window p of clip i are all 10 i + p."""
    latents = (10 * np.arange(n)[:, None] + np.arange(phases)).astype(np.float32)
    windows = np.broadcast_to(latents[:, :, None, None, None, None], (n, phases, 2, 1, 2, 2))
    tensors = {
        "latents": windows[:, 0],
        "tokens": np.zeros((n, 4, 3), np.float32),
        "mask": np.ones((n, 4), bool),
        "pooled": np.zeros((n, 3), np.float32),
        "cluster": np.zeros(n, np.int64),
        "row": np.arange(n),
    }
    store.write_tensors(path, tensors | ({"phases": windows[:, 1:]} if phases > 1 else {}))
    return path


def test_every_window_is_used_evenly_and_steps_repeat_exactly(tmp_path: Path) -> None:
    clips = Clips(shard(tmp_path / "a.safetensors", 3))
    seen = np.zeros(3)
    for step in range(200):
        batch = training_batch(clips, 5, step, 6, shift=1.0, text_dropout=0.0)
        values = batch.x0[:, 0, 0, 0, 0].numpy()
        assert sorted(values // 10) == [0, 1, 2, 3, 4, 5]
        seen += np.bincount((values % 10).astype(int), minlength=3)
    assert np.all(np.abs(seen / seen.sum() - 1 / 3) < 0.04)
    again = training_batch(clips, 5, 7, 6, shift=1.0, text_dropout=0.0)
    np.testing.assert_array_equal(again.x0, training_batch(clips, 5, 7, 6, shift=1.0, text_dropout=0.0).x0)


def test_one_window_is_as_before(tmp_path: Path) -> None:
    clips = Clips(shard(tmp_path / "a.safetensors", 1))
    batch = training_batch(clips, 5, 0, 6, shift=1.0, text_dropout=0.0)
    assert set((batch.x0[:, 0, 0, 0, 0].numpy() % 10).tolist()) == {0.0}


def test_windows_of_another_shape_are_damage(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.safetensors", 2)
    tensors = {name: np.array(value) for name, value in store.map_tensors(path).items()}
    store.write_tensors(path, tensors | {"phases": tensors["phases"][:3]})
    with pytest.raises(DamagedError, match="phases"):
        Clips(path)
