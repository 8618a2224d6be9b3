"""Adapters over a frozen base: which layers, what they cost, how they are saved, and many beside each other."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import CHANNELS, CLASSES, POOLED, TEXT, tiny_cond, tiny_config
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from archipel import store
from archipel.backbones import adapters, base, lora, networks, registry
from archipel.backbones.adapters import Adapter
from archipel.errors import DamagedError

SHA = "a" * 64
SHAPE = (CHANNELS, 2, 4, 4)


def dictionary(name: str, **more: Any) -> dict[str, Any]:
    return {"_class_name": CLASSES[name], **tiny_config(name), **more}


def denoiser(name: str = "flux", seed: int = 0, **more: Any) -> base.Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = registry.build_network(dictionary(name, **more))
    facts = {
        "role": "expert",
        "prediction": "velocity",
        "latent_shape": list(SHAPE),
        "text_shape": [6, TEXT, POOLED],
        **{"flux": {"patch": 2}, "ltx": {"rope_scale": [1.0, 1.0, 1.0]}}.get(name, {}),
    }
    return registry.adapter(CLASSES[name])(network, facts).eval()


def disturb(one: base.Denoiser, seed: int) -> None:
    """B as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in one.network.named_parameters():
            if ".lora_B." in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))


def saved(one: base.Denoiser, folder: Path) -> Path:
    """As a job leaves it."""
    state = {name: value.detach().numpy() for name, value in lora.parameters(one).items()}
    base.save(one, folder, lora.to_file(one.facts, state))
    store.write_card(folder, "expert", SHA, ["config.json", "model.safetensors"], network=one.facts)
    return folder


def inputs(rows: int = 2, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, Any]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *SHAPE, generator=generator), torch.linspace(0.2, 0.9, rows), tiny_cond(rows)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_layers_are_those_of_diffusers(name: str) -> None:
    network = registry.meta_network(dictionary(name))
    blocks = ("transformer_blocks.", "single_transformer_blocks.", "blocks.")
    wanted = {
        key: (module.in_features, module.out_features)
        for key, module in network.named_modules()
        if isinstance(module, nn.Linear) and key.startswith(blocks)
    }
    found = adapters.layers(dictionary(name))
    assert {one.name: (one.inputs, one.outputs) for one in found} == wanted
    attention = adapters.chosen(dictionary(name), "attention")
    assert attention and {one.name for one in attention} == {key for key in wanted if ".attn" in key}


@pytest.mark.parametrize("name", sorted(CLASSES))
@pytest.mark.parametrize("targets", ["attention", "linear"])
def test_a_fresh_adapter_changes_nothing_and_all_of_it_is_trained(name: str, targets: str) -> None:
    one, (x, t, cond) = denoiser(name), inputs()
    state = torch.get_rng_state()
    with torch.no_grad():
        before = one(x, t, cond)
        lora.attach(one, Adapter(4, 8.0, targets), SHA, seed=5)
        after = one(x, t, cond)
    # Not to the bit: a flux block joins a plain layer with the gelu behind it, one with an adapter not.
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    trained = {key for key, p in one.network.named_parameters() if p.requires_grad}
    shapes = adapters.shapes(dictionary(name), Adapter(4, 8.0, targets))
    assert trained == {adapters.inside(key) for key in shapes}
    assert {key: tuple(value.shape) for key, value in lora.parameters(one).items()} == shapes
    one(x, t, cond).square().sum().backward()
    unreached = [key for key, p in one.network.named_parameters() if p.requires_grad and p.grad is None]
    assert all("context" in key or "add" in key for key in unreached)  # what follows the last use of the text


def test_adapters_are_a_function_of_the_seed() -> None:
    made = []
    for seed in (5, 5, 6):
        one = denoiser()
        lora.attach(one, Adapter(2, 2.0, "attention"), SHA, seed=seed)
        made.append(lora.parameters(one))
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
    assert any(not torch.equal(made[0][key], made[2][key]) for key in made[0])


@pytest.mark.parametrize("targets", ["attention", "linear"])
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_saved_loaded_merged_and_in_diffusers_it_is_the_same_function(tmp_path: Path, name: str, targets: str) -> None:
    one, (x, t, cond) = denoiser(name), inputs()
    weights = {key: value.clone() for key, value in one.network.state_dict().items()}
    lora.attach(one, Adapter(4, 12.0, targets), SHA, seed=5)
    disturb(one, 7)
    folder = saved(one, tmp_path / "expert")
    with torch.no_grad():
        wanted = one(x, t, cond)
        assert (wanted - denoiser(name)(x, t, cond)).abs().max() > 1e-2
        loaded = lora.load(folder, denoiser(name), SHA)
        assert torch.allclose(loaded(x, t, cond), wanted, atol=1e-5)
        assert not any(p.requires_grad for p in loaded.parameters())
        tensors = {key: torch.tensor(value) for key, value in store.map_tensors(folder / "model.safetensors").items()}
        whole = registry.adapter(CLASSES[name])(
            registry.build_network(dictionary(name), lora.merged(weights, tensors)), denoiser(name).facts
        )
        assert torch.allclose(whole(x, t, cond), wanted, atol=1e-5)
        theirs = denoiser(name)
        theirs.network.load_lora_adapter(folder, weight_name="model.safetensors", use_safetensors=True)
        assert torch.allclose(theirs(x, t, cond), wanted, atol=1e-5)


def experts(tmp_path: Path, count: int) -> list[Path]:
    folders = []
    for number in range(count):
        one = denoiser()
        lora.attach(one, Adapter(4, 4.0, "attention"), SHA, seed=5)
        disturb(one, number)
        folders.append(saved(one, tmp_path / str(number)))
    return folders


def test_many_experts_in_the_memory_of_one(tmp_path: Path) -> None:
    folders, (x, t, cond) = experts(tmp_path, 3), inputs()
    bank = lora.Bank(denoiser(), SHA)

    def held() -> int:
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in bank.base.parameters()}
        return sum(storages.values())

    alone = held()
    loaded = [bank.load(folder) for folder in folders]
    own = sum(4 * array.size for array in store.map_tensors(folders[0] / "model.safetensors").values())
    assert held() == alone + 3 * own and own < alone / 5
    with torch.no_grad():
        for number in (2, 0, 1, 0):
            wanted = lora.load(folders[number], denoiser(), SHA)(x, t, cond)
            assert torch.allclose(loaded[number](x, t, cond), wanted, atol=1e-6)
    del loaded[0]
    gc.collect()
    assert len(bank.names()) == 2 and held() == alone + 2 * own
    with torch.no_grad():
        assert torch.allclose(loaded[0](x, t, cond), lora.load(folders[1], denoiser(), SHA)(x, t, cond), atol=1e-6)


def test_threads_that_ask_different_experts_get_their_own(tmp_path: Path) -> None:
    folders, (x, t, cond) = experts(tmp_path, 2), inputs()
    bank = lora.Bank(denoiser(), SHA)
    loaded = [bank.load(folder) for folder in folders]
    with torch.no_grad():
        wanted = [one(x, t, cond) for one in loaded]
    wrong: list[int] = []

    @torch.no_grad()
    def ask(number: int) -> None:
        for _ in range(20):
            if not torch.equal(loaded[number](x, t, cond), wanted[number]):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_does_not_belong_to_the_base_is_refused(tmp_path: Path) -> None:
    (folder,) = experts(tmp_path, 1)
    with pytest.raises(DamagedError, match="adapter of the base aaaa"):
        lora.load(folder, denoiser(), "b" * 64)
    arrays = store.map_tensors(folder / "model.safetensors")
    first = sorted(arrays)[0]
    store.write_tensors(folder / "model.safetensors", {**arrays, first: np.asarray(arrays[first])[:1]})
    card = store.read_json(folder / "card.json")
    store.write_card(folder, "expert", SHA, ["config.json", "model.safetensors"], network=card["network"])
    with pytest.raises(DamagedError, match="does not fit its card: 1 tensors differ"):
        lora.load(folder, denoiser(), SHA)
    for broken in ({"role": "expert"}, card["network"] | {"lora": {"rank": "many"}}, card["network"] | {"lora": None}):
        store.write_card(folder, "expert", SHA, ["config.json", "model.safetensors"], network=broken)
        with pytest.raises(DamagedError, match="does not describe an adapter"):
            lora.load(folder, denoiser(), SHA)


@pytest.mark.parametrize("targets", ["attention", "linear"])
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_forward_and_training_flops_against_the_counter(name: str, targets: str) -> None:
    """The closed form is above the counter by what it says: embedders, and inputs of the first block."""
    depth = {"num_layers": 3, "num_single_layers": 4} if name in ("flux", "hunyuan") else {"num_layers": 6}
    more = depth | ({"max_text_seq_length": 32} if name == "cogvideox" else {})
    network, adapter = dictionary(name, **more), Adapter(4, 4.0, targets)
    shape, L = (CHANNELS, 4, 8, 8), 8
    pt, ph, pw = networks.patch(network, 2)
    tokens = (shape[1] // pt) * (shape[2] // ph) * (shape[3] // pw)

    def count(one: base.Denoiser, backward: bool, times: int = 1) -> int:
        x = torch.randn(1, shape[0], times * shape[1], *shape[2:])
        cond = tiny_cond(2, times * L)[torch.tensor([0])]  # full length: padding is not computed on a CPU
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output = one.predict(x, torch.rand(1), cond)
            if backward:
                output.sum().backward()
        return counter.get_total_flops()

    plain = [count(denoiser(name, **more), False, times) for times in (1, 2, 4)]
    one = denoiser(name, **more)
    lora.attach(one, adapter, SHA, seed=1)
    own = adapters.forward_flops(network, tokens, L, adapter)
    assert count(one, False) == plain[0] + own
    frozen, counted = adapters.frozen_training_flops(*plain), count(one, True)
    assert counted <= frozen + 3 * own <= 1.08 * counted
    assert frozen < 0.92 * 3 * plain[0]


def test_a_base_in_bfloat16_gives_what_autocast_gives() -> None:
    one, (x, t, cond) = denoiser(), inputs()
    lora.attach(one, Adapter(4, 4.0, "attention"), SHA, seed=5)
    disturb(one, 7)
    trained = {name: p for name, p in one.network.named_parameters() if p.requires_grad}

    def loss() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            value = one(x, t, cond).float().square().mean()
        return value.detach(), dict(zip(trained, torch.autograd.grad(value, list(trained.values())), strict=True))

    before, gradients = loss()
    whole = sum(p.untyped_storage().nbytes() for p in one.parameters())
    lora.halve(one)
    assert sum(p.untyped_storage().nbytes() for p in one.parameters()) < 0.65 * whole
    assert all(p.dtype == torch.float32 for p in trained.values())
    after, same = loss()
    assert torch.equal(before, after) and all(torch.equal(gradients[name], same[name]) for name in trained)
    plain = denoiser()
    lora.halve(plain)
    assert all(p.dtype == torch.float32 for p in plain.parameters())
