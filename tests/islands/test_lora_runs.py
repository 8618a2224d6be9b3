"""Runs whose experts begin with a base: adapters over a trunk, adapters over weights, whole networks from weights; trained at
home and by islands, admitted, pulled, and generated from."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from archipel import config as configuration
from archipel import store
from archipel.backbones import adapters, base, flops, networks, registry, spending
from archipel.encoders.codecs import Pixels
from archipel.ensemble.pipeline import Archipelago
from archipel.errors import ConfigError, DamagedError, MissingStageError
from archipel.islands import keys
from archipel.islands.admission import admit
from archipel.islands.bucket import Bucket
from archipel.islands.publish import publish
from archipel.islands.pull import pull
from archipel.islands.worker import Options, join
from archipel.progress import StopFlag
from archipel.routing.stage import train_router
from archipel.run import MONOLITH, ROUTER, TRUNK, Run
from archipel.training import bases, budget
from archipel.training.local import Local
from archipel.training.stage import train

_HARBOURS = runpy.run_path(str(Path(__file__).parent / "harbours.py"))
PIXELS = {"codec": {"kind": "pixels", "patch": [2, 4, 4]}, "text": {"tokens": 5}, "sample": {"steps": 3}}
LORA = {"warm_start": "trunk", "trunk_steps": 8, "lora_rank": 2, "lora_alpha": 4.0, "steps": 12, "lr": 0.02}


@pytest.fixture
def make(make_run: Callable[..., Run]) -> Callable[..., Run]:
    """A run of pixels whose shards count their clips, and with a codec that decodes."""

    def build(root: Path, **expert: Any) -> Run:
        run = make_run(root, expert=expert, **PIXELS)
        Pixels((2, 4, 4), 0.1, 0.6).save(run.codec, run.id)
        for name in (*run.expert_names, MONOLITH):
            card = json.loads((run.shard(name) / "card.json").read_text())
            more = {"prior": [0.5, 0.5]} if name == MONOLITH else {}
            counts = {"train": 12, "validation": 4}
            store.write_card(
                run.shard(name), "shard", run.id, list(card["files"]), cluster=card["cluster"], counts=counts, **more
            )
        return run

    return build


@pytest.fixture
def trunk(tmp_path: Path, make: Callable[..., Run]) -> Run:
    """Adapters over a trunk, which is trained and the base."""
    run = make(tmp_path / "run", **LORA)
    train(run, TRUNK, threads=1)
    bases.from_trunk(run)
    return run


def weights_for(run: Run, folder: Path, seed: int = 0) -> Path:
    """A random checkpoint of the run's network as diffusers saves it."""
    about = networks.expert_network(run.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        registry.build_network(about).save_pretrained(folder, safe_serialization=True)
    return folder


def stated(folder: Path) -> dict[str, Any]:
    """``expert.network`` as `init` resolves it: TOML has no word for None, which is diffusers' default."""
    return {key: value for key, value in store.read_json(folder / "config.json").items() if value is not None}


def clips(where: Any, strategy: str, letters: Any) -> np.ndarray:
    model = Archipelago.load(where)
    model.parts.text = letters
    return model.generate(["red", "blue"], strategy=strategy, seeds=3).clips


@pytest.fixture
def letters() -> Any:
    return _HARBOURS["Letters"]()


def test_a_run_of_adapters_over_a_trunk_at_home_and_among_islands(
    trunk: Run, tmp_path: Path, letters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHIPEL_CACHE", str(tmp_path / "cache"))
    base_sha = (store.read_card(trunk.base) or {})["sha256"]
    assert base_sha == (store.read_card(trunk.expert(TRUNK)) or {})["sha256"]
    url = (tmp_path / "bucket").as_uri()
    with StopFlag() as stop:
        publish(trunk, url, stop)
        bucket = Bucket.open(url)
        assert bucket.base == base_sha
        assert sum(key.endswith(f"{keys.BASE}/model.safetensors") for key in bucket.files) == 1
        assert not [key for key in bucket.files if "init" in key]
        assert set(join(bucket, Options(work=tmp_path / "work", local=Local(threads=1)), stop)) == set(bucket.jobs)
    for name in ("0", "1", MONOLITH):
        train(trunk, name, threads=1)
        here = store.read_card(trunk.expert(name)) or {}
        there = json.loads((tmp_path / "bucket" / keys.result(name, 1) / "card.json").read_text())
        assert here["sha256"] == there["sha256"]  # the same bytes on an island and at home
        assert here["network"]["lora"] == {"rank": 2, "alpha": 4.0, "targets": "attention", "base": base_sha}
        assert here["warm_start"]["sha256"] == base_sha and "base" not in here
        size = (trunk.expert(name) / "model.safetensors").stat().st_size
        assert size < (trunk.base / "model.safetensors").stat().st_size / 10
        assert here["parameters"] == sum(
            array.size for array in store.map_tensors(trunk.expert(name) / "model.safetensors").values()
        )
        assert {one for one in there["touched"]["read"] if one.startswith("base/")} == {
            f"base/{file}" for file in ("card.json", "config.json", "model.safetensors")
        }
        fetched = "base/model.safetensors" in there["island"]["store"]["read"]
        assert fetched == (name == MONOLITH), "the first job of a folder fetches it for all"
    train_router(trunk, threads=1)
    for name in (*trunk.expert_names, MONOLITH, ROUTER):
        answer = admit(url, name)
        assert answer.admitted, (name, answer.detail)
    for strategy in ("expert-0", "expert-1", "monolith", "uniform", "top2"):
        found = clips(url, strategy, letters)
        if strategy != "top2":
            assert np.array_equal(found, clips(trunk.root, strategy, letters)), strategy
    with StopFlag() as stop:
        pulled = pull(url, tmp_path / "new", stop)
    assert sorted(pulled.brought) == sorted(trunk.job_names)
    assert np.array_equal(clips(tmp_path / "new", "top2", letters), clips(url, "top2", letters))
    ledger = budget.write_ledger(Run.open(tmp_path / "new"))
    assert ledger["base"]["source"] == "trunk" and ledger["trunk"]["steps"] == 8
    assert ledger["experts"]["0"] == spending.training_flops(trunk.config, "0", 12, trunk.config.expert.batch)


def test_the_start_of_every_arm_is_the_base_and_only_adapters_change(trunk: Run, letters: Any) -> None:
    network, _ = bases.load(trunk.config, trunk.base)
    start = bases.begin(trunk.config, trunk.base, 0)
    x, t = torch.randn(2, *flops.latent_shape(trunk.config)), torch.tensor([0.3, 0.8])
    cond = letters.encode(["red", "blue"])
    with torch.no_grad():
        assert torch.equal(network(x, t, cond), start(x, t, cond))
    before = store.sha256_file(trunk.base / "model.safetensors")
    train(trunk, "0", threads=1)
    assert store.sha256_file(trunk.base / "model.safetensors") == before
    trained = bases.load_expert(trunk.config, trunk.expert("0"), trunk.base)
    weights = {name: value for name, value in trained.network.state_dict().items() if "base_layer" in name}
    for name, value in weights.items():
        assert torch.equal(value, network.network.state_dict()[name.replace(".base_layer", "")])
    with torch.no_grad():
        assert not torch.equal(trained(x, t, cond), network(x, t, cond))


def test_resume_is_bit_for_bit_and_checkpoints_hold_adapters_only(trunk: Run, tmp_path: Path) -> None:
    whole = Run.open(shutil.copytree(trunk.root, tmp_path / "whole"))
    train(whole, "0", threads=1)
    with StopFlag() as stop:
        seen: list[Path] = []

        def once(folder: Path) -> None:
            seen.append(folder)
            stop.cancel("enough")

        with pytest.raises(Exception, match="enough"):
            train(trunk, "0", threads=1, stop=stop, on_checkpoint=once)
    state = store.map_tensors(seen[0] / "state.safetensors")
    assert all(".lora_" in name for name in state)
    train(trunk, "0", threads=1)
    assert (store.read_card(trunk.expert("0")) or {})["sha256"] == (store.read_card(whole.expert("0")) or {})["sha256"]


def test_forged_adapters_are_refused(trunk: Run) -> None:
    train(trunk, "0", threads=1)
    assert admit(trunk.root, "0").admitted
    own = trunk.expert("0") / "card.json"
    honest = store.read_json(own)
    other = {"rank": 2, "alpha": 4.0, "targets": "attention", "base": "0" * 64}
    for change, rule in (
        ({"network": honest["network"] | {"lora": other}}, "config"),
        (
            {"network": honest["network"] | {"lora": other | {"base": honest["warm_start"]["sha256"], "rank": 3}}},
            "config",
        ),
        ({"warm_start": honest["warm_start"] | {"sha256": "0" * 64}}, "config"),
        ({"parameters": 12345}, "config"),
        ({"flops": honest["flops"] * 2}, "config"),
        ({"base": "0" * 64}, "config"),
    ):
        store.write_sealed(own, honest | change)
        answer = admit(trunk.root, "0")
        assert (answer.admitted, answer.rule) == (False, rule), answer
    # A whole network where an adapter should be.
    shutil.copyfile(trunk.base / "model.safetensors", trunk.expert("0") / "model.safetensors")
    card = {key: value for key, value in honest.items() if key not in ("files", "check", "format", "kind", "run")}
    sha256 = store.sha256_file(trunk.base / "model.safetensors")
    store.write_card(trunk.expert("0"), "expert", trunk.id, list(honest["files"]), **card | {"sha256": sha256})
    assert admit(trunk.root, "0").rule in ("size", "shape")


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_that_begins_with_released_weights(
    tmp_path: Path, make: Callable[..., Run], letters: Any, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHIPEL_CACHE", str(tmp_path / "cache"))
    plain = make(tmp_path / "plain")
    folder = weights_for(plain, tmp_path / "released")
    network = stated(folder)
    run = make(tmp_path / "run", weights=str(folder), network=network, lora_rank=rank, steps=8, lora_alpha=2.0 * rank)
    with pytest.raises(MissingStageError, match="base is not there"):
        train(run, "0", threads=1)
    bases.take(run)
    assert (run.base / "model.safetensors").samefile(folder / "diffusion_pytorch_model.safetensors")
    shutil.rmtree(folder)  # nothing reads the outside path afterwards
    start = bases.begin(run.config, run.base, 0)
    taken = store.map_tensors(run.base / "model.safetensors")
    state = {name.replace(".base_layer", ""): value for name, value in start.network.state_dict().items()}
    assert all(np.array_equal(state[name].numpy(), array) for name, array in taken.items())
    train(run, "0", threads=1)
    card = store.read_card(run.expert("0")) or {}
    assert card["base"] == (store.read_card(run.base) or {})["sha256"] and "warm_start" not in card
    assert not store.check_card(run.base)  # training did not write into the mapped file
    url = (tmp_path / "bucket").as_uri()
    with StopFlag() as stop:
        publish(run, url, stop)
        join(Bucket.open(url), Options(work=tmp_path / "work", local=Local(threads=1), only=("0",)), stop)
    answer = admit(url, "0")
    there = json.loads((tmp_path / "bucket" / keys.result("0", 1) / "card.json").read_text())
    assert there["sha256"] == card["sha256"]
    # Random weights are far above the bar; what was trained from them is refused for that and for nothing else.
    assert answer.admitted or answer.rule == "loss", answer
    assert clips(run.root, "expert-0", letters).shape == (2, 4, 8, 8, 3)


def test_weights_in_shards_and_half_precision_are_one_base(tmp_path: Path, make: Callable[..., Run]) -> None:
    plain = make(tmp_path / "plain")
    network = registry.build_network(networks.expert_network(plain.config)).to(torch.bfloat16)
    network.save_pretrained(tmp_path / "released", safe_serialization=True, max_shard_size="50KB")
    assert len(list((tmp_path / "released").glob("*.safetensors"))) > 1
    about = stated(tmp_path / "released")
    run = make(tmp_path / "run", weights=str(tmp_path / "released"), network=about, lora_rank=2)
    bases.take(run)
    found, _ = bases.load(run.config, run.base)
    for name, value in found.network.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, network.state_dict()[name].float())


def test_what_weights_do_not_know_begins_at_zero(tmp_path: Path, make_run: Callable[..., Run]) -> None:
    """Given frames and the cluster: columns behind those of the weights."""
    plain = make_run(tmp_path / "plain", **PIXELS)
    folder = weights_for(plain, tmp_path / "released")
    expert = {"weights": str(folder), "network": stated(folder), "tasks": [1, 1, 0, 0]}
    run = make_run(tmp_path / "run", expert=expert, monolith={"condition": "cluster"}, **PIXELS)
    bases.take(run)
    network = bases.begin(run.config, run.base, 0, clusters=2)
    for name, array in store.map_tensors(run.base / "model.safetensors").items():
        value = network.network.state_dict()[name].detach().numpy()
        columns = array.shape[1] if array.ndim > 1 else 0
        assert np.array_equal(value[:, :columns] if columns else value, array)
        assert not columns or not value[:, columns:].any()
    assert network.clusters == 2 and network.image
    assert network.network.x_embedder.in_features == 2 * 96 + 1


def test_weights_of_another_network_are_refused_when_they_are_taken(tmp_path: Path, make: Callable[..., Run]) -> None:
    plain = make(tmp_path / "plain")
    folder = weights_for(plain, tmp_path / "released")
    about = stated(folder) | {"num_single_layers": 2}
    run = make(tmp_path / "run", weights=str(folder), network=about)
    with pytest.raises(DamagedError, match=r"does not fit run\.toml"):
        bases.take(run)
    assert not run.done(run.base)


def test_what_cannot_be_is_refused_at_init(tmp_path: Path, make: Callable[..., Run]) -> None:
    folder = weights_for(make(tmp_path / "plain"), tmp_path / "released")
    weights = {"weights": str(folder), "network": stated(folder)}
    for number, (expert, said) in enumerate(
        (
            ({"lora_rank": 4}, "needs frozen weights"),
            ({**weights, "warm_start": "trunk", "trunk_steps": 3}, "are both a start"),
            ({**weights, "lora_rank": 4, "tasks": [1, 1, 0, 0]}, "projection of them is frozen"),
        )
    ):
        with pytest.raises(ConfigError, match=said):
            make(tmp_path / str(number), **expert)
    told = {"expert": {"lora_rank": 4, "warm_start": "trunk", "trunk_steps": 3}, "monolith": {"condition": "cluster"}}
    with pytest.raises(ConfigError, match="learns the cluster"):
        configuration.build(told)


def test_the_monolith_s_compute_matches_what_adapters_cost(trunk: Run) -> None:
    config = trunk.config
    spent = config.partition.k * spending.training_flops(config, "0", config.expert.steps, config.expert.batch)
    spent += spending.training_flops(config, ROUTER, config.router.steps, config.router.batch)
    mine = spending.training_flops(config, MONOLITH, config.monolith.steps, config.monolith.batch)
    assert abs(spent / mine - 1) < 0.05
    whole = flops.training_flops(flops.expert_forward_flops(config), 1, 1)
    own = spending.training_flops(config, "0", 1, 1)
    assert 0.6 * whole < own < whole
    assert spending.training_flops(config, TRUNK, 1, 1) == whole
    adapter = adapters.adapter_of(config)
    assert adapter is not None and adapter.scale == 2.0 and base.WEIGHTS == "model.safetensors"
