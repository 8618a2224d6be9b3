"""LTX's rotary tables, which are kept while a shape is asked for, against diffusers' own, which are made at every call."""

from __future__ import annotations

import copy

import torch
from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed
from torch import nn

from archipel import config
from archipel.backbones import registry
from archipel.contracts import Conditioning

SETTINGS = {
    "clips": {"size": 128, "frames": 16},
    "codec": {"patch": [8, 32, 32], "channels": 16},
    "expert": {"backbone": "ltx", "patch": 1, "width": 24, "heads": 2, "rope_axes": [4, 4, 4]},
}


def test_tables_follow_the_shape_and_training_after_sampling_has_its_gradients() -> None:
    ours = registry.build_expert(config.build(SETTINGS), seed=0)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    theirs = copy.deepcopy(ours)
    theirs.network.rope.__class__ = LTXVideoRotaryPosEmbed
    g = torch.Generator().manual_seed(2)
    found: list[tuple[nn.Module, list[torch.Tensor]]] = [(ours, []), (theirs, [])]
    for rows, frames, side in ((1, 2, 4), (3, 2, 4), (2, 1, 4), (2, 2, 2), (2, 2, 4)):
        x = torch.randn(rows, 16, frames, side, side, generator=g)
        cond = Conditioning(
            torch.randn(rows, 12, 384, generator=g), torch.ones(rows, 12, dtype=torch.bool), torch.zeros(rows, 384)
        )
        for inside in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with inside():
                for model, kept in found:
                    output = model(x, torch.full((rows,), 0.5), cond)
                    kept.append(output.detach().clone())
                    if torch.is_grad_enabled():
                        model.zero_grad()
                        output.square().sum().backward()
                        kept += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(found[0][1]) == len(found[1][1]) > 30
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))
