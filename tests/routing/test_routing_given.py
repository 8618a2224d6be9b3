"""A router that is given frames: the same mix in training, validation and calibration; one that is not sees none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from archipel import store
from archipel.backbones import base
from archipel.backbones.router import build_router, load_router_network
from archipel.config import build
from archipel.contracts import Conditioning
from archipel.errors import DamagedError
from archipel.flow import given
from archipel.routing import objective
from archipel.routing.objective import RouterObjective, answer, chosen
from archipel.routing.router import load_router
from archipel.run import ROUTER, Run
from archipel.training.batches import Clips, Shard

N, C, T, H, W = 64, 2, 2, 1, 1
HEAD = given.only("head")


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """Clips of pure noise whose first frame alone says the cluster."""
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        cluster = np.arange(N, dtype=np.int64) % 2
        sign = (2.0 * cluster - 1).astype(np.float32)
        tensors = {
            "latents": generator.normal(size=(N, C, T, H, W)).astype(np.float32),
            "first": np.broadcast_to(sign[:, None, None, None], (N, C, H, W)),
            "last": np.zeros((N, C, H, W), np.float32),
            "tokens": np.zeros((N, 2, 3), np.float32),
            "mask": np.ones((N, 2), bool),
            "pooled": np.zeros((N, 2), np.float32),
            "cluster": cluster,
            "row": np.arange(N) + (1000 if split == "train" else 0),
        }
        store.write_tensors(tmp_path / f"{split}.safetensors", tensors)
    return Shard(Clips(tmp_path / "train.safetensors"), Clips(tmp_path / "validation.safetensors"))


class Reads(nn.Module):
    """Certain by the sign of a given first frame; knows nothing where there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        assert cond.image is not None
        self.seen.append(cond.image)
        told = cond.image[:, 0, 0, 0, 0] * 4
        return torch.stack([-told, told], 1)


def test_training_validation_and_calibration_give_the_same_mix(shard: Shard) -> None:
    network = Reads()
    router = RouterObjective(network, shard, 2, seed=0, batch=32, tasks=HEAD)
    assert float(router.loss(router.batch(0)).max()) < 0.01
    assert router.validate()["accuracy"] == 1.0 and router.validate()["without_text"] < 0.01
    rows = chosen(shard.validation)
    found = answer(network, shard.validation, rows, seed=3, tasks=HEAD)
    assert (found.logits.argmax(-1) == found.labels).all(), "with and without the caption: a frame is no caption"
    mixed = RouterObjective(network, shard, 2, seed=0, batch=32, tasks=(1.0, 1.0, 0.0, 0.0))
    half = mixed.validate()["with_text"]
    assert half == pytest.approx(np.log(2) / 2, abs=0.06), "half of the clips are given nothing"
    drawn = answer(network, shard.validation, rows, seed=3, tasks=(1.0, 1.0, 0.0, 0.0))
    again = answer(network, shard.validation, rows, seed=3, tasks=(1.0, 1.0, 0.0, 0.0))
    assert np.array_equal(drawn.logits, again.logits)
    blank = (drawn.logits == 0).all(-1)[0]
    assert abs(blank.mean() - 0.5) < 0.06 and 0 < blank.mean(axis=(0, 1)).max() < 1, "drawn anew for every noise"
    # without a mix no frame is read, and what is answered is what it was
    plain = answer(lambda x, t, c: x.mean((2, 3, 4)), shard.validation, rows, seed=3)
    told = answer(lambda x, t, c: x.mean((2, 3, 4)), shard.validation, rows, seed=3, tasks=HEAD)
    assert np.array_equal(plain.logits, told.logits) and np.array_equal(plain.times, told.times)


def test_settings_of_a_run() -> None:
    mix = [1.0, 5.0, 0.0, 0.0]
    plain = build({"expert": {"tasks": mix, "text_dropout": 0.1}})
    assert objective.tasks(plain) is None and objective.dropout(plain) == 0.1
    reads = build(
        {"expert": {"tasks": mix, "text_dropout": 0.1, "pooled_dropout": 0.3}, "router": {"reads_image": True}}
    )
    assert objective.tasks(reads) == tuple(mix) and objective.dropout(reads) == 0.3


def test_the_network_reads_given_frames_only_where_it_should(tmp_path: Path) -> None:
    small = {"width": 12, "heads": 1, "rope_axes": [4, 4, 4]}
    sections = {
        "clips": {"size": 8, "frames": 8}, "codec": {"kind": "pixels", "patch": [4, 4, 4]}, "text": {"tokens": 5},
        "partition": {"k": 2}, "expert": {**small, "tasks": [1.0, 5.0, 1.0, 1.0]},
    }  # fmt: skip
    shape = (192, 2, 2, 2)
    x, t = torch.randn(3, *shape), torch.full((3,), 0.5)
    cond = Conditioning(torch.zeros(3, 5, 384), torch.ones(3, 5, dtype=torch.bool), torch.randn(3, 384))
    image = torch.randn(3, 193, 2, 2, 2)
    runs = {}
    for reads in (False, True):
        config = build({**sections, "router": {**small, "blocks": 1, "reads_image": reads}})
        run = runs[reads] = Run.create(tmp_path / str(reads), config)
        network = build_router(run.config, seed=0)
        for p in network.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            told, alone = network(x, t, cond.given(image)), network(x, t, cond)
            nothing = network(x, t, cond.given(torch.zeros_like(image)))
        assert torch.equal(told, alone) != reads and torch.equal(nothing, alone)
        files = base.save(network, run.expert(ROUTER))
        store.write_card(run.expert(ROUTER), "expert", run.id, files, network=network.facts)
        assert load_router_network(run.expert(ROUTER)).image is reads
        assert load_router(run, uncalibrated=True).experts == 2
    odd = Run(runs[True].root, runs[False].config, runs[True].id)
    with pytest.raises(DamagedError, match=r"reads given frames, run.toml has router\.reads_image = false"):
        load_router(odd, uncalibrated=True)
