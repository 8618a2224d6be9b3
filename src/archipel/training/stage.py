"""Train an expert or the monolith: the same network, loss and loop; the monolith is an expert whose cluster is all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from archipel.backbones import flops
from archipel.backbones.flux import build_expert
from archipel.errors import ArchipelError
from archipel.progress import StopFlag
from archipel.run import MONOLITH, ROUTER, Run
from archipel.training.batches import Shard
from archipel.training.job import Plan, train_job
from archipel.training.local import Local
from archipel.training.loop import Settings
from archipel.training.objective import FlowObjective


def plan(run: Run, name: str) -> Plan:
    """How an expert or the monolith of a run is trained."""
    part, monolith = run.config.expert, run.config.monolith
    if name == MONOLITH:
        if not (monolith.steps and monolith.batch and monolith.lr):
            raise ArchipelError(
                f"{run.root / 'run.toml'}: monolith.steps, batch and lr are not resolved: `archipel init` does it"
            )
        settings, batch = Settings.of(part, steps=monolith.steps, lr=monolith.lr), monolith.batch
    else:
        settings, batch = Settings.of(part), part.batch
    cluster = None if name == MONOLITH else int(name)
    forward = flops.monolith_forward_flops if name == MONOLITH else flops.expert_forward_flops
    return Plan("expert", settings, batch, forward(run.config), {"cluster": cluster})


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
    """Train expert ``name`` or the monolith of a run; see ``training.job.train_job`` for stopping and errors.

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
        return FlowObjective(
            build_expert(config, latent, *text, seed=config.run.seed, clusters=clusters),
            shard,
            seed=config.run.seed,
            batch=job.batch,
            shift=config.expert.shift,
            text_dropout=config.expert.text_dropout,
            device=on,
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
