"""Closed forms of three backbones against torch's own counter, over what changes them."""

from __future__ import annotations

import diffusers
import pytest
import torch
from tests.tiny import CLASSES, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from archipel.backbones import counts_more

LATENT, TEXT = (4, 3, 8, 4), (6, 16, 12)


def counted(name: str, network: dict[str, object]) -> int:
    """What torch counts for one clip, without memory or arithmetic."""
    C, T, H, W = LATENT
    L, D, P = TEXT
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model = getattr(diffusers, CLASSES[name])(**network)
        text = {"encoder_hidden_states": torch.zeros(1, L, D), "timestep": torch.zeros(1)}
        mask = torch.ones(1, L)
        if name == "ltx":
            p, pt = network.get("patch_size", 1), network.get("patch_size_t", 1)
            grid = {"num_frames": T // pt, "height": H // p, "width": W // p}
            x = torch.zeros(1, grid["num_frames"] * grid["height"] * grid["width"], network["in_channels"])
            model(x, encoder_attention_mask=mask, **grid, **text)
        elif name == "hunyuan":
            guidance = torch.zeros(1) if network["guidance_embeds"] else None
            x, pooled = torch.zeros(1, C, T, H, W), torch.zeros(1, P)
            model(x, encoder_attention_mask=mask, pooled_projections=pooled, guidance=guidance, **text)
        else:
            model(torch.zeros(1, T, C, H, W), **text)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ltx", {}),
        ("ltx", {"num_layers": 1, "patch_size": 2, "in_channels": 16, "out_channels": 16}),
        ("ltx", {"num_attention_heads": 4, "attention_head_dim": 24, "cross_attention_dim": 96, "out_channels": 7}),
        ("hunyuan", {}),
        ("hunyuan", {"num_layers": 3, "num_refiner_layers": 2, "mlp_ratio": 4.0}),
        ("hunyuan", {"num_single_layers": 0, "patch_size": 1, "guidance_embeds": True, "out_channels": 2}),
        ("cogvideox", {"use_rotary_positional_embeddings": False}),
        ("cogvideox", {"num_layers": 1, "patch_size": 1, "time_embed_dim": 48, "out_channels": 3}),
        ("cogvideox", {"patch_size_t": 3, "attention_head_dim": 32}),
    ],
)
def test_closed_forms_are_what_torch_counts(name: str, change: dict[str, object]) -> None:
    network = {**tiny_config(name), **change}
    assert getattr(counts_more, name)(network, LATENT, TEXT) == counted(name, network)
