"""The switches of training meet every backbone: its blocks are the repeated ones, and nothing of its losses changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from archipel import config
from archipel.backbones import registry
from archipel.backbones.flops import latent_shape, text_shape
from archipel.contracts import Conditioning
from archipel.training import switches
from archipel.training.local import Local
from archipel.training.loop import Settings, Trainer

NAMES = ("flux", "wan", "ltx", "hunyuan", "cogvideox")


class Noise:
    """An expert of ``blocks`` blocks of each kind, with no weight at zero, that learns to give nothing."""

    def __init__(self, name: str, blocks: int) -> None:
        part = {"backbone": name, "width": 32, "heads": 2, "rope_axes": [4, 6, 6]}
        part |= {"double_blocks": blocks, "single_blocks": blocks}
        settings = config.build(
            {"clips": {"frames": 4, "size": 16}, "codec": {"patch": [2, 4, 4], "channels": 4}, "expert": part}
        )
        rng = torch.Generator().manual_seed(0)
        self.model, self.size = registry.build_expert(settings, seed=0), 2
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=rng))
        L, D, P = text_shape(settings)
        self._x = torch.randn(2, *latent_shape(settings), generator=rng)
        mask = torch.arange(L)[None] < torch.tensor([[L], [L - 2]])
        tokens = torch.randn(2, L, D, generator=rng) * mask[..., None]
        self._cond = Conditioning(tokens, mask, torch.randn(2, P, generator=rng))

    def batch(self, step: int, part: slice | None = None) -> Tensor:
        return torch.tensor([0.3, 0.9])

    def loss(self, batch: Tensor) -> Tensor:
        return self.model(self._x, batch, self._cond).square().flatten(1).mean(1)

    def validate(self) -> dict[str, Any]:
        return {}


def steps(name: str, blocks: int, **switched: Any) -> list[list[float]]:
    """Losses and gradient norms."""
    trainer = Trainer(Noise(name, blocks), Settings(2, 1e-3), Local(**switched))
    return [[float(value) for value in trainer.advance()] for _ in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_apart_from_what_stays_float32(name: str) -> None:
    model = Noise(name, 2).model
    blocks = model.blocks()
    assert len(blocks) == 4 and len({id(block) for block in blocks}) == 4
    inside = {id(module) for block in blocks for module in block.modules()}
    outside = {id(module) for end in model.ends() for module in end.modules()}
    assert inside.isdisjoint(outside)
    most = sum(p.numel() for block in blocks for p in block.parameters())
    assert most > 0.5 * model.parameters_total


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_bit(name: str) -> None:
    assert steps(name, 1, checkpointing=True, ema="host") == steps(name, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_block_of_a_kind_is_compiled_for_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph

    monkeypatch.setattr(switches, "BACKEND", backend)
    counts = []
    for blocks in (2, 3):
        torch.compiler.reset()
        graphs.clear()
        found = steps(name, blocks, compile=True)
        counts.append(len(graphs))
        torch.compiler.reset()
        for one, other in zip(found, steps(name, blocks), strict=True):
            assert one == pytest.approx(other, rel=1e-5)
    assert counts[0] == counts[1] > 0
