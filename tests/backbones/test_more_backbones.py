"""LTX-Video, HunyuanVideo and CogVideoX from the dials of a run: what every expert must do, whatever the class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from archipel import config
from archipel.backbones import base, counts_more, flops, networks, registry
from archipel.contracts import Conditioning
from archipel.errors import ConfigError, DamagedError
from archipel.flow.losses import prediction_loss
from archipel.flow.path import interpolate
from archipel.training import precision

NAMES = ("ltx", "hunyuan", "cogvideox")


def settings(name: str, **changes: Any) -> config.RunConfig:
    """A run of tiny clips; ``changes`` go into its section "expert"."""
    expert = {"width": 32, "heads": 2, "rope_axes": [4, 6, 6], "double_blocks": 1, "single_blocks": 1}
    return config.build(
        {
            "clips": {"size": 16, "frames": 6},
            "codec": {"patch": [2, 4, 4], "channels": 4},
            "text": {"tokens": 6},
            "expert": {"backbone": name, **expert, **changes},
        }
    )


def awake(name: str, seed: int = 1, **changes: Any) -> base.Denoiser:
    """A fresh expert whose zeros are filled, since it answers zero to everything."""
    model, generator = registry.build_expert(settings(name, **changes), seed=0), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def inputs(seed: int = 2) -> tuple[Tensor, Tensor, Conditioning]:
    """Three clips; their captions have 6, 3 and no tokens."""
    g, mask = torch.Generator().manual_seed(seed), torch.arange(6)[None] < torch.tensor([6, 3, 0])[:, None]
    cond = Conditioning(torch.randn(3, 6, 384, generator=g) * mask[..., None], mask, torch.randn(3, 384, generator=g))
    return torch.randn(3, 4, 3, 4, 4, generator=g), torch.tensor([0.1, 0.6, 1.0]), cond


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_expert_answers_zero_is_made_from_its_seed_and_learns(name: str) -> None:
    model, again = (registry.build_expert(settings(name), seed=3) for _ in range(2))
    other = registry.build_expert(settings(name), seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    x, t, cond = inputs()
    noise, x0 = x, x.flip(2) * 0.5 + 1
    assert model(x, t, cond).abs().max() == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
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
def test_every_block_starts_as_the_identity(name: str) -> None:
    """Where only the last projection is opened, the answer does not depend on what the blocks hold."""
    model, (x, t, cond) = registry.build_expert(settings(name), seed=0), inputs()
    torch.nn.init.normal_(model.network.proj_out.weight, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(x, t, cond)
        assert plain.abs().max() > 0.1
        for block in model.blocks():
            for key, p in block.named_parameters():
                if not p.any():
                    continue  # what starts at zero is what makes it so
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(key))))
        torch.testing.assert_close(model(x, t, cond), plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_padding_has_no_effect_and_captions_and_times_and_places_do(name: str) -> None:
    model, (x, t, cond) = awake(name), inputs()
    plain = model(x, t, cond)
    assert plain.shape == x.shape and bool(plain.isfinite().all())
    garbage = torch.where(cond.mask[..., None], cond.tokens, 50.0)
    torch.testing.assert_close(model(x, t, Conditioning(garbage, cond.mask, cond.pooled)), plain)
    other = model(x, t, Conditioning(cond.tokens + cond.mask[..., None], cond.mask, cond.pooled)) - plain
    assert other[:2].abs().amax((1, 2, 3, 4)).min() > 1e-3 and other[2].abs().max() < 1e-5
    assert (model(x, t * 0.9, cond) - plain).abs().amax((1, 2, 3, 4)).min() > 1e-4
    for axis in (2, 3, 4):  # without places a clip turned around would give the answer turned around
        assert (model(x.flip(axis), t, cond).flip(axis) - plain).abs().max() > 1e-4
    pooled = model(x, t, Conditioning(cond.tokens, cond.mask, cond.pooled + 1)) - plain
    assert (pooled.abs().max() > 1e-3) == (name == "hunyuan"), "the others read no pooled vector"


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_longer_padding_has_no_effect(name: str) -> None:
    model, (x, t, cond) = awake(name), inputs()
    more = [(0, 0, 0, 5), (0, 5)]
    wide = Conditioning(
        *(torch.nn.functional.pad(p, m) for p, m in zip((cond.tokens, cond.mask), more, strict=True)), cond.pooled
    )
    torch.testing.assert_close(model(x, t, wide), model(x, t, cond), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("patch", [1, 2])
def test_closed_form_of_a_run_is_what_torch_counts(name: str, patch: int) -> None:
    small = settings(name, patch=patch, tasks=[1, 1, 0, 0])
    model, (x, t, cond) = registry.build_expert(small, seed=0), inputs()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, t, cond)
    network = networks.expert_network(small)
    closed = getattr(counts_more, name)(network, flops.latent_shape(small), flops.text_shape(small))
    assert counter.get_total_flops() == 3 * closed
    assert flops.expert_forward_flops(small) == closed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("patch", [1, 2])
@torch.no_grad()
def test_given_frames_enter_by_columns_that_start_at_zero(name: str, patch: int) -> None:
    plain, told = (
        registry.build_expert(settings(name, patch=patch, tasks=tasks), seed=0)
        for tasks in ([1, 0, 0, 0], [1, 5, 1, 1])
    )
    for model in (plain, told):
        torch.nn.init.normal_(model.network.proj_out.weight, generator=torch.Generator().manual_seed(0))
    x, t, cond = inputs()
    given = torch.randn(3, 5, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(told(x, t, cond.given(given)), plain(x, t, cond), rtol=0, atol=1e-6)
    weight = told.network.get_parameter(told.INPUT)
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(6)))
    moved = told(x, t, cond.given(given)) - told(x, t, cond)
    assert moved.abs().amax((1, 2, 3, 4)).min() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_ends_are_float32_and_blocks_are_not_under_bfloat16(name: str) -> None:
    model, (x, t, cond) = awake(name), inputs()
    with torch.no_grad():
        plain = model(x, t, cond)
    seen: dict[str, Any] = {}
    precision.keep_float32(model.ends())
    precision.norms_in_input_dtype(model)
    linear = next(m for m in model.blocks()[0].modules() if isinstance(m, torch.nn.Linear))
    linear.register_forward_hook(lambda *call: seen.update(inside=call[-1].dtype))
    ends = [m for end in model.ends() for m in end.modules() if isinstance(m, torch.nn.Linear)]
    for number, module in enumerate(ends):
        module.register_forward_hook(lambda *call, n=number: seen.update({f"end {n}": call[-1].dtype}))
    with precision.autocast("bfloat16", "cpu")():
        half = model(x, t, cond)
        half.square().mean().backward()
    assert seen.pop("inside") == torch.bfloat16
    assert seen and set(seen.values()) == {torch.float32}
    assert half.dtype == torch.float32
    assert 0 < (half - plain).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_the_repeated_ones_and_can_be_checkpointed(name: str) -> None:
    model, (x, t, cond) = awake(name, double_blocks=2, single_blocks=1), inputs()
    assert len(model.blocks()) == 3
    model.requires_grad_(True)
    grads = []
    for switch in (False, True):
        if switch:
            model.network.enable_gradient_checkpointing()
        model.train().zero_grad()
        model(x, t, cond).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 10
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_cards_of_ltx_say_how_long_a_latent_position_is() -> None:
    small = settings("ltx")
    assert networks.expert_facts(small)["rope_scale"] == [2 / small.clips.fps, 4, 4]
    with pytest.raises(DamagedError, match="rope_scale"):
        registry.adapter("LTXVideoTransformer3DModel")(torch.nn.Identity(), {"prediction": "velocity"})


def test_heads_that_cogvideox_cannot_split_are_named() -> None:
    with pytest.raises(ConfigError, match=r"expert.width / expert.heads is 24"):
        networks.expert_network(settings("cogvideox", width=48, rope_axes=[8, 8, 8]))
