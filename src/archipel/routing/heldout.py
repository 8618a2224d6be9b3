"""How good a router is on clips that it did not train on, measured by whoever is about to trust it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from archipel import FORMAT
from archipel.backbones.router import load_router_network
from archipel.config import RunConfig
from archipel.routing import calibration, objective, quality
from archipel.routing.calibration import nll
from archipel.routing.objective import RouterObjective, answer, chosen
from archipel.routing.router import seal
from archipel.routing.stage import first_do_no_harm
from archipel.training import machine
from archipel.training.batches import Clips, Shard
from archipel.training.heldout import Measured


def measure(
    config: RunConfig, folder: Path, validation: Path, prior: Sequence[float], device: str | None = None
) -> Measured:
    """Held-out cross-entropy of the router in ``folder``, by the objective's own fixed draws.

    The yardstick is what an answer costs that does not look at the clip: the clusters' shares ``prior`` (K,) or equal
    shares (an untrained router's answer), whichever is less. Raises DamagedError, MissingStageError.
    """
    clips, on = Clips(validation), machine.pick_device(device)
    if not len(clips):
        return Measured(float("nan"), float("nan"), float("nan"), 0)
    held = RouterObjective(
        load_router_network(folder),
        Shard(clips, clips),
        config.partition.k,
        seed=config.run.seed,
        batch=1,
        text_dropout=objective.dropout(config),
        tasks=objective.tasks(config),
        device=on,
    )
    loss = float(held.validate()["loss"])
    labels = clips.take(chosen(clips))[2].numpy()
    shares = np.asarray(prior, np.float64)
    blind = min(
        nll(np.tile(np.log(row), (len(labels), 1)), labels) for row in (shares, np.full(len(shares), 1 / len(shares)))
    )
    ratio = loss / blind if blind > 0 else 0.0  # one cluster: there is nothing to know
    return Measured(loss, ratio, ratio, len(clips))


def calibrate(
    config: RunConfig, run_id: str, folder: Path, validation: Path, prior: Sequence[float], model_sha256: str
) -> dict[str, Any]:
    """``calibration.json`` of a router that was admitted: what `archipel route` makes, but without the manifest, so that
    every clip counts as a group of its own."""
    clips, on, shares = Clips(validation), machine.pick_device(None), np.asarray(prior, np.float64)
    rows = chosen(clips)
    network, mix = load_router_network(folder).to(on), objective.tasks(config)
    draws = answer(network, clips, rows, seed=config.run.seed, tasks=mix, device=on)
    fitted = calibration.fit(draws, shares)
    groups = [str(item) for item in clips.items(rows)]
    fitted = first_do_no_harm(fitted, quality.measure(draws, shares, groups, fitted))
    marks = {"format": FORMAT, "run": run_id, "model_sha256": model_sha256, "split": "validation"}
    about = {"n": len(rows), "groups": len(groups), "draws": int(draws.logits.shape[2])}
    return seal({**marks, **about, **fitted.to_json()})
