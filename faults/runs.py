"""A small run, ready to be published: shards of structured noise instead of clips, so that it is made in a moment.

Islands do not look at what clips show: jobs, sizes and steps are what they would be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from archipel import config, store
from archipel.backbones import flops
from archipel.encoders.codecs import PatchPCA
from archipel.run import MONOLITH, Run
from archipel.training import budget

SMALL: dict[str, Any] = {
    "clips": {"count": 40, "size": 8, "frames": 4},
    "codec": {"patch": [2, 4, 4], "channels": 6},
    "text": {"tokens": 4},
    "partition": {"k": 2},
    "expert": {
        "width": 32, "heads": 2, "rope_axes": [4, 6, 6], "double_blocks": 1, "single_blocks": 1, "batch": 4,
        "warmup": 4, "lr": 3e-3,
    },
    "router": {"width": 8, "heads": 1, "rope_axes": [4, 2, 2], "blocks": 1, "batch": 4},
    "evaluate": {"frames": 2},
    "islands": {"heartbeat": 2.0, "lease": 10.0},
}  # fmt: skip


def make_run(root: Path, *, steps: int, every: int, others: int = 0, seed: int = 0, **islands: float) -> Run:
    """A run whose jobs are two experts and the router of ``steps`` steps and the monolith of about as many.

    ``others``: steps of router and monolith, where not those. A checkpoint is written every ``every`` steps. The
    same arguments give the same bytes.
    """
    pace = {"steps": steps, "checkpoint_every": every, "validate_every": max(10, steps // 4)}
    over: dict[str, Any] = {
        "run": {"seed": seed},
        "expert": pace,
        "router": pace | {"steps": others or steps},
        "monolith": {"steps": others},
        "islands": islands,
    }
    run = Run.create(root, budget.resolve(config.build(config.merge(SMALL, over))))
    for name in (*run.expert_names, MONOLITH):
        _write_shard(run, name)
    patch, channels = run.config.codec.patch, run.config.codec.channels
    values = np.random.Generator(np.random.PCG64(1)).standard_normal((3 * patch[0] * patch[1] * patch[2], channels))
    basis = torch.from_numpy(np.linalg.qr(values)[0].T.astype(np.float32).copy())
    codec = PatchPCA(patch, 0.0, torch.zeros(basis.shape[1]), basis, torch.ones(channels), 1.0, 1.0)
    codec.save(run.codec, run.id)
    return run


def _tensors(run: Run, count: int, first: int, cluster: int | None) -> dict[str, np.ndarray]:
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


def _write_shard(run: Run, name: str) -> None:
    folder, k = run.shard(name), run.config.partition.k
    cluster = None if name == MONOLITH else int(name)
    first = 0 if cluster is None else 1000 * (cluster + 1)
    store.write_tensors(folder / "train.safetensors", _tensors(run, 24, first, cluster))
    store.write_tensors(folder / "validation.safetensors", _tensors(run, 8, first + 500, cluster))
    files = ["train.safetensors", "validation.safetensors"]
    more: dict[str, Any] = {"counts": {"train": 24, "validation": 8}}
    if cluster is None:
        more["prior"] = [1 / k] * k
    store.write_card(folder, "shard", run.id, files, cluster=cluster, clusters=k, **more)
