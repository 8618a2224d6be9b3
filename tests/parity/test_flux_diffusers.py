"""The flux adapter against diffusers' own call, written out by hand, and its files against diffusers' own readers."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from archipel import config, store
from archipel.backbones import base, flops, registry, router
from archipel.contracts import Conditioning

SMALL = {
    "clips": {"size": 16, "frames": 4},
    "codec": {"patch": [2, 8, 4], "channels": 5},
    "text": {"tokens": 6},
    "expert": {"width": 32, "heads": 2, "rope_axes": [4, 6, 6], "double_blocks": 2, "single_blocks": 1},
    "router": {"width": 16, "heads": 1, "rope_axes": [4, 6, 6], "blocks": 2},
}


@pytest.fixture
def small() -> config.RunConfig:
    return config.build(SMALL)


def awake(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Fill every parameter with numbers, since a fresh model answers zero to everything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def conditioning(rows: int, tokens: int, real: list[int], seed: int = 2) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(tokens)[None] < torch.tensor(real)[:, None]
    return Conditioning(
        torch.randn(rows, tokens, 384, generator=generator), mask, torch.randn(rows, 384, generator=generator)
    )


def expert(small: config.RunConfig, seed: int = 0) -> base.Denoiser:
    return registry.build_expert(small, seed=seed)


def noisy(small: config.RunConfig, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, *flops.latent_shape(small), generator=generator), torch.tensor([0.1, 0.6, 1.0][:rows])


@torch.no_grad()
def test_velocity_is_what_diffusers_computes_when_called_directly(small: config.RunConfig) -> None:
    model = awake(expert(small))
    (x, t), cond = noisy(small, 3), conditioning(3, 6, [6, 3, 0])
    B, _, T, H, W = x.shape
    tokens, ids = [], []
    for frame in range(T):
        for row in range(H):
            for column in range(W):
                tokens.append(x[:, :, frame, row, column])
                ids.append([float(frame), float(row), float(column)])
    mask = torch.ones(B, 1, 1, 6 + T * H * W, dtype=torch.bool)
    mask[1, ..., 3:6] = False
    mask[2, ..., 0:6] = False
    direct = model.network(
        hidden_states=torch.stack(tokens, 1),
        encoder_hidden_states=cond.tokens,
        pooled_projections=cond.pooled,
        timestep=t,
        img_ids=torch.tensor(ids),
        txt_ids=torch.zeros(6, 3),
        joint_attention_kwargs={"attention_mask": mask},
    ).sample
    ours = model.velocity(x, t, cond)
    assert ours.shape == x.shape
    for number, (frame, row, column) in enumerate([[int(v) for v in i] for i in ids]):
        torch.testing.assert_close(ours[:, :, frame, row, column], direct[:, number], rtol=0, atol=0)
    torch.testing.assert_close(model(x, t, cond), ours, rtol=0, atol=0)


@torch.no_grad()
def test_output_depends_neither_on_what_padding_holds_nor_on_how_long_it_is(small: config.RunConfig) -> None:
    model = awake(expert(small))
    (x, t), cond = noisy(small, 3), conditioning(3, 6, [5, 3, 0])
    plain = model.velocity(x, t, cond)
    garbage = torch.where(cond.mask[..., None], cond.tokens, 50.0)
    torch.testing.assert_close(model.velocity(x, t, Conditioning(garbage, cond.mask, cond.pooled)), plain)
    wide = Conditioning(
        torch.cat([cond.tokens, 7 * torch.ones(3, 9, 384)], 1),
        torch.cat([cond.mask, torch.zeros(3, 9, dtype=torch.bool)], 1),
        cond.pooled,
    )
    torch.testing.assert_close(model.velocity(x, t, wide), plain, rtol=1e-4, atol=1e-5)
    # What is masked does matter where it is real, or the test above would hold for a network that is deaf to text.
    other = Conditioning(cond.tokens + 1.0, cond.mask, cond.pooled)
    assert (model.velocity(x, t, other) - plain)[:2].abs().max() > 1e-3
    torch.testing.assert_close(model.velocity(x, t, other)[2], plain[2])


@torch.no_grad()
def test_time_and_place_reach_the_network(small: config.RunConfig) -> None:
    model = awake(expert(small))
    (x, t), cond = noisy(small, 3), conditioning(3, 6, [6, 3, 1])
    plain = model.velocity(x, t, cond)
    assert (model.velocity(x, t * 0.9, cond) - plain).abs().amax((1, 2, 3, 4)).min() > 1e-3
    turned = model.velocity(x.flip(2), t, cond).flip(2)  # no RoPE along time: the same
    assert (turned - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["expert", "router"])
def test_saved_files_open_with_diffusers_and_safetensors_alone(small: config.RunConfig, kind: str, tmp_path) -> None:
    build = registry.build_expert if kind == "expert" else router.build_router
    model = awake(build(small, seed=0))
    names = base.save(model, tmp_path)
    read = json.loads((tmp_path / "config.json").read_text())
    assert read["_class_name"] == "FluxTransformer2DModel"
    theirs = FluxTransformer2DModel.from_config(read).eval()
    theirs.load_state_dict(load_file(tmp_path / "model.safetensors"))
    (x, t), cond = noisy(small, 2), conditioning(2, 6, [6, 2])
    store.write_card(tmp_path, "expert", "run", names, network=model.facts)
    load = registry.load_denoiser if kind == "expert" else router.load_router_network
    again = load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(x, t, cond), model(x, t, cond), rtol=0, atol=0)
        again.network = theirs  # as diffusers computes it: see flux_blocks
        torch.testing.assert_close(again(x, t, cond), model(x, t, cond), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [32, 96])
def test_closed_form_flops_are_those_that_torch_counts(width: int) -> None:
    values = config.merge(SMALL, {"expert": {"width": width, "rope_axes": [width // 4, width // 8, width // 8]}})
    small = config.build(values)
    (x, t), cond = noisy(small, 2), conditioning(2, 6, [6, 2])
    for build, closed in (
        (registry.build_expert, flops.expert_forward_flops(small)),
        (router.build_router, flops.router_forward_flops(small)),
    ):
        model = build(small, seed=0)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            output = model(x, t, cond)
        assert counter.get_total_flops() / 2 == pytest.approx(closed, rel=0.01)
        with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
            output.sum().backward()
        # Gradients towards the inputs of the first layers are not computed: a little under twice the forward.
        assert 0.85 <= backward.get_total_flops() / counter.get_total_flops() / 2 <= 1.0


def test_training_flops_of_the_default_expert_are_three_forwards_within_one_percent() -> None:
    default = config.RunConfig()
    model = registry.build_expert(default, seed=0)
    # A caption of full length: on a CPU padding is left out, and the ledger counts it.
    tokens = default.text.tokens
    x, cond = torch.randn(1, *flops.latent_shape(default)), conditioning(1, tokens, [tokens])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, torch.tensor([0.5]), cond).sum().backward()
    closed = flops.training_flops(flops.expert_forward_flops(default), steps=1, batch=1)
    assert counter.get_total_flops() == pytest.approx(closed, rel=0.01)
