"""Adapters of every backbone in the real loop: a few steps lower the loss, and only what is kept has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from archipel import store
from archipel.backbones import networks, registry
from archipel.run import Run
from archipel.training import bases
from archipel.training.local import Local
from archipel.training.stage import train

BACKBONES = {
    "flux": {"patch": 2},
    "wan": {"patch": 2},
    "ltx": {},
    "hunyuan": {"patch": 2},
    "cogvideox": {"patch": 2},
}


def released(run: Run, folder: Path, **more: Any) -> dict[str, Any]:
    """Random weights of the run's network; what `init` says of them."""
    about = {**networks.expert_network(run.config), **more}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        registry.meta_network(about)
        kind = getattr(diffusers, about.pop("_class_name"))
        kind(**about).save_pretrained(folder, safe_serialization=True)
    found = {key: value for key, value in store.read_json(folder / "config.json").items() if value is not None}
    if run.config.expert.backbone == "cogvideox":
        settings = dict(diffusers.CogVideoXDDIMScheduler().config)
        plain = {key: v for key, v in settings.items() if isinstance(v, str | int | float)}
        found["_schedule"] = plain | {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"}
    return {"weights": str(folder), "network": found}


def losses(run: Run, name: str) -> list[float]:
    rows = store.read_jsonl(run.expert(name) / "metrics.jsonl")
    return [row["validation"] for row in rows if "validation" in row]


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_a_few_steps_of_an_adapter_lower_the_loss(tmp_path: Path, make_run: Callable[..., Run], backbone: str) -> None:
    shape = {"size": 16} if BACKBONES[backbone] else {}
    expert = {"backbone": backbone, "steps": 30, "lr": 0.02, "validate_every": 10, **BACKBONES[backbone]}
    plain = make_run(tmp_path / "plain", clips=shape, expert=expert)
    about = released(plain, tmp_path / "released")
    run = make_run(tmp_path / "run", clips=shape, expert=expert | about | {"lora_rank": 4, "lora_targets": "linear"})
    bases.take(run)
    before = store.sha256_file(run.base / "model.safetensors")
    train(run, "0", threads=1, local=Local(micro_batch=2))
    found = losses(run, "0")
    assert found[-1] < 0.98 * found[0], found  # the base is random, and so is its last projection
    assert store.sha256_file(run.base / "model.safetensors") == before
    assert all("lora" in name for name in store.map_tensors(run.expert("0") / "model.safetensors"))


def test_the_guidance_embedder_of_released_weights_is_left_out(tmp_path: Path, make_run: Callable[..., Run]) -> None:
    plain = make_run(tmp_path / "plain")
    about = released(plain, tmp_path / "released", guidance_embeds=True)
    assert any(
        "guidance_embedder" in name for name in store.map_tensors(next((tmp_path / "released").glob("*.safetensors")))
    )
    run = make_run(tmp_path / "run", expert=about | {"lora_rank": 2})
    bases.take(run)
    network, _ = bases.load(run.config, run.base)
    assert not any("guidance" in name for name in network.network.state_dict())


def test_switches_of_a_machine_do_not_change_an_adapter(tmp_path: Path, make_run: Callable[..., Run]) -> None:
    """Gradient checkpointing and the average on the host, over a frozen base."""
    expert = {"warm_start": "trunk", "trunk_steps": 4, "lora_rank": 2, "steps": 8}
    shas = []
    for number, local in enumerate((Local(), Local(checkpointing=True), Local(ema="host"))):
        run = make_run(tmp_path / str(number), expert=expert)
        train(run, "trunk", threads=1)
        bases.from_trunk(run)
        train(run, "0", threads=1, local=local)
        shas.append(store.map_tensors(run.expert("0") / "model.safetensors"))
    for other in shas[1:]:
        assert all(abs(other[name] - array).max() < 1e-5 for name, array in shas[0].items())
