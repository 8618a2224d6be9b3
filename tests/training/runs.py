"""Small runs with shards made of structured noise, for tests of training. Loaded by path (tests are no package)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from archipel import config, store
from archipel.backbones import flops
from archipel.run import MONOLITH, Run
from archipel.training import budget

SMALL = {
    "clips": {"count": 40, "size": 8, "frames": 4},
    "codec": {"patch": [2, 4, 4], "channels": 6},
    "text": {"tokens": 4},
    "partition": {"k": 2},
    "expert": {
        "width": 32, "heads": 2, "rope_axes": [4, 6, 6], "double_blocks": 1, "single_blocks": 1, "steps": 24, "batch": 4,
        "warmup": 4, "validate_every": 10, "checkpoint_every": 5, "lr": 3e-3,
    },
    "router": {"width": 8, "heads": 1, "rope_axes": [4, 2, 2], "blocks": 1, "steps": 10, "batch": 4},
    "evaluate": {"frames": 2},
}  # fmt: skip


def make_run(root: Path, **over: dict) -> Run:
    """A run with its shards, as if prepared and partitioned. ``over``: sections on top of ``SMALL``."""
    resolved = budget.resolve(config.build(config.merge(SMALL, over)))
    run = Run.create(root, resolved)
    for name in (*run.expert_names, MONOLITH):
        write_shard(run, name)
    return run


def tensors(run: Run, count: int, first: int, cluster: int | None) -> dict[str, np.ndarray]:
    """Clips whose latents have one sign per cluster, and captions that say which."""
    shape, (L, D, P) = flops.latent_shape(run.config), flops.text_shape(run.config)
    rows = np.arange(first, first + count, dtype=np.int64)
    rng = np.random.Generator(np.random.PCG64(first))
    clusters = np.full(count, cluster, np.int64) if cluster is not None else rows % run.config.partition.k
    sign = (2.0 * (clusters % 2) - 1).astype(np.float32)
    latents = 0.3 * rng.standard_normal((count, *shape), dtype=np.float32) + sign[:, None, None, None, None]
    mask = np.arange(L)[None] < 1 + rows[:, None] % L
    tokens = rng.standard_normal((count, L, D), dtype=np.float32) * mask[..., None]
    pooled = (0.1 * rng.standard_normal((count, P), dtype=np.float32) + sign[:, None]).astype(np.float32)
    return {"latents": latents, "tokens": tokens, "mask": mask, "pooled": pooled, "cluster": clusters, "row": rows}


def write_shard(run: Run, name: str, train: int = 12, validation: int = 4) -> None:
    folder = run.shard(name)
    cluster = None if name == MONOLITH else int(name)
    first = 0 if cluster is None else 1000 * (cluster + 1)
    store.write_tensors(folder / "train.safetensors", tensors(run, train, first, cluster))
    store.write_tensors(folder / "validation.safetensors", tensors(run, validation, first + 500, cluster))
    store.write_card(folder, "shard", run.id, ["train.safetensors", "validation.safetensors"], cluster=cluster)
