"""A run whose cache was filled by hand: features with known clusters, latents and text that name their row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archipel import cache, store
from archipel import config as configuration
from archipel.manifest import Clip, write_manifest
from archipel.run import Run

LATENT, TEXT, POOLED = (3, 1, 2, 2), (4, 5), 6


def split_of(group: int) -> str:
    return ("train", "train", "validation", "train", "test")[group % 5]


def fill_run(
    root: Path, values: np.ndarray, groups: list[int], splits: list[str] | None = None, **partition: Any
) -> Run:
    """values (N, D) are the features, with the group of each row; every other cache entry is made from the row number."""
    n = len(values)
    run = Run.create(
        root, configuration.build({"partition": partition, "evaluate": {"arms": ["top1"], "primary": "KID-clips"}})
    )
    splits = splits or [split_of(group) for group in groups]
    clips = [
        Clip(f"{row:016x}", f"{row:064x}", f"{row}.webp", f"caption {row}", f"group {groups[row]}", splits[row], 0.1)  # type: ignore[arg-type]
        for row in range(n)
    ]
    write_manifest(run.manifest, clips)
    store.write_card(run.clips, "clips", run.id, ["manifest.parquet"])

    rows = np.arange(n, dtype=np.float32)
    mask = np.arange(TEXT[0])[None] <= (np.arange(n)[:, None] % TEXT[0])
    arrays = {
        "pixels": {"clips": (np.arange(n)[:, None, None, None, None] + np.zeros((n, 4, 8, 8, 3))).astype(np.uint8)},
        "latents": {"latents": rows[:, None, None, None, None] + np.zeros((n, *LATENT), np.float32)},
        "text": {
            "tokens": rows[:, None, None] + np.zeros((n, *TEXT), np.float32),
            "mask": mask,
            "pooled": rows[:, None] + np.zeros((n, POOLED), np.float32),
        },
        "features": {
            "transnet": values.astype(np.float32),
            "efficientnet-appearance": values[:, ::-1].astype(np.float32),
            "efficientnet-motion": (1000 * np.sin(3 * values)).astype(np.float32),
        },
    }
    index = {}
    for kind, tensors in arrays.items():

        def make(begin: int, end: int, tensors: dict[str, np.ndarray] = tensors) -> dict[str, np.ndarray]:
            return {name: values[begin:end] for name, values in tensors.items()}

        index[kind] = cache.build(
            run.cache, kind, {"v": 1}, n, make, run_id=run.id, label=kind, per_shard=7
        ).folder.name
    cache.set_index(run.cache, index)
    return run


def blobs(
    sizes: list[int], per_group: int = 2, width: int = 8, noise: float = 0.15, seed: int = 0
) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Groups around orthogonal directions: features (N, D), group (N,), true cluster (N,); ``sizes`` counts groups."""
    generator = np.random.default_rng(seed)
    truth = np.repeat(np.arange(len(sizes)), sizes)
    truth = truth[generator.permutation(len(truth))]
    centres = 3 * np.eye(width)[truth] + noise * generator.normal(size=(len(truth), width))
    of_clip = np.repeat(np.arange(len(truth)), per_group)
    features = centres[of_clip] + 0.05 * generator.normal(size=(len(of_clip), width)) + 7.0
    return features, of_clip.tolist(), truth[of_clip]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    def make(values: np.ndarray, groups: list[int], name: str = "run", **rest: Any) -> Run:
        return fill_run(tmp_path / name, values, groups, **rest)

    return make


@pytest.fixture
def make_blobs() -> Callable[..., tuple[np.ndarray, list[int], np.ndarray]]:
    return blobs
