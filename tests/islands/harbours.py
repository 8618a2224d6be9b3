"""A small run in a bucket on this disk: published as `publish` does it, results committed and admitted by hand.

Tests read it with ``runpy`` and take its fixtures into their own names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from archipel import config as configuration
from archipel import store
from archipel.backbones import base
from archipel.backbones.registry import build_expert
from archipel.backbones.router import build_router
from archipel.contracts import Conditioning
from archipel.encoders.codecs import Pixels
from archipel.flow import draws
from archipel.islands import keys
from archipel.islands.claims import claim, read_state
from archipel.islands.objects import Objects, encode
from archipel.islands.publish import publish
from archipel.progress import StopFlag
from archipel.routing.calibration import Calibration
from archipel.routing.router import model_hash, seal
from archipel.run import MONOLITH, ROUTER, Run

K, TOKENS, WIDTH = 3, 5, 384
SMALL = {"width": 12, "heads": 1, "rope_axes": [4, 4, 4]}
SETTINGS: dict[str, Any] = {
    "clips": {"size": 8, "frames": 4, "fps": 4.0},
    "codec": {"kind": "pixels", "patch": [4, 4, 4]},
    "text": {"tokens": TOKENS},
    "partition": {"k": K},
    "expert": {**SMALL, "double_blocks": 1, "single_blocks": 1},
    "router": {**SMALL, "blocks": 1},
    "sample": {"steps": 3, "guidance": 2.0},
}
LATENT = (192, 1, 2, 2)


class Letters:
    """A text encoder that makes numbers of a caption's letters."""

    name, tokens, width, pooled_width = "letters", TOKENS, WIDTH, WIDTH

    def encode(self, captions: Sequence[str]) -> Conditioning:
        rows = [torch.from_numpy(draws.normals(sum(map(ord, text)), range(TOKENS), (WIDTH,))) for text in captions]
        tokens = torch.stack(rows).float()
        return Conditioning(tokens, torch.ones(len(captions), TOKENS, dtype=torch.bool), tokens.mean(1))


def train(run: Run, name: str, seed: int) -> None:
    """A result as `train` leaves it: weights, configuration, metrics and the card."""
    folder = run.expert(name)
    make = build_router if name == ROUTER else build_expert
    network: base.Backbone = make(run.config, seed=seed)
    g = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    files = base.save(network, folder)
    store.append_jsonl(folder / "metrics.jsonl", {"step": 1, "loss": 1.0 + seed})
    kind = "router" if name == ROUTER else "expert"
    store.write_card(folder, kind, run.id, [*files, "metrics.jsonl"], name=name, network=network.facts)


def shard(run: Run, name: str) -> None:
    folder = run.shard(name)
    for split in ("train", "validation"):
        store.write_tensors(folder / f"{split}.safetensors", {"row": np.arange(5)})
    store.write_card(folder, "shard", run.id, ["train.safetensors", "validation.safetensors"], prior=[0.5, 0.3, 0.2])


class Harbour:
    """``run``: the folder where everything was trained; ``root``: the bucket's folder, which starts as published only."""

    def __init__(self, run: Run, root: Path) -> None:
        self.run, self.root = run, root

    @property
    def url(self) -> str:
        return self.root.as_uri()

    def copy_to(self, url: str) -> None:
        """The bucket as it is, in another store."""
        objects = Objects.open(url)
        for path in sorted(self.root.rglob("*")):
            if path.is_file():
                objects.put(path.relative_to(self.root).as_posix(), path)

    @property
    def objects(self) -> Objects:
        return Objects.open(self.url)

    def commit(self, *names: str) -> None:
        """What an island does when it has trained a job."""
        for name in names:
            objects = self.objects
            held = claim(objects, read_state(objects, name), "island-test")
            assert held is not None
            folder, key = self.run.expert(name), keys.result(name, held.fence)
            for file in ("model.safetensors", "config.json", "metrics.jsonl", "card.json"):
                objects.put(f"{key}/{file}", folder / file)
            value = {"format": 1, "name": name, "fence": held.fence, "nonce": held.nonce, "key": key}
            value["sha256"] = store.sha256_file(folder / "card.json")
            assert objects.create(keys.committed(name), encode(value))

    def admit(self, *names: str, calibrated: bool = True) -> None:
        """What the owner's `admit` leaves in the bucket when every rule was kept."""
        for name in names:
            objects, folder = self.objects, self.run.expert(name)
            sha256, files = store.sha256_file(folder / "card.json"), ["model.safetensors", "config.json", "card.json"]
            if name == ROUTER and calibrated and not (folder / "calibration.json").exists():
                fitted = Calibration(np.full((2, 2), 2.0), np.array([0.2, 0.8]), np.array([0.5, 0.3, 0.2]))
                marks = {"format": 1, "run": self.run.id, "model_sha256": model_hash(folder)}
                store.write_json(folder / "calibration.json", seal({**marks, **fitted.to_json()}))
            if name == ROUTER and calibrated:
                files.append("calibration.json")
            listed = {}
            for file in files:
                objects.put(keys.admitted(sha256, file), folder / file)
                listed[file] = {"sha256": store.sha256_file(folder / file), "bytes": (folder / file).stat().st_size}
            fence = read_state(objects, name).fence
            pointer = {"format": 1, "kind": "admitted", "run": self.run.id, "name": name, "sha256": sha256}
            objects.put(keys.admitted(name), json.dumps({**pointer, "fence": fence, "files": listed}).encode())


@pytest.fixture(scope="session")
def harbours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("harbour")
    run = Run.create(root / "owner", configuration.build(SETTINGS))
    Pixels((4, 4, 4), 0.1, 0.6).save(run.codec, run.id)
    for name in [*run.expert_names, MONOLITH]:
        shard(run, name)
    with StopFlag() as stop:
        publish(run, str(root / "bucket"), stop)
    for number, name in enumerate(run.job_names):
        train(run, name, number)
    return root


@pytest.fixture
def harbour(harbours: Path, tmp_path: Path) -> Harbour:
    """A published run of K = 3 whose jobs were trained in ``harbour.run`` and are to be committed and admitted."""
    shutil.copytree(harbours, tmp_path / "harbour")
    return Harbour(Run.open(tmp_path / "harbour" / "owner"), tmp_path / "harbour" / "bucket")


@pytest.fixture
def letters() -> Letters:
    return Letters()


@pytest.fixture
def train_by_hand() -> Callable[[Run, str, int], None]:
    return train
