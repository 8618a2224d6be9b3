"""A tiny run whose parts are all real files: codec, captions and clips in the cache, experts and router of random weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from archipel import cache, store
from archipel import config as configuration
from archipel.backbones import base, flops
from archipel.backbones.registry import build_expert
from archipel.backbones.router import build_router
from archipel.encoders.codecs import Pixels, from_uint8, still_latents
from archipel.manifest import Clip, write_manifest
from archipel.routing.calibration import Calibration
from archipel.routing.router import model_hash, seal
from archipel.run import MONOLITH, ROUTER, Run

K, TOKENS, WIDTH = 3, 5, 384
CODEC = Pixels((4, 4, 4), 0.1, 0.6)
SMALL = {"width": 12, "heads": 1, "rope_axes": [4, 4, 4]}
SETTINGS: dict[str, Any] = {
    "clips": {"size": 8, "frames": 4, "fps": 4.0},
    "codec": {"kind": "pixels", "patch": [4, 4, 4]},
    "text": {"tokens": TOKENS},
    "partition": {"k": K},
    "expert": {**SMALL, "double_blocks": 1, "single_blocks": 1},
    "router": {**SMALL, "blocks": 1},
    "sample": {"steps": 3, "guidance": 2.0},
    "evaluate": {"count": 20, "showcase": 0},
}


def shake(network: torch.nn.Module, seed: int) -> None:
    """Weights of a network that has learned something: fresh ones answer zero."""
    g = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)


def train(run: Run, name: str, seed: int) -> None:
    folder = run.expert(name)
    clusters = flops.cluster_width(run.config) if name == MONOLITH else 0
    network: base.Backbone = build_expert(run.config, seed=seed, clusters=clusters)
    if name == ROUTER:
        network = build_router(run.config, seed=seed)
    shake(network, seed)
    files = base.save(network, folder)
    store.write_card(folder, "expert", run.id, files, network=network.facts)
    if name == ROUTER:
        fitted = Calibration(np.ones((2, 2)), np.array([0.2, 0.8]), np.array([0.5, 0.3, 0.2]))
        marks = {"format": 1, "run": run.id, "model_sha256": model_hash(folder)}
        store.write_json(folder / "calibration.json", seal({**marks, **fitted.to_json()}))


def fill_cache(run: Run, clips: list[Clip]) -> None:
    g = np.random.Generator(np.random.PCG64(0))
    n = len(clips)
    pixels = g.integers(0, 256, (n, run.config.clips.frames, 8, 8, 3), dtype=np.uint8)
    mask = np.arange(TOKENS)[None] <= np.arange(n)[:, None] % TOKENS
    tokens = g.standard_normal((n, TOKENS, WIDTH), dtype=np.float32) * mask[:, :, None]
    text = {"tokens": tokens, "mask": mask, "pooled": g.standard_normal((n, WIDTH), dtype=np.float32)}
    index, kinds = {}, {"pixels": {"clips": pixels}, "text": text}
    if run.config.expert.given_frames:
        latents = CODEC.encode(from_uint8(pixels))
        stills = {name: still_latents(CODEC, pixels[:, at], 4) for name, at in (("first", 0), ("last", -1))}
        kinds["latents"] = {name: value.numpy() for name, value in {"latents": latents, **stills}.items()}
    for kind, arrays in kinds.items():

        def make(begin: int, end: int, arrays: dict[str, np.ndarray] = arrays) -> dict[str, np.ndarray]:
            return {name: values[begin:end] for name, values in arrays.items()}

        entry = cache.build(run.cache, kind, {"v": 1}, n, make, run_id=run.id, label=kind)
        index[kind] = entry.folder.name
    cache.set_index(run.cache, index)


def build(root: Path, **sections: dict[str, Any]) -> Run:
    import pyarrow as pa
    import pyarrow.parquet as pq

    run = Run.create(root, configuration.build(configuration.merge(SETTINGS, sections)))
    splits = ["train", "validation", "test", "test"]
    clips = [
        # groups of one to three clips; group g lies in one split
        Clip(
            f"{row:016x}", f"{row:064x}", f"{row}.mp4", f"caption {row}", f"group {row % 12}", splits[row % 12 % 4], 0.1
        )  # type: ignore[arg-type]
        for row in range(30)
    ]
    write_manifest(run.manifest, clips)
    store.write_card(run.clips, "clips", run.id, ["manifest.parquet"])
    fill_cache(run, clips)
    CODEC.save(run.codec, run.id)
    run.partition.mkdir()
    cluster = np.array([row % 12 % K for row in range(30)])
    pq.write_table(pa.table({"cluster": cluster}), run.partition / "assignment.parquet")
    store.write_card(run.partition, "partition", run.id, ["assignment.parquet"])
    for number, name in enumerate([*run.expert_names, MONOLITH, ROUTER]):
        train(run, name, number)
    return run


@pytest.fixture(scope="session")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("whole") / "run").root


@pytest.fixture(scope="session")
def given_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two latent frames whose experts, monolith and router are given frames; to be read only."""
    sections: dict[str, Any] = {
        "clips": {"frames": 8},
        "expert": {"tasks": [1.0, 5.0, 1.0, 1.0]},
        "router": {"reads_image": True},
        "evaluate": {"count": 6, "arms": ["top1", "monolith"]},
    }
    return build(tmp_path_factory.mktemp("given") / "run", **sections).root


@pytest.fixture
def small_run(_whole: Path, tmp_path: Path) -> Run:
    """A copy of its own for every test."""
    return Run.open(shutil.copytree(_whole, tmp_path / "run"))


@pytest.fixture
def retrain() -> Callable[[Run, str, int], None]:
    return train


@pytest.fixture
def build_run(tmp_path: Path) -> Callable[..., Run]:
    return lambda **sections: build(tmp_path / "other", **sections)
