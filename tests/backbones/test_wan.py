"""Wan, and flux with packed tokens, from the dials of a run: what every expert must do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from archipel import config
from archipel.backbones import base, flops, networks, registry
from archipel.backbones.router import FluxRouter, build_router
from archipel.contracts import Conditioning
from archipel.errors import ConfigError
from archipel.flow.losses import prediction_loss
from archipel.flow.path import interpolate
from archipel.training import precision

NAMES = ("flux", "wan")
L = 6


def settings(name: str, router: dict[str, Any] | None = None, **changes: Any) -> config.RunConfig:
    """A run of tiny clips whose tokens are 2x2 latent positions; ``changes`` go into its section "expert"."""
    expert = {"width": 32, "heads": 2, "rope_axes": [4, 6, 6], "double_blocks": 1, "single_blocks": 1, "patch": 2}
    small = {"width": 16, "heads": 1, "rope_axes": [4, 6, 6], "blocks": 1}
    return config.build(
        {
            "clips": {"size": 16, "frames": 6},
            "codec": {"patch": [2, 4, 4], "channels": 4},
            "text": {"tokens": L},
            "expert": {"backbone": name, **expert, **changes},
            "router": {**small, **(router or {})},
        }
    )


def fill(model: base.Backbone, seed: int = 1) -> base.Backbone:
    """Random weights instead of zeros, since a fresh network answers zero to everything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def awake(name: str, **changes: Any) -> base.Denoiser:
    return fill(registry.build_expert(settings(name, **changes), seed=0))  # type: ignore[return-value]


def inputs(seed: int = 2) -> tuple[Tensor, Tensor, Conditioning]:
    """Three clips; their captions have 6, 3 and no tokens."""
    g, mask = torch.Generator().manual_seed(seed), torch.arange(L)[None] < torch.tensor([L, 3, 0])[:, None]
    cond = Conditioning(torch.randn(3, L, 384, generator=g) * mask[..., None], mask, torch.randn(3, 384, generator=g))
    return torch.randn(3, 4, 3, 4, 4, generator=g), torch.tensor([0.1, 0.6, 1.0]), cond


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_expert_answers_zero_is_made_from_its_seed_and_learns(name: str) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model, again, other = (registry.build_expert(settings(name), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    x, t, cond = inputs()
    noise, x0 = x, x.flip(2) * 0.5 + 1
    assert not model(x, t, cond).any()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(30):
        loss = prediction_loss("velocity", model.predict(interpolate(x0, noise, t), t, cond), x0, noise, t).mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    silent = [n for n, p in model.network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == [], "what starts at zero must not hold anything back for good"


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_block_starts_as_the_identity(name: str) -> None:
    """Where only the last projection is opened, the answer does not depend on what the blocks hold."""
    model, (x, t, cond) = registry.build_expert(settings(name), seed=0), inputs()
    model.network.proj_out.weight.normal_(generator=torch.Generator().manual_seed(0))
    plain = model(x, t, cond)
    assert plain.abs().max() > 0.1 and len(model.blocks()) == 2
    for number, p in enumerate(p for block in model.blocks() for p in block.parameters()):
        if p.any():  # what starts at zero is what makes it so
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    torch.testing.assert_close(model(x, t, cond), plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_captions_times_and_places_reach_the_network_and_padding_does_not(name: str) -> None:
    model, (x, t, cond) = awake(name), inputs()
    plain = model(x, t, cond)
    assert plain.shape == x.shape and bool(plain.isfinite().all())
    garbage = torch.where(cond.mask[..., None], cond.tokens, 50.0)
    torch.testing.assert_close(model(x, t, Conditioning(garbage, cond.mask, cond.pooled)), plain)
    other = model(x, t, Conditioning(cond.tokens + cond.mask[..., None], cond.mask, cond.pooled)) - plain
    assert other[:2].abs().amax((1, 2, 3, 4)).min() > 1e-3 and other[2].abs().max() < 1e-5
    assert (model(x, t * 0.9, cond) - plain).abs().amax((1, 2, 3, 4)).min() > 1e-4
    pooled = model(x, t, Conditioning(cond.tokens, cond.mask, cond.pooled + 1)) - plain
    assert (pooled.abs().max() > 1e-3) == (name == "flux"), "Wan reads no pooled vector"
    for axis in (2, 3, 4):  # swap whole tokens: without places the answer would be swapped with them
        swapped = x.roll(x.shape[axis] // 2 if axis > 2 else 1, axis)
        back = model(swapped, t, cond).roll(-(x.shape[axis] // 2) if axis > 2 else -1, axis)
        assert (back - plain).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [{}, {"patch": 1}, {"tasks": [1, 1, 0, 0]}, {"double_blocks": 0, "width": 48}])
def test_closed_form_flops_and_parameters_are_what_torch_counts(name: str, change: dict[str, Any]) -> None:
    if "width" in change:
        change = {**change, "rope_axes": [8, 8, 8]}
    small = settings(name, **change)
    model, (x, t, cond) = registry.build_expert(small, seed=0), inputs()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, t, cond)
    assert counter.get_total_flops() == 3 * flops.expert_forward_flops(small)
    assert model.parameters_total == flops.expert_parameters(small)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_given_frames_enter_by_columns_that_start_at_zero(name: str) -> None:
    plain, told = (registry.build_expert(settings(name, tasks=t), seed=0) for t in ([1, 0, 0, 0], [1, 5, 1, 1]))
    for model in (plain, told):
        model.network.proj_out.weight.normal_(generator=torch.Generator().manual_seed(0))
    x, t, cond = inputs()
    given = torch.randn(3, 5, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(told(x, t, cond.given(given)), plain(x, t, cond), rtol=0, atol=1e-6)
    fill(told)
    none = told(x, t, cond)
    assert torch.equal(told(x, t, cond.given(torch.zeros_like(given))), none), "no frame given: zeros"
    for channel in (0, 3, 4):
        one = torch.zeros_like(given)
        one[:, channel, 0] = 1
        assert (told(x, t, cond.given(one)) - none).abs().amax((1, 2, 3, 4)).min() > 1e-4


@torch.no_grad()
def test_a_router_packs_tokens_and_reads_given_frames() -> None:
    config = settings("wan", router={"reads_image": True}, tasks=[1, 1, 0, 0])
    router = build_router(config, seed=0)
    x, t, cond = inputs()
    assert router.facts["patch"] == 2 and router.facts["image"] is True and not router(x, t, cond).any()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        router(x, t, cond)
    assert counter.get_total_flops() == 3 * flops.router_forward_flops(config)
    assert isinstance(fill(router), FluxRouter)
    moved = router(x, t, cond.given(torch.ones(3, 5, 3, 4, 4))) - router(x, t, cond)
    assert moved.abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_ends_are_float32_and_blocks_are_not_under_bfloat16(name: str) -> None:
    model, (x, t, cond) = awake(name), inputs()
    with torch.no_grad():
        plain = model(x, t, cond)
    seen: dict[str, Any] = {}
    precision.keep_float32(model.ends())
    precision.norms_in_input_dtype(model)
    ends = [m for end in model.ends() for m in end.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv3d)]
    for number, module in enumerate(ends):
        module.register_forward_hook(lambda *call, n=number: seen.update({f"end {n}": call[-1].dtype}))
    inside = next(m for m in model.blocks()[0].modules() if isinstance(m, torch.nn.Linear))
    inside.register_forward_hook(lambda *call: seen.update(inside=call[-1].dtype))
    with precision.autocast("bfloat16", "cpu")():
        half = model(x, t, cond)
        half.square().mean().backward()
    assert seen.pop("inside") == torch.bfloat16
    assert len(seen) == len(ends) and set(seen.values()) == {torch.float32}
    assert half.dtype == torch.float32
    assert 0 < (half - plain).abs().max() < 0.1 * plain.abs().max()


def test_the_cluster_is_told_only_to_a_backbone_with_a_pooled_vector() -> None:
    with pytest.raises(ConfigError, match="reads none"):
        networks.expert_network(settings("wan"), clusters=3)
    told = networks.expert_network(settings("flux"), clusters=3)
    assert told["pooled_projection_dim"] == networks.expert_network(settings("flux"))["pooled_projection_dim"] + 3
