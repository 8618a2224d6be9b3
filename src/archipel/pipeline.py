"""The flow of a run as plain functions: ``init`` makes one, each stage does what is missing, ``run_all`` does all of it.

    clips + captions -> prepare -> partition -> train (K experts, monolith) -> route -> generate -> evaluate -> report

Every stage is idempotent: called again it returns at once, interrupted it continues where it was.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archipel import store
from archipel.errors import ArchipelError
from archipel.making import init as init
from archipel.making import open_run as open_run
from archipel.making import resolve as resolve
from archipel.progress import StopFlag, log_to
from archipel.run import MONOLITH, ROUTER, TRUNK, Run

if TYPE_CHECKING:
    from archipel.evaluation.against import Against
    from archipel.islands.launch.engine import Engine
    from archipel.training.local import Local

STAGES = ("prepare", "partition", "train", "route", "generate", "evaluate", "report")


# --- stages ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stopping(stop: StopFlag | None) -> Iterator[StopFlag]:
    if stop is not None:
        yield stop
    else:
        with StopFlag() as own:
            yield own


@contextlib.contextmanager
def _alone(run: Run, stage: str, *folders: Path) -> Iterator[None]:
    """Hold the stage's lock; what a killed process left half-written in the stage's own ``folders`` goes first."""
    with store.lock(run.root / ".locks" / f"{stage}.lock", f"{stage} of {run.root}"):
        for folder in folders:
            for torn in folder.rglob(".*.tmp*"):
                torn.unlink(missing_ok=True)
        yield


def prepare(run: Run, stop: StopFlag | None = None, engine: Engine | None = None) -> None:
    from archipel.prepare import prepare as stage

    with _stopping(stop) as flag, _alone(run, "prepare", run.clips, run.cache, run.codec, run.text, run.base):
        stage(run, flag, None if engine is None else engine.items)
        if run.config.expert.weights and not run.done(run.base):
            from archipel.training.bases import take

            with log_to(run.log("prepare")):
                take(run)


def partition(run: Run, stop: StopFlag | None = None) -> None:
    from archipel.partition.stage import partition as stage

    with _stopping(stop) as flag, _alone(run, "partition", run.partition, run.shard(MONOLITH).parent):
        stage(run, flag)


def train(
    run: Run,
    name: str,
    *,
    seconds: float | None = None,
    threads: int | None = None,
    stop: StopFlag | None = None,
    local: Local | None = None,
) -> None:
    """Train one job in this process: an expert's number, ``monolith``, ``router``, or ``trunk``, whose weights then go into
    the shards. ``local`` says how it is computed here (None: as site.toml says); one of several processes that torchrun
    started takes its part."""
    from archipel.islands import site
    from archipel.training.ranks import launched

    local = site.local(run.root, {}) if local is None else local
    run.expert(name)  # names the jobs where there is no such one
    with log_to(run.log(f"train-{name}")) if launched()[0] == 0 else contextlib.nullcontext():
        if name == ROUTER:
            from archipel.routing.stage import train_router

            train_router(run, seconds=seconds, threads=threads, stop=stop, local=local)
        else:
            from archipel.training.stage import train as stage

            stage(run, name, seconds=seconds, threads=threads, stop=stop, local=local)
    if name == TRUNK and launched()[0] == 0 and run.done(run.expert(TRUNK)):
        _carry_trunk(run, stop)


def _carry_trunk(run: Run, stop: StopFlag | None) -> None:
    """Bring the trunk to the jobs: into their shards, or as the base that they are adapters of."""
    from archipel.training.bases import from_trunk

    if run.config.expert.lora_rank:
        from_trunk(run)
    else:
        partition(run, stop)


def train_trunk(run: Run, stop: StopFlag | None = None, *, threads: int | None = None) -> None:
    """The shared start of a warm run, in this process: shards without it, its training, then shards (or a base) that carry it.
    Does nothing where they do."""
    from archipel.partition.shards import carries_start

    if carries_start(run):
        return
    with _stopping(stop) as flag:
        partition(run, flag)
        if not carries_start(run):
            train(run, TRUNK, threads=threads, stop=flag)  # one that is trained already is only carried


def train_all(
    run: Run,
    stop: StopFlag | None = None,
    *,
    workers: int | None = None,
    threads: int | None = None,
    engine: Engine | None = None,
) -> None:
    """Train every missing job and write the ledger: where ``engine`` says, else each in a process of its own, one per GPU
    where there are any, else ``workers`` at a time (default: one per core)."""
    from archipel.islands.launch.local import launch
    from archipel.training import machine
    from archipel.training.budget import write_ledger

    run.need(run.shard(MONOLITH), "partition")
    if len(_trained(run)) < len(run.job_names):
        with _stopping(stop) as flag:
            if run.config.expert.warm_start:
                train_trunk(run, flag, threads=threads)
            if engine is not None:
                engine.train([name for name in run.job_names if name not in _trained(run)], flag)
            else:
                launch(run, run.job_names, flag, workers=workers, threads=threads, accelerators=machine.accelerators())
    write_ledger(run)


def route(run: Run, stop: StopFlag | None = None) -> None:
    from archipel.islands import site
    from archipel.routing.stage import route as stage

    with _stopping(stop) as flag:
        stage(run, stop=flag, local=site.local(run.root, {}))


def generate(run: Run, stop: StopFlag | None = None, engine: Engine | None = None) -> None:
    """Generate the clips that will be scored, all arms from the same captions and noise."""
    from archipel.ensemble.stage import generate_arms

    folder = run.samples(run.config.evaluate.split)
    with _stopping(stop) as flag, _alone(run, "generate", folder), log_to(run.log("generate")):
        if engine is None:
            generate_arms(run, flag)
        else:
            generate_arms(run, flag, engine.tasks, engine.device)


def evaluate(run: Run, stop: StopFlag | None = None) -> None:
    from archipel.evaluation.stage import evaluate as stage

    split = run.config.evaluate.split
    with _stopping(stop) as flag, _alone(run, "evaluate", run.scores(split).parent, run.samples(split) / "features"):
        stage(run, flag)


def evaluate_against(run: Run, folder: Path, stop: StopFlag | None = None, *, max_rejected: float = 0.1) -> Against:
    """Score any folder of clips against the run's clips of ``evaluate.split``."""
    from archipel.evaluation.against import against

    with (
        _stopping(stop) as flag,
        _alone(run, "evaluate", run.scores(run.config.evaluate.split).parent),
        log_to(run.log("evaluate")),
    ):
        return against(run, folder, flag, max_rejected=max_rejected)


def report(run: Run) -> Path:
    """Write the page, after bringing the ledger up to date with the cards."""
    from archipel.report import report as stage
    from archipel.training.budget import write_ledger

    with log_to(run.log("report")):
        write_ledger(run)
        return stage(run)


@dataclass(frozen=True)
class StageState:
    name: str
    state: str  # "done", "partly", "missing"
    detail: str


def _trained(run: Run) -> list[str]:
    return [name for name in run.job_names if run.done(run.expert(name))]


def states(run: Run) -> list[StageState]:
    """What is done and what is missing, from the files alone."""
    trained = _trained(run)
    protocol = run.config.evaluate.split
    samples = run.samples(protocol)
    arms = [arm for arm in run.config.evaluate.arms if (samples / f"{arm}.safetensors").exists()]

    def of(done: bool, partly: bool = False) -> str:
        return "done" if done else "partly" if partly else "missing"

    brought = [run.text] * bool(run.config.text.path) + [run.base] * bool(run.config.expert.weights)
    prepared = all(run.done(folder) for folder in (run.clips, run.codec, *brought))
    prepared = prepared and (run.cache / "index.json").exists()
    prepared = prepared and (not run.config.expert.weights or run.done(run.base))
    ready = _features_ready(run) if prepared else False
    return [
        StageState("prepare", of(prepared and ready, run.cache.exists()), ""),
        StageState(
            "partition", of(run.done(run.partition) and run.done(run.shard(MONOLITH)), run.partition.exists()), ""
        ),
        StageState(
            "train",
            of(len(trained) == len(run.job_names), (run.root / "experts").exists()),
            f"{len(trained)} of {len(run.job_names)} jobs",
        ),
        StageState("route", of((run.expert(ROUTER) / "calibration.json").exists()), ""),
        StageState(
            "generate", of(run.done(samples), bool(arms)), f"{len(arms)} of {len(run.config.evaluate.arms)} arms"
        ),
        StageState("evaluate", of(run.scores(protocol).exists()), ""),
        StageState("report", of((run.report / "index.html").exists()), ""),
    ]


def _features_ready(run: Run) -> bool:
    index = store.read_json(run.cache / "index.json")
    return {"pixels", "latents", "text", "features"} <= set(index.get("kinds", index))


def run_all(
    run: Run,
    stop: StopFlag | None = None,
    *,
    threads: int | None = None,
    engine: str = "local",
    store_url: str | None = None,
    site: Sequence[str] = (),
) -> Path:
    """Do all that is missing, in order, training with ``threads`` threads per job. Returns the report's path.

    ``engine`` (local, ray, slurm or sky) decides only where clips are prepared, experts trained and samples made;
    ``store_url`` is a store that all its machines see (default: a folder of the run); ``site`` goes on top of site.toml.
    """
    from archipel.islands.launch.engine import open_engine

    opened = open_engine(engine, run, store=store_url, threads=threads, site=site)
    with contextlib.ExitStack() as stack:
        flag = stack.enter_context(_stopping(stop))
        if opened is not None:
            stack.enter_context(opened)
        where: dict[str, Any] = {} if opened is None else {"engine": opened}
        stages: list[Callable[[Run, StopFlag], None]] = [
            functools.partial(prepare, **where),
            partition,
            functools.partial(train_all, threads=threads, **where),
            route,
            functools.partial(generate, **where),
            evaluate,
        ]
        for stage in stages:
            with log_to(run.log("run")):
                stage(run, flag)
            if flag:
                raise flag.error(str(run.root))
    return report(run)


# --- looking ---------------------------------------------------------------------------------------------------------


def status(run: Run) -> dict[str, Any]:
    """A JSON-able summary: stages, and each job's step, loss and state."""
    from archipel.islands.launch.local import steps_of

    jobs = []
    for name in [*run.trunk_names, *run.job_names]:
        done = run.done(run.expert(name))
        row: dict[str, Any] = {
            "name": name,
            "state": "done" if done else "free",
            "step": 0,
            "steps": steps_of(run, name),
            "loss": None,
        }
        progress = run.expert(name) / "progress.json"
        if progress.exists():
            with contextlib.suppress(Exception):
                seen = store.read_json(progress)
                row |= {"step": seen["step"], "loss": seen.get("loss"), "steps_per_s": seen.get("steps_per_s")}
        if done:
            row["step"] = row["steps"]
        elif row["step"]:
            row["state"] = "started"
        jobs.append(row)
    return {
        "format": 1,
        "run": run.id,
        "root": str(run.root),
        "stages": [{"name": s.name, "state": s.state, "detail": s.detail} for s in states(run)],
        "jobs": jobs,
    }


def verify(run: Run) -> tuple[int, list[store.Problem]]:
    """Hold every committed file of the run to its checksum. Returns (folders checked, problems)."""
    problems: list[store.Problem] = []
    engines = run.root / "store"  # a published run, whose parts have readers of their own
    cards = [path for path in sorted(run.root.rglob("card.json")) if not path.is_relative_to(engines)]
    for path in cards:
        try:
            card = store.read_card(path.parent)
            problems += store.check_card(path.parent)
        except ArchipelError as error:
            problems.append(store.Problem(path, str(error)))
            continue
        shared = {"cache", "study"} & set(path.relative_to(run.root).parts)  # of several runs, or of a study's own ones
        if card is not None and card.get("run") != run.id and not shared:
            problems.append(store.Problem(path, f"was written for another run ({str(card.get('run'))[:12]})"))
    for path in [*sorted(run.root.glob("scores/[!.]*.json")), run.ledger]:  # a dot: left aside by a killed writer
        if path.exists():
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                problems.append(store.Problem(path, f"is not readable JSON ({error})"))
    return len(cards), problems
