"""One training job as a process: locked, watched, resumed, committed. Experts, monolith and router share it."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from archipel import store
from archipel.backbones import base, flops, lora
from archipel.errors import ArchipelError
from archipel.progress import StopFlag
from archipel.run import Run
from archipel.training import bases, checkpoint, isolation, launch, machine
from archipel.training.batches import Shard, open_shard
from archipel.training.checkpoint import Checkpoint
from archipel.training.journal import METRICS
from archipel.training.local import Local
from archipel.training.loop import CHECKPOINTS, Objective, Outcome, Settings, fit
from archipel.training.precision import FLOAT32
from archipel.training.ranks import Ranks, join, launched, own_device

logger = logging.getLogger("archipel")


@dataclass(frozen=True)
class Plan:
    """How a job is trained. ``kind`` is its card's; ``forward_flops`` are per clip; ``fields`` go into the card; ``warm``:
    it begins with the weights that its shard carries, which the card then names; ``base``: with those in ``base/``.
    ``training_flops`` are of one step on one clip (0: three forwards)."""

    kind: str
    settings: Settings
    batch: int
    forward_flops: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    warm: bool = False
    training_flops: int = 0
    base: bool = False

    def flops(self, steps: int) -> int:
        """FLOPs of so many steps of the job."""
        once = self.training_flops or flops.training_flops(self.forward_flops, 1, 1)
        return once * steps * self.batch


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
    local: Local | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
    facts: Callable[[], Mapping[str, Any]] | None = None,
) -> bool:
    """Train one job of a run to the end, or until ``stop`` or ``seconds``; continue where an earlier process stopped.

    Opens run.toml and the job's own shard, and writes below ``run.expert(name)``; the card, written last, lists what
    was touched. ``local`` says how it is computed here; ``threads`` and ``device`` go over it. Where torchrun started
    several processes, all call this and the first writes; where ``local.gpus`` asks for several and there is one, they
    are started, train, and end (see ``launch``). ``on_checkpoint`` is given the folder of each checkpoint right after it
    is committed; what ``facts()`` gives at the end is the card's "island". Returns False where the job was finished already.

    Raises LockedError where another process trains the same job, Stopped with everything saved, MissingStageError
    without a shard, ArchipelError for the rest that people can mend.
    """
    folder, local = run.expert(name), (local or Local()).over(threads=threads, device=device)
    if local.gpus > 1 and launched()[1] == 1:
        if _finished(run, folder):
            print(f"{_label(name)} is already trained: {folder}", file=sys.stderr)
            return False
        with _stopping(stop, seconds) as flag:
            launch.train(run, name, local, flag, label=_label(name), on_checkpoint=on_checkpoint)
        if facts is not None:
            launch.add_to_card(folder, facts())
        return True
    on = own_device(machine.pick_device(local.device), launched()[1])
    with join(on, _label(name)) as ranks:
        if ranks.same(_finished(run, folder)):
            if ranks.first:
                print(f"{_label(name)} is already trained: {folder}", file=sys.stderr)
            return False
        try:
            with (
                isolation.watch(run.root) as touched,
                _locked(run, name, ranks),
                _stopping(stop, seconds) as flag,
            ):
                if ranks.same(_finished(run, folder)):  # by the process that held the lock
                    return False
                job = _Job(run, name, plan, replace(local, device=on), ranks, touched, on_checkpoint, facts)
                job.train(make, flag)
        except OSError as error:
            raise ArchipelError(
                f"{_label(name)}: {error.filename or folder} cannot be used ({error.strerror or error}): make it writable or "
                "free space, then start again; what was finished is kept"
            ) from error
    return True


@contextlib.contextmanager
def _locked(run: Run, name: str, ranks: Ranks) -> Iterator[None]:
    """The first process holds the job's lock for all."""
    with contextlib.ExitStack() as stack:
        path = run.root / ".locks" / f"train-{name}.lock"
        ranks.lead(lambda: stack.enter_context(store.lock(path, f"{_label(name)} of {run.root}")))
        yield


@dataclass
class _Job:
    """One job while it is trained; ``local.device`` is this process's own."""

    run: Run
    name: str
    plan: Plan
    local: Local
    ranks: Ranks
    touched: isolation.Touched
    on_checkpoint: Callable[[Path], None] | None
    facts: Callable[[], Mapping[str, Any]] | None

    @property
    def folder(self) -> Path:
        return self.run.expert(self.name)

    def train(self, make: Make, stop: StopFlag) -> None:
        shard, found = self._open()
        plain = self._build(0)
        builds = (
            [{**machine.OLDER, "micro_batch": self.plan.batch, **b} for b in found.manifest.get("builds", [])]
            if found
            else []
        )
        # Other processes than before make other bits anyway: then the threads that suit them best.
        kept = int(builds[-1]["threads"]) if builds and builds[-1]["world_size"] == plain["world_size"] else None
        with machine.threads(self.local.threads or kept) as used:
            build = self._build(used)
            if found is not None:
                if self.ranks.first:
                    _say_resumed(self.name, found, builds, build)
                old = isolation.Touched(self.run.root, found.manifest.get("touched"))
                self.touched.read |= old.read
                self.touched.wrote |= old.wrote
                self.touched.connected |= old.connected
            if build not in builds[-1:]:
                builds.append(build)
            if self.local.precision != FLOAT32 and self.local.device == "cpu" and self.ranks.first:
                _warn(
                    "bfloat16 on a CPU is hardly ever faster than float32, and can be a hundred times slower: meant for trying it out"
                )
            objective = make(shard, str(self.local.device))
            outcome = fit(
                objective,
                self.plan.settings,
                self.folder,
                stop,
                run_id=self.run.id,
                label=self.name,
                start=found,
                facts=lambda: {"builds": builds, "touched": self.touched.as_dict()},
                on_checkpoint=self.on_checkpoint,
                local=self.local,
                ranks=self.ranks,
            )
            self._commit(objective, shard, outcome, builds)

    def _open(self) -> tuple[Shard, Checkpoint | None]:
        """The shard and the newest good checkpoint. The first process holds them to their checksums; the others rely on it."""
        run, checkpoints = self.run, self.folder / CHECKPOINTS

        def check() -> tuple[Shard, Checkpoint | None]:
            if Run.open(run.root).id != run.id:  # seen by the watch, as the shard is
                raise ArchipelError(f"{run.root / 'run.toml'} changed while this process was starting: start it again")
            return open_shard(run.shard(self.name)), checkpoint.latest(checkpoints, run.id, self.name)

        checked = self.ranks.lead(check)
        step = int(self.ranks.same(-1 if checked is None or checked[1] is None else checked[1].step))
        if checked is not None:
            return checked
        shard = open_shard(run.shard(self.name), hashed=False)
        return shard, None if step < 0 else checkpoint.at(checkpoints, step, run.id)

    def _build(self, threads: int) -> dict[str, Any]:
        size = self.ranks.size
        share = -(-self.plan.batch // size)
        return machine.build(
            str(self.local.device),
            threads,
            self.local,
            micro_batch=min(self.local.micro_batch or share, share),
            world_size=size,
        )

    def _commit(self, objective: Objective, shard: Shard, outcome: Outcome, builds: list[dict[str, Any]]) -> None:
        """Weights and configuration, then the card: by the first process, from the parts of all."""
        model = objective.model
        if not isinstance(model, base.Backbone):
            raise TypeError(f"the objective of {self.name} must train a Backbone, not {type(model).__name__}")
        state = None
        if self.ranks.size > 1 or lora.is_adapted(model.facts):
            # None on all processes but the first, which alone writes.
            state = {name: cast(Any, self.ranks.whole(p, p)) for name, p in lora.parameters(model).items()}
        others = self.ranks.texts(json.dumps(self.touched.as_dict() | {"evidence": []}))

        def write() -> None:
            for one in others:
                seen = json.loads(one)
                self.touched.read.update(seen["read"])
                self.touched.wrote.update(seen["wrote"])
                self.touched.connected.update(seen["connected"])
            own = None if state is None else lora.to_file(model.facts, state)
            files = base.save(model.cpu() if own is None else model, self.folder, own)
            self._write_card(model, files, shard, outcome, builds)

        self.ranks.lead(write)

    def _write_card(
        self, model: base.Backbone, files: tuple[str, str], shard: Shard, outcome: Outcome, builds: list[dict[str, Any]]
    ) -> None:
        plan, samples = self.plan, outcome.steps * self.plan.batch
        store.write_card(
            self.folder,
            plan.kind,
            self.run.id,
            [*files, METRICS],
            name=self.name,
            **plan.fields,
            network=model.facts,
            sha256=store.sha256_file(self.folder / files[0]),
            parameters=sum(p.numel() for p in lora.parameters(model).values()),
            steps=outcome.steps,
            batch=plan.batch,
            samples=samples,
            train_clips=len(shard.train),
            validation_clips=len(shard.validation),
            epochs=round(samples / len(shard.train), 4),
            forward_flops=plan.forward_flops,
            flops=plan.flops(outcome.steps),
            seconds=round(outcome.seconds, 3),
            resumed=outcome.resumed,
            validation=outcome.validation,
            best=outcome.best,
            build=builds[-1],
            threads=builds[-1]["threads"],
            builds=builds,
            bitwise=len(builds) == 1,
            touched=self.touched.as_dict(),
            **({"warm_start": dict(shard.start or {})} if plan.warm else {}),
            **(bases.card_fields(self.run.base) if plan.base else {}),
            **({} if self.facts is None else {"island": dict(self.facts())}),
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
        _warn(message)


def _warn(message: str) -> None:
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
