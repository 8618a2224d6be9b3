"""Fresh weights, the velocity contract, the router's network, and folders that are damaged or hostile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from archipel import config, store
from archipel.backbones import base, registry, router
from archipel.contracts import Conditioning
from archipel.errors import DamagedError, MissingStageError

SMALL = {
    "clips": {"size": 8, "frames": 4},
    "codec": {"patch": [2, 4, 4], "channels": 5},
    "text": {"tokens": 4},
    "expert": {"width": 32, "heads": 2, "rope_axes": [4, 6, 6], "double_blocks": 1, "single_blocks": 1},
    "router": {"width": 16, "heads": 1, "rope_axes": [4, 6, 6], "blocks": 1},
    "evaluate": {"frames": 2},
}


def build(over: dict | None = None, seed: int = 0) -> base.Denoiser:
    small = config.build(config.merge(SMALL, over or {}))
    return registry.build_expert(small, seed=seed)


def inputs(model: base.Backbone, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(5)
    L, D, P = model.facts["text_shape"]
    cond = Conditioning(
        torch.randn(rows, L, D, generator=generator),
        torch.ones(rows, L, dtype=torch.bool),
        torch.randn(rows, P, generator=generator),
    )
    return torch.randn(rows, *model.facts["latent_shape"], generator=generator), torch.full((rows,), 0.25), cond


@torch.no_grad()
def test_a_fresh_expert_answers_zero_and_a_fresh_router_is_undecided() -> None:
    model = build()
    assert not model.predict(*inputs(model)).any()
    small = config.build(SMALL)
    fresh = router.build_router(small, seed=0)
    logits = fresh(*inputs(fresh))
    assert logits.shape == (2, 3) and not logits.any()


def test_a_fresh_expert_can_learn_from_the_first_step() -> None:
    model = build()
    x, t, cond = inputs(model)
    (model.predict(x, t, cond) - 1).square().mean().backward()
    assert model.network.proj_out.weight.grad.abs().max() > 0


def test_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one, same, other = build(seed=3), build(seed=3), build(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(one.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@torch.no_grad()
def test_an_x0_expert_speaks_velocity() -> None:
    model = build({"expert": {"prediction": "x0"}})
    for p in model.parameters():
        p.add_(0.05)
    x, t, cond = inputs(model)
    x0 = model.predict(x, t, cond)
    torch.testing.assert_close(model.velocity(x, t, cond), (x - x0) / 0.25)
    assert model.velocity(x, t * 0, cond).isfinite().all()


@torch.no_grad()
def test_the_router_reads_latents_time_and_pooled_text_but_no_tokens() -> None:
    small = config.build(SMALL)
    model = router.build_router(small, seed=0)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    x, t, cond = inputs(model)
    plain = model(x, t, cond)
    for changed in (
        (x + 1, t, cond),
        (x, t + 0.5, cond),
        (x, t, Conditioning(cond.tokens, cond.mask, cond.pooled + 1)),
    ):
        assert (model(*changed) - plain).abs().min() > 1e-5
    torch.testing.assert_close(model(x, t, Conditioning(cond.tokens * 9, ~cond.mask, cond.pooled)), plain)


def test_flops_need_no_torch() -> None:
    code = "import sys; import archipel.backbones.flops, archipel.training.budget; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def saved(folder: Path) -> base.Denoiser:
    model = build()
    store.write_card(folder, "expert", "run", base.save(model, folder), network=model.facts)
    return model


def test_an_untrained_folder_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(MissingStageError, match="archipel train"):
        registry.load_denoiser(tmp_path / "0")


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    saved(tmp_path)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(DamagedError, match=r"model\.safetensors is damaged"):
        registry.load_denoiser(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 1},
        {"num_attention_heads": 10**9},
        {"num_layers": 10**6},
        {"_class_name": "os.system"},
        {"in_channels": 6},
        {"unknown": 1},
        {"num_layers": "two"},
    ],
)
def test_a_configuration_that_does_not_fit_its_weights_is_refused(tmp_path: Path, change: dict) -> None:
    model = saved(tmp_path)
    store.write_json(tmp_path / "config.json", {**store.read_json(tmp_path / "config.json"), **change})
    store.write_card(tmp_path, "expert", "run", ["config.json", "model.safetensors"], network=model.facts)
    with pytest.raises(DamagedError, match=r"config\.json"):
        registry.load_denoiser(tmp_path)


def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    model = saved(tmp_path)
    tensors = {name: np.array(value) for name, value in store.map_tensors(tmp_path / "model.safetensors").items()}
    tensors["proj_out.bias"] = np.zeros(3, np.float32)
    store.write_tensors(tmp_path / "model.safetensors", tensors)
    store.write_card(tmp_path, "expert", "run", ["config.json", "model.safetensors"], network=model.facts)
    with pytest.raises(DamagedError, match=r"proj_out\.bias"):
        registry.load_denoiser(tmp_path)


def test_a_router_is_not_taken_for_an_expert(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(DamagedError, match="router"):
        router.load_router_network(tmp_path)
