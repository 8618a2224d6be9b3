"""Flux blocks in fewer passes against diffusers' own: the same bits where they are trained, 1e-5 where they generate."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel

from archipel import config
from archipel.backbones import base, flux, flux_blocks, registry, router
from archipel.contracts import Conditioning

SMALL = {
    "clips": {"size": 16, "frames": 4},
    "codec": {"patch": [2, 8, 4], "channels": 5},
    "text": {"tokens": 6},
    "expert": {"width": 32, "heads": 2, "rope_axes": [4, 6, 6], "double_blocks": 1, "single_blocks": 2},
    "router": {"width": 16, "heads": 1, "rope_axes": [4, 6, 6], "blocks": 2},
}


def pair(kind: str) -> tuple[base.Backbone, base.Backbone]:
    """Ours, and the same weights in a network that diffusers made and nobody touched."""
    settings = config.build(SMALL)
    build = registry.build_expert if kind == "expert" else router.build_router
    ours, theirs = build(settings, seed=0), build(settings, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    plain = FluxTransformer2DModel.from_config(base.diffusers_config(ours.network))
    plain.load_state_dict(ours.network.state_dict())
    theirs.network = plain
    return ours, theirs


def inputs(real: list[int], frames: int = 2) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    g, rows = torch.Generator().manual_seed(2), len(real)
    mask = torch.arange(6)[None] < torch.tensor(real)[:, None]
    cond = Conditioning(torch.randn(rows, 6, 384, generator=g), mask, torch.randn(rows, 384, generator=g))
    return torch.randn(rows, 5, frames, 2, 4, generator=g), torch.linspace(0.1, 1, rows), cond


@pytest.mark.parametrize("kind", ["expert", "router"])
def test_training_gives_diffusers_bits_forward_and_backward(kind: str) -> None:
    ours, theirs = pair(kind)
    x, t, cond = inputs([6, 2, 0])  # one caption fills the length, so nothing is cut
    found = []
    for model in (ours, theirs):
        output = model.train()(x, t, cond)
        output.square().sum().backward()
        found.append([output.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["expert", "router"])
@pytest.mark.parametrize("real", [[6, 2, 0], [3, 1, 0], [0, 0]])
def test_generating_agrees_with_diffusers_whatever_padding_is_cut(kind: str, real: list[int]) -> None:
    ours, theirs = (model.eval() for model in pair(kind))
    for frames in (2, 1, 2):  # tables of places follow the shape
        x, t, cond = inputs(real, frames)
        torch.testing.assert_close(ours(x, t, cond), theirs(x, t, cond), rtol=1e-4, atol=1e-5)


def test_padding_that_a_row_needs_stays() -> None:
    _, _, cond = inputs([4, 1, 0])
    short = flux.shortened(cond)
    assert short.tokens.shape[1] == short.mask.shape[1] == 4 and torch.equal(short.mask, cond.mask[:, :4])
    assert flux.shortened(cond.null()).tokens.shape[1] == 1  # an empty text is no text for a double block
    gap = Conditioning(cond.tokens, torch.tensor([[True, False, False, False, True, False]] * 3), cond.pooled)
    assert flux.shortened(gap).tokens.shape[1] == 5
    full = inputs([6, 1])[2]
    assert flux.shortened(full) is full


def test_processors_of_others_are_left_alone() -> None:
    ours, _ = pair("expert")
    mine = type("Mine", (flux_blocks.FluxAttnProcessor,), {})()
    ours.network.transformer_blocks[0].attn.processor = mine
    flux_blocks.quicken(ours.network)
    assert ours.network.transformer_blocks[0].attn.processor is mine
    assert base.diffusers_config(ours.network)["_class_name"] == "FluxTransformer2DModel"
