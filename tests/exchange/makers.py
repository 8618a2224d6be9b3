"""Tiny runs for exports: adapters over a base, and parts from outside (autoencoder, text encoder, transformer)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXDDIMScheduler
from tests.ensemble import conftest as small
from tests.tiny import tiny_transformer
from tests.tiny_parts import tiny_autoencoder, tiny_text

from archipel import pipeline, store
from archipel.backbones import base, lora
from archipel.backbones.registry import build_expert
from archipel.encoders import autoencoders, outside, taking
from archipel.routing.calibration import Calibration
from archipel.routing.router import model_hash, seal
from archipel.run import MONOLITH, ROUTER, Run
from archipel.training import bases

LORA = {"warm_start": "trunk", "trunk_steps": 2, "lora_rank": 2, "lora_alpha": 4.0}


def adapted_run(root: Path, **sections: Any) -> Run:
    """Random adapters over a random base, which no trunk has made."""
    run = small.build(root, expert=LORA, **sections)
    network = build_expert(run.config, seed=50)
    small.shake(network, 50)
    files = base.save(network, run.base)
    store.write_card(run.base, "base", run.id, files, sha256=store.sha256_file(run.base / base.WEIGHTS))
    for number, name in enumerate([*run.expert_names, MONOLITH]):
        made = bases.begin(run.config, run.base, number)
        draw = torch.Generator().manual_seed(number)
        for key, p in made.network.named_parameters():
            if ".lora_" in key:
                p.data = 0.2 * torch.randn(p.shape, generator=draw)
        state = {key: value.detach().numpy() for key, value in lora.parameters(made).items()}
        files = base.save(made, run.expert(name), lora.to_file(made.facts, state))
        store.write_card(run.expert(name), "expert", run.id, files, network=made.facts)
    return run


def outside_run(root: Path, kind: str, codec: str, text: str, *sets: str, **transformer: Any) -> Run:
    """A run of backbone ``kind`` over an autoencoder, text encoders and weights in diffusers' form; experts are random."""
    parts = root.with_name(f"{root.name}-parts")
    tiny_autoencoder(parts / "vae", codec)
    tiny_text(parts, text)
    tiny_transformer(kind, parts / "transformer", **transformer)
    if kind == "cogvideox":  # its weights mean nothing without their schedule
        CogVideoXDDIMScheduler(prediction_type="v_prediction").save_pretrained(parts / "scheduler")
    small_router = [
        "router.width=16",
        "router.heads=1",
        "router.rope_axes=[4,6,6]",
        "router.blocks=1",
        "router.steps=1",
    ]
    where = {"codec": str(parts), "text": str(parts), "weights": str(parts)}
    chosen = [
        "clips.frames=9",
        "clips.size=32",
        "text.tokens=16",
        "router.batch=1",
        "sample.steps=3",
        *small_router,
        *sets,
    ]
    run = pipeline.init(root, source="shapes", preset="tiny", data="", backbone=kind, sets=chosen, **where)
    taking.take_text(run)
    files = outside.take(run.config.codec.path, ("vae",), run.codec, "codec.path")
    store.write_card(run.codec, "codec", run.id, files, codec=autoencoders.load(run.codec).facts())
    for number, name in enumerate([*run.expert_names, MONOLITH, ROUTER]):
        small.train(run, name, number)
        if name == ROUTER:
            k = run.config.partition.k
            fitted = Calibration(np.ones((2, 2)), np.array([0.2, 0.8]), np.full(k, 1 / k))
            marks = {"format": 1, "run": run.id, "model_sha256": model_hash(run.expert(ROUTER))}
            store.write_json(run.expert(ROUTER) / "calibration.json", seal({**marks, **fitted.to_json()}))
    return run
