"""A job of every backbone: it learns, its books are right, it goes on where it was stopped, and its files are diffusers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import tiny_transformer

from archipel import store
from archipel.backbones import networks, registry
from archipel.encoders import resolving
from archipel.errors import Stopped
from archipel.progress import StopFlag
from archipel.run import MONOLITH, Run
from archipel.training import bases
from archipel.training.batches import open_shard, training_batch
from archipel.training.stage import train

NAMES = ("wan", "ltx", "hunyuan", "cogvideox")


class After(StopFlag):
    """Stops after so many looks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def __bool__(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_learns_and_is_a_model_of_diffusers(name: str, tmp_path: Path, make_run: Callable[..., Run]) -> None:
    run = make_run(tmp_path / "run", expert={"backbone": name})
    train(run, "0", threads=1)
    folder = run.expert("0")
    card = store.read_card(folder)
    assert card is not None
    before = registry.build_expert(run.config, seed=0)
    after = registry.load_denoiser(folder)
    batch = training_batch(open_shard(run.shard("0")).validation, 0, 0, 4, shift=1.0, text_dropout=0.0)
    target = batch.noise - batch.x0
    with torch.no_grad():
        fresh, learned = ((m.predict(batch.x_t, batch.t, batch.cond) - target).square().mean() for m in (before, after))
    assert learned < 0.7 * fresh, "on clips that it has not seen"
    assert card["network"] == networks.expert_facts(run.config)
    assert card["parameters"] == after.parameters_total == before.parameters_total
    theirs = getattr(diffusers, after.CLASS).from_config(store.read_json(folder / "config.json"))
    theirs.load_state_dict(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_job_goes_on_bit_for_bit(name: str, tmp_path: Path, make_run: Callable[..., Run]) -> None:
    short = {"backbone": name, "steps": 8, "validate_every": 4}
    whole, parts = (make_run(tmp_path / one, expert=short) for one in ("whole", "parts"))
    train(whole, MONOLITH, threads=1)
    with pytest.raises(Stopped):
        train(parts, MONOLITH, threads=1, stop=After(6))
    train(parts, MONOLITH, threads=1)
    cards = [store.read_card(run.expert(MONOLITH)) or {} for run in (whole, parts)]
    assert cards[0]["resumed"] == 0 and cards[1]["resumed"] == 1
    assert cards[0]["sha256"] == cards[1]["sha256"]


@pytest.mark.parametrize("name", ("ltx", "hunyuan", "cogvideox"))
@pytest.mark.parametrize("rank", [0, 2])
def test_released_weights_are_what_a_job_begins_with(
    name: str, rank: int, tmp_path: Path, make_run: Callable[..., Run]
) -> None:
    folder = tmp_path / "released"
    more = {"guidance_embeds": True} if name == "hunyuan" else {}
    if name == "cogvideox":
        diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True).save_pretrained(
            folder / "scheduler"
        )
    weights = tiny_transformer(name, folder / "transformer", **more)
    adapter = {"lora_rank": rank, "lora_alpha": 8.0} if rank else {}
    run = make_run(
        tmp_path / "run",
        clips={"size": 32},
        codec={"channels": 4},
        text={"tokens": 6, "encoder": "t5+clip", "path": "none", "width": 16, "pooled_width": 12},
        router={"steps": 4},
        expert={**resolving.weights_values(str(folder)), "steps": 6, "lr": 1e-3, **adapter},
    )
    bases.take(run)
    begun, _ = bases.load(run.config, run.base)
    network = getattr(diffusers, begun.CLASS).from_pretrained(weights)
    if name == "hunyuan":
        network.time_text_embed.guidance_embedder = None
    released = type(begun)(network.eval(), networks.expert_facts(run.config))
    batch = training_batch(open_shard(run.shard("0")).validation, 0, 0, 4, shift=1.0, text_dropout=0.0)
    with torch.no_grad():
        wanted = released.velocity(batch.x_t, batch.t, batch.cond)
        torch.testing.assert_close(begun.velocity(batch.x_t, batch.t, batch.cond), wanted, rtol=0, atol=0)
    train(run, "0", threads=1)
    card = store.read_card(run.expert("0")) or {}
    assert (card["network"].get("lora") or {}).get("rank", 0) == rank
    losses = [json.loads(line) for line in (run.expert("0") / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert losses[-1] < losses[0]
