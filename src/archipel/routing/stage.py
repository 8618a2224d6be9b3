"""The route stage: train the router where it is missing, calibrate it on validation clips, measure it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from archipel import FORMAT, store
from archipel.errors import ArchipelError, DamagedError
from archipel.manifest import read_manifest
from archipel.partition.shards import whole
from archipel.progress import Progress, StopFlag, log_to
from archipel.routing import calibration, objective, quality
from archipel.routing.objective import RouterObjective, answer, chosen
from archipel.routing.router import (
    CALIBRATION,
    QUALITY,
    CalibratedRouter,
    load_router,
    model_hash,
    read_calibration,
    seal,
)
from archipel.run import ROUTER, Run
from archipel.training import machine
from archipel.training.batches import Shard, open_shard
from archipel.training.job import Plan, train_job
from archipel.training.local import Local
from archipel.training.loop import Settings

__all__ = ["CalibratedRouter", "load_router", "route", "train_router"]

logger = logging.getLogger("archipel")


def plan(run: Run) -> Plan:
    """How the router is trained: the average that validated best is kept (early stopping without stopping)."""
    from archipel.backbones import flops

    part = run.config.router
    return Plan(
        "expert", Settings.of(part, keep="best"), part.batch, flops.router_forward_flops(run.config), {"cluster": None}
    )


def train_router(
    run: Run,
    *,
    seconds: float | None = None,
    threads: int | None = None,
    stop: StopFlag | None = None,
    device: str | None = None,
    local: Local | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
    facts: Callable[[], Mapping[str, Any]] | None = None,
) -> None:
    """Train the router of a run on ``shards/all``; see ``training.job.train_job`` for stopping, resuming and errors."""
    from archipel.backbones import flops
    from archipel.backbones.router import build_router

    job, config = plan(run), run.config

    def make(shard: Shard, on: str) -> RouterObjective:
        latent, text = flops.latent_shape(config), flops.text_shape(config)
        if shard.train.latent_shape != latent or shard.train.text_shape != text:
            raise ArchipelError(
                f"{shard.train.path}: latents {shard.train.latent_shape} and text {shard.train.text_shape} are not "
                f"those of run.toml, {latent} and {text}: run `archipel prepare` and `archipel partition` again"
            )
        return RouterObjective(
            build_router(config, seed=config.run.seed),
            shard,
            config.partition.k,
            seed=config.run.seed,
            batch=job.batch,
            text_dropout=objective.dropout(config),
            tasks=objective.tasks(config),
            device=on,
        )

    train_job(
        run,
        ROUTER,
        job,
        make,
        seconds=seconds,
        threads=threads,
        stop=stop,
        device=device,
        local=local,
        on_checkpoint=on_checkpoint,
        facts=facts,
    )


def route(
    run: Run,
    *,
    threads: int | None = None,
    stop: StopFlag | None = None,
    device: str | None = None,
    local: Local | None = None,
) -> None:
    """Train the router if it is missing, then write ``router/quality.json`` and ``router/calibration.json``.

    ``local``: how it is computed here (None: as nothing is said). The calibration comes last and names the sha256 of the
    weights it was fitted for: after another training it is stale, is not used, and is made again here. Raises
    MissingStageError where *partition* has not finished.
    """
    run.need(run.shard(ROUTER), "partition")
    card = store.read_card(run.expert(ROUTER))
    if card is None or card.get("run") != run.id or not whole(run.expert(ROUTER), card):
        train_router(run, threads=threads, stop=stop, device=device, local=local)
    if _routed(run):
        return
    with log_to(run.log("route")), store.lock(run.root / ".locks" / "route.lock", f"route of {run.root}"):
        if stop:
            raise stop.error("route")
        with machine.threads(threads), Progress("route: calibrate", 3) as bar:
            _calibrate(run, bar, machine.pick_device(device))


def _routed(run: Run) -> bool:
    """Whether the router as it is now is calibrated and measured; damaged files count as missing here."""
    try:
        return read_calibration(run) is not None and isinstance(store.read_json(run.expert(ROUTER) / QUALITY), dict)
    except (DamagedError, OSError) as error:
        logger.warning("route: calibrated anew: %s", error)
        return False


def prior_of(run: Run) -> np.ndarray:
    """Shares of the clusters among training clips, (K,) float64, from the shard's card."""
    card = store.read_card(run.shard(ROUTER), "shard") or {}
    prior = np.asarray(card.get("prior", []), np.float64)
    if prior.shape != (run.config.partition.k,) or not (prior > 0).all() or abs(prior.sum() - 1) > 1e-6:
        raise DamagedError(
            f"{run.shard(ROUTER) / 'card.json'}: prior is not {run.config.partition.k} shares: partition again"
        )
    return prior


def _calibrate(run: Run, bar: Progress, device: str) -> None:
    from archipel.backbones.router import load_router_network

    folder, clips = run.expert(ROUTER), open_shard(run.shard(ROUTER)).validation
    rows, prior = chosen(clips), prior_of(run)
    manifest = read_manifest(run.manifest)
    groups = [manifest[item].group for item in clips.items(rows)]
    network = load_router_network(folder).to(device)
    mix = objective.tasks(run.config)
    draws = answer(network, clips, rows, seed=run.config.run.seed, tasks=mix, device=device)
    bar.advance()
    fitted = calibration.fit(draws, prior)
    bar.advance()
    numbers = quality.measure(draws, prior, groups, fitted)
    fitted = first_do_no_harm(fitted, numbers)
    marks: dict[str, Any] = {"format": FORMAT, "run": run.id, "model_sha256": model_hash(folder), "split": "validation"}
    store.write_json(folder / QUALITY, {**marks, **numbers})
    about = {"n": len(rows), "groups": len(set(groups)), "draws": int(draws.logits.shape[2])}
    store.write_json(folder / CALIBRATION, seal({**marks, **about, **fitted.to_json()}))
    bar.advance()
    _say(numbers, len(rows))


def first_do_no_harm(fitted: calibration.Calibration, numbers: dict[str, Any]) -> calibration.Calibration:
    """Keep a branch's temperatures only where they lower the cross-entropy of clips they were not fitted on.

    With a few dozen validation clips one confident error can spoil a fit. Where they are not kept, ``numbers`` say what
    the raw answers score, since those are what is used.
    """
    temperatures = fitted.temperatures.copy()
    for branch, name in enumerate(quality.BRANCHES):
        if name not in numbers:  # no validation clip: nothing was fitted either
            continue
        raw = numbers[name].get("uncalibrated") or {}
        kept = raw.get("cross_entropy", float("inf")) > numbers[name].get("cross_entropy", float("-inf"))
        numbers[name]["calibrated"] = bool(kept)
        if not kept:
            temperatures[branch] = 1.0
            for part in (numbers[name], *numbers[name].get("bins", [])):
                part |= part.get("uncalibrated") or {}
    return dataclasses.replace(fitted, temperatures=temperatures)


def _say(numbers: dict[str, Any], clips: int) -> None:
    if not clips:
        logger.warning("route: there is no validation clip: the router is not calibrated (temperature 1)")
        return
    for name in quality.BRANCHES:
        logger.info(
            "route: %s: cross-entropy %.3f (prior %.3f), accuracy %.2f, calibration error %.3f on %d clips",
            name.replace("_", " "),
            numbers[name]["cross_entropy"],
            numbers["prior"]["cross_entropy"],
            numbers[name]["accuracy"],
            numbers[name]["ece"],
            clips,
        )
