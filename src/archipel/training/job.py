"""One training job as a process: locked, watched, resumed, committed. Experts, monolith and router share it."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archipel import store
from archipel.backbones import base, flops
from archipel.errors import ArchipelError
from archipel.progress import StopFlag
from archipel.run import Run
from archipel.training import checkpoint, isolation, machine
from archipel.training.batches import Shard, open_shard
from archipel.training.checkpoint import Checkpoint
from archipel.training.journal import METRICS
from archipel.training.loop import CHECKPOINTS, Objective, Outcome, Settings, fit

logger = logging.getLogger("archipel")


@dataclass(frozen=True)
class Plan:
    """How a job is trained. ``kind`` is its card's; ``forward_flops`` are per clip; ``fields`` go into the card."""

    kind: str
    settings: Settings
    batch: int
    forward_flops: int
    fields: Mapping[str, Any] = field(default_factory=dict)


Make = Callable[[Shard, str], Objective]
"""``make(shard, device) -> objective``, whose model is a ``Backbone`` on that device."""


def train_job(
    run: Run,
    name: str,
    plan: Plan,
    make: Make,
    *,
    seconds: float | None = None,
    threads: int | None = None,
    stop: StopFlag | None = None,
    device: str | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
    facts: Callable[[], Mapping[str, Any]] | None = None,
) -> bool:
    """Train one job of a run to the end, or until ``stop`` or ``seconds``; continue where an earlier process stopped.

    Opens run.toml and the job's own shard, and writes below ``run.expert(name)``; the card, written last, lists what
    was touched. ``threads``: CPU threads (default: those the job was begun with, else torch's own); ``device``: default
    a GPU where there is one. ``on_checkpoint`` is given the folder of each checkpoint right after it is committed;
    what ``facts()`` gives at the end is the card's "island". Returns False where the job was finished already.

    Raises LockedError where another process trains the same job, Stopped with everything saved, MissingStageError
    without a shard, ArchipelError for the rest that people can mend.
    """
    folder = run.expert(name)
    if _finished(run, folder):
        print(f"{_label(name)} is already trained: {folder}", file=sys.stderr)
        return False
    try:
        with (
            isolation.watch(run.root) as touched,
            store.lock(run.root / ".locks" / f"train-{name}.lock", f"{_label(name)} of {run.root}"),
            _stopping(stop, seconds) as flag,
        ):
            if _finished(run, folder):  # by the process that held the lock
                return False
            _train(run, name, plan, make, threads, flag, machine.pick_device(device), touched, on_checkpoint, facts)
    except OSError as error:
        raise ArchipelError(
            f"{_label(name)}: {error.filename or folder} cannot be used ({error.strerror or error}): make it writable or "
            "free space, then start again; what was finished is kept"
        ) from error
    return True


def _train(
    run: Run,
    name: str,
    plan: Plan,
    make: Make,
    threads: int | None,
    stop: StopFlag,
    device: str,
    touched: isolation.Touched,
    on_checkpoint: Callable[[Path], None] | None,
    facts: Callable[[], Mapping[str, Any]] | None,
) -> None:
    folder = run.expert(name)
    if Run.open(run.root).id != run.id:  # seen by the watch, as the shard is
        raise ArchipelError(f"{run.root / 'run.toml'} changed while this process was starting: start it again")
    shard = open_shard(run.shard(name))
    found = checkpoint.latest(folder / CHECKPOINTS, run.id)
    builds: list[dict[str, Any]] = list(found.manifest.get("builds", [])) if found else []
    with machine.threads(threads or (int(builds[-1]["threads"]) if builds else None)) as used:
        build = machine.build(device, used)
        if found is not None:
            _say_resumed(name, found, builds, build)
            old = isolation.Touched(run.root, found.manifest.get("touched"))
            touched.read |= old.read
            touched.wrote |= old.wrote
            touched.connected |= old.connected
        if build not in builds[-1:]:
            builds.append(build)
        objective = make(shard, device)
        outcome = fit(
            objective,
            plan.settings,
            folder,
            stop,
            run_id=run.id,
            label=name,
            start=found,
            facts=lambda: {"builds": builds, "touched": touched.as_dict()},
            on_checkpoint=on_checkpoint,
        )
        _commit(run, name, plan, objective, shard, outcome, builds, touched, facts)


def _commit(
    run: Run,
    name: str,
    plan: Plan,
    objective: Objective,
    shard: Shard,
    outcome: Outcome,
    builds: list[dict[str, Any]],
    touched: isolation.Touched,
    facts: Callable[[], Mapping[str, Any]] | None,
) -> None:
    """Weights and configuration, then the card."""
    folder, model = run.expert(name), objective.model
    if not isinstance(model, base.Backbone):
        raise TypeError(f"the objective of {name} must train a Backbone, not {type(model).__name__}")
    weights, config = base.save(model.cpu(), folder)
    samples = outcome.steps * plan.batch
    store.write_card(
        folder,
        plan.kind,
        run.id,
        [weights, config, METRICS],
        name=name,
        **plan.fields,
        network=model.facts,
        sha256=store.sha256_file(folder / weights),
        parameters=model.parameters_total,
        steps=outcome.steps,
        batch=plan.batch,
        samples=samples,
        train_clips=len(shard.train),
        validation_clips=len(shard.validation),
        epochs=round(samples / len(shard.train), 4),
        forward_flops=plan.forward_flops,
        flops=flops.training_flops(plan.forward_flops, outcome.steps, plan.batch),
        seconds=round(outcome.seconds, 3),
        resumed=outcome.resumed,
        validation=outcome.validation,
        best=outcome.best,
        build=builds[-1],
        threads=builds[-1]["threads"],
        builds=builds,
        bitwise=len(builds) == 1,
        touched=touched.as_dict(),
        **({} if facts is None else {"island": dict(facts())}),
    )


def _label(name: str) -> str:
    return f"expert {name}" if name.isdigit() else f"the {name}"


def _finished(run: Run, folder: Path) -> bool:
    """Whether the job is committed and its files are there in full size; `verify` holds them to their hashes."""
    card = store.read_card(folder)
    if card is None or card.get("run") != run.id:
        return False
    for name, entry in card["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            logger.warning("%s/%s is missing or torn: made anew from the last checkpoint", folder.name, name)
            return False
    return True


def _say_resumed(name: str, found: Checkpoint, builds: list[dict[str, Any]], build: dict[str, Any]) -> None:
    logger.info("%s continues at step %d", name, found.step)
    changed = machine.differences(builds[-1], build) if builds else []
    if changed:
        message = f"{_label(name)} continues on another build ({'; '.join(changed)}): {machine.TOLERANCE}"
        logger.warning(message)
        print(message, file=sys.stderr)


@contextlib.contextmanager
def _stopping(stop: StopFlag | None, seconds: float | None) -> Iterator[StopFlag]:
    if stop is None:
        with StopFlag(seconds) as own:
            yield own
        return
    if seconds is not None:
        stop.limit(seconds)
    yield stop
