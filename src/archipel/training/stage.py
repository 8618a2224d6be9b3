"""Train an expert, the monolith or the trunk: the same network, loss and loop, on one cluster's clips or on all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from archipel.backbones import flops, spending
from archipel.backbones.registry import build_expert
from archipel.errors import ArchipelError
from archipel.progress import StopFlag
from archipel.run import MONOLITH, ROUTER, TRUNK, Run
from archipel.training import bases
from archipel.training.batches import Shard
from archipel.training.job import Plan, train_job
from archipel.training.local import Local
from archipel.training.loop import Settings
from archipel.training.objective import FlowObjective
from archipel.training.warm import load_start, starts_warm

_TRUNK_SEED = 1 << 32  # beyond any run.seed


def plan(run: Run, name: str) -> Plan:
    """How an expert, the monolith or the trunk of a run is trained; the last two with one batch and rate."""
    part, monolith = run.config.expert, run.config.monolith
    if name in (MONOLITH, TRUNK):
        if not (monolith.steps and monolith.batch and monolith.lr):
            raise ArchipelError(
                f"{run.root / 'run.toml'}: monolith.steps, batch and lr are not resolved: `archipel init` does it"
            )
        steps, batch = part.trunk_steps if name == TRUNK else monolith.steps, monolith.batch
        settings = Settings.of(part, steps=steps, lr=monolith.lr, keep=part.keep)
    else:
        settings, batch = Settings.of(part, keep=part.keep), part.batch
    cluster = int(name) if name.isdigit() else None
    return Plan(
        "expert",
        settings,
        batch,
        spending.forward_flops(run.config, name),
        {"cluster": cluster},
        starts_warm(run.config, name),
        training_flops=spending.training_flops(run.config, name, 1, 1),
        base=bases.starts_from(run.config, name),
    )


def train(
    run: Run,
    name: str,
    *,
    seconds: float | None = None,
    threads: int | None = None,
    stop: StopFlag | None = None,
    device: str | None = None,
    local: Local | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
    facts: Callable[[], Mapping[str, Any]] | None = None,
) -> None:
    """Train expert ``name``, the monolith or the trunk of a run; see ``training.job.train_job`` for stopping and errors.

    Every arm starts from the same weights and, at a step, a clip meets the same noise in every arm.
    Raises ArchipelError naming the jobs there are for a name that is none of them.
    """
    run.expert(name)
    if name == ROUTER:
        raise ArchipelError("the router is trained by routing.stage.train_router, not here")
    job, config = plan(run, name), run.config
    clusters = flops.cluster_width(config) if name == MONOLITH else 0

    def make(shard: Shard, on: str) -> FlowObjective:
        latent, text = flops.latent_shape(config), flops.text_shape(config)
        if shard.train.latent_shape != latent or shard.train.text_shape != text:
            raise ArchipelError(
                f"{shard.train.path}: latents {shard.train.latent_shape} and text {shard.train.text_shape} are not those "
                f"of run.toml, {latent} and {text}: run `archipel prepare` and `archipel partition` again"
            )
        if job.base:
            network = bases.begin(config, run.base, config.run.seed, clusters=clusters)
        else:
            network = build_expert(config, seed=config.run.seed, clusters=clusters)
        if job.warm:
            load_start(network, shard)
        return FlowObjective(
            network,
            shard,
            # What comes after the trunk must not meet its order and noise once more.
            seed=config.run.seed + (_TRUNK_SEED if name == TRUNK else 0),
            batch=job.batch,
            shift=config.expert.shift,
            text_dropout=config.expert.text_dropout,
            pooled_dropout=config.expert.pooled_dropout,
            tasks=config.expert.tasks if config.expert.given_frames else None,
            device=on,
            at_once=0 if local is None else local.micro_batch,
        )

    train_job(
        run,
        name,
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
