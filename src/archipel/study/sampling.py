"""Clips of every arm, and what is kept of them: features and scalars per clip, and the first few clips to look at.

One file per arm, seed and prompt set below RUN/study/samples; clips themselves are not kept, since an arm can make them
again from its seed. The work is dealt out over processes, each with one thread, so that a file's bytes depend on neither
their number nor their order.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archipel import cache, store
from archipel.contracts import Conditioning
from archipel.ensemble.stage import BATCH
from archipel.errors import ArchipelError
from archipel.evaluation import inputs as evaluated
from archipel.evaluation import probe
from archipel.evaluation.extractors import Judges
from archipel.evaluation.extractors.specs import DEFAULT
from archipel.islands.launch.local import cores
from archipel.manifest import read_manifest
from archipel.partition.assignment import load_assignment
from archipel.progress import Progress, StopFlag
from archipel.run import MONOLITH, ROUTER, Run
from archipel.study.arms import ArmSampler, Batch, arm_of, asks_router
from archipel.study.members import Members, folder
from archipel.study.plan import MAIN, SHOWN, TEST, Arm
from archipel.study.prompts import Prompts, there_are
from archipel.training import machine

CODEC, REAL = "codec", "real"
CODE = 1  # raised whenever the same inputs give other files
CLIPS, WEIGHTS = "clips", "weights"
Show = Callable[[np.ndarray], np.ndarray]
_SCALAR = "scalar/"
_FEATURE = "feature/"


@dataclass(frozen=True)
class JudgeSpec:
    """Judges beside the packaged ones, as ``Judges.open`` is told them and as they can be sent to another process."""

    specs: tuple[str, ...] = ()
    allow_torchscript: bool = False

    def open(self, run: Run) -> Judges:
        wanted = (*DEFAULT, *self.specs)
        return Judges.open(wanted, run.config.evaluate, allow_torchscript=self.allow_torchscript)


@dataclass(frozen=True)
class Kept:
    """What is kept of one arm, seed and set: features (N, D) by extractor, scalars (N,) by name, the first clips."""

    features: dict[str, np.ndarray]
    scalars: dict[str, np.ndarray]
    clips: np.ndarray | None
    weights: np.ndarray | None


@dataclass(frozen=True)
class Task:
    """One file to make, in words that can be sent to another process."""

    root: str
    arm: Mapping[str, Any]
    seed: int
    prompts: str
    experts: str
    router: str
    judges: JudgeSpec
    path: str
    inputs: str


def sample_path(run: Run, prompts: str, seed: int, arm: str) -> Path:
    return folder(run) / "samples" / prompts / f"s{seed}" / f"{arm}.safetensors"


def read_kept(path: Path) -> Kept:
    """Raises DamagedError for a file that is not one of a study's."""
    tensors = store.map_tensors(path)

    def part(prefix: str) -> dict[str, np.ndarray]:
        return {n.removeprefix(prefix): np.asarray(a) for n, a in tensors.items() if n.startswith(prefix)}

    return Kept(part(_FEATURE), part(_SCALAR), tensors.get(CLIPS), tensors.get(WEIGHTS))


def tasks(members: Members, judges: JudgeSpec, arms: Sequence[Arm] | None = None) -> list[Task]:
    """Every file that a study needs, made or not: main's first, seed by seed."""
    run, plan = members.run, members.plan
    identity = judges.open(run).identity
    prompts: dict[str, Prompts] = {}
    found = []
    for seed in range(plan.seeds):
        for arm in arms if arms is not None else plan.arms:
            for name in arm.sets if seed < arm.seeds else ():
                if name not in prompts:
                    prompts[name] = Prompts.of(run, name)
                experts = members.of(arm.member, seed)
                router = members.of(arm.router or (MAIN if arm.how == "cluster" else arm.member), seed)
                inputs = _inputs(run, arm, seed, prompts[name], experts, router, identity)
                path = sample_path(run, name, seed, arm.name)
                found.append(
                    Task(
                        str(run.root),
                        asdict(arm),
                        seed,
                        name,
                        str(experts.root),
                        str(router.root),
                        judges,
                        str(path),
                        inputs,
                    )
                )
    return found


def _inputs(
    run: Run, arm: Arm, seed: int, prompts: Prompts, experts: Run, router: Run, identity: Mapping[str, Any]
) -> str:
    """Hash of all that decides a file: trained parts, calibration, captions, seeds, settings, judges."""
    parts: dict[str, Any] = {}
    if arm.how in (MONOLITH, "cluster"):
        parts[MONOLITH] = (store.read_card(experts.expert(MONOLITH)) or {}).get("files")
    else:
        for name in experts.expert_names:
            parts[name] = (store.read_card(experts.expert(name)) or {}).get("files")
    if asks_router(arm):
        parts[ROUTER] = (store.read_card(router.expert(ROUTER)) or {}).get("files")
        path = router.expert(ROUTER) / "calibration.json"
        parts["calibration"] = store.sha256_file(path) if path.is_file() else None
    own = {"how": arm.how, "settings": dict(arm.settings), "sample": experts.config.sample.model_dump(mode="json")}
    return store.sha256_json(
        {
            "code": CODE, "run": run.id, "arm": own, "seed": seed, "prompts": prompts.digest, "parts": parts,
            "judges": dict(identity), "batch": BATCH,
        }
    )  # fmt: skip


def made(task: Task) -> bool:
    path = Path(task.path)
    facts = path.with_suffix(".json")
    return path.is_file() and facts.is_file() and store.read_json(facts).get("inputs") == task.inputs


# --- making ----------------------------------------------------------------------------------------------------------


def sample_all(members: Members, judges: JudgeSpec, stop: StopFlag, *, workers: int | None = None) -> None:
    """Make every file that is missing, and those of real clips and of the codec. Raises Stopped with all made files kept."""
    run = members.run
    reference(run, judges, stop)
    missing = [task for task in tasks(members, judges) if not made(task)]
    deal(missing, stop, "study: clips", workers=workers)


def deal(missing: Sequence[Task], stop: StopFlag, label: str, *, workers: int | None = None) -> None:
    """Make files in several processes (here, where there is a GPU). Raises Stopped, and what a file could not be made for."""
    if not missing:
        return
    count = 1 if machine.accelerators() else min(workers or cores(), len(missing))
    with Progress(label, len(missing)) as bar:
        if count == 1:
            for task in missing:
                if stop:
                    raise stop.error("the study")
                make(task)
                bar.advance(note=_note(task))
            return
        with _pool(count) as pool:
            waiting = iter(missing)
            running: dict[concurrent.futures.Future[None], Task] = {}
            while True:
                for task in waiting:
                    running[pool.submit(make, task)] = task
                    if len(running) >= 2 * count:
                        break
                if not running:
                    return
                done, _ = concurrent.futures.wait(running, 0.5, concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    task = running.pop(future)
                    _result(future, task, stop)
                    bar.advance(note=_note(task))
                if stop:
                    for future in running:
                        future.cancel()
                    raise stop.error("the study")


def _result(future: concurrent.futures.Future[None], task: Task, stop: StopFlag) -> None:
    try:
        future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        if stop:  # whoever ends a group of processes ends these as well
            raise stop.error("the study") from error
        raise ArchipelError(
            f"a process that made clips of {_note(task)} ended without an answer, as one does when memory runs out: start the "
            'study again with --workers 1. In a script of your own, call it below `if __name__ == "__main__":`'
        ) from error


def _note(task: Task) -> str:
    return f"{task.arm['name']} s{task.seed} {task.prompts}"


@contextlib.contextmanager
def _pool(count: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Processes with one thread each, which leave Ctrl-C to this one and end with it."""
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    pool = concurrent.futures.ProcessPoolExecutor(
        count, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=(os.getpid(),)
    )
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _begin(parent: int) -> None:
    for name in ("SIGINT", "SIGHUP"):  # the first process is told as well, and lets this one finish its file
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            threading.Event().wait(1.0)
        os._exit(1)  # nobody is left to make clips for

    threading.Thread(target=watch, daemon=True).start()


@functools.lru_cache(maxsize=2)
def _judges(root: str, spec: JudgeSpec) -> Judges:
    return spec.open(Run.open(root))


@functools.lru_cache(maxsize=4)
def _prompts(root: str, name: str) -> tuple[Run, Prompts, Conditioning]:
    run = Run.open(root)
    found = Prompts.of(run, name)
    return run, found, found.cond(run)


def make(task: Task) -> None:
    """Make one file: sample in batches, measure, keep."""
    run, prompts, cond = _prompts(task.root, task.prompts)
    arm = arm_of(task.arm)
    experts, router = Run.open(task.experts), Run.open(task.router)
    with machine.threads(1) if not machine.accelerators() else contextlib.nullcontext():
        missing = arm.settings.get("missing")
        k = experts.config.partition.k
        present = None if missing is None else [number for number in range(k) if number != missing]
        sampler = ArmSampler(arm, experts, router, device=machine.pick_device(None), present=present)
        clips, weights = sample(sampler, prompts, cond, prompts.seeds(run, task.seed), load_assignment(experts))
        measured = _judges(task.root, task.judges).measure(clips, prompts.captions)
    keep(Path(task.path), measured.features, measured.scalars, clips, weights, {"inputs": task.inputs, "arm": arm.name})


def sample(
    sampler: ArmSampler, prompts: Prompts, cond: Conditioning, seeds: Sequence[int], assigned: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Clips uint8 (N, F, H, W, 3) and weights float32 (N, S, K) of all captions."""
    clips, weights = [], []
    for begin in range(0, len(seeds), BATCH):
        part = slice(begin, begin + BATCH)
        batch = Batch(cond[part], seeds[part], assigned[prompts.rows[part]])
        latents, trace = sampler.sample(batch)
        clips.append(sampler.decode(latents))
        weights.append(trace.per_step(sampler.settings.solver))
    return np.concatenate(clips), np.concatenate(weights)


def keep(
    path: Path,
    features: Mapping[str, np.ndarray],
    scalars: Mapping[str, np.ndarray],
    clips: np.ndarray,
    weights: np.ndarray | None,
    facts: Mapping[str, Any],
) -> None:
    """Write one file and, last, its facts. Raises ArchipelError where a feature is not finite: the clips are unusable."""
    for name, values in {**features, **scalars}.items():
        if not np.isfinite(values).all():
            raise ArchipelError(f"{path}: {name} holds numbers that are not finite; the arm's clips are unusable")
    tensors: dict[str, np.ndarray] = {_FEATURE + name: np.asarray(a, np.float32) for name, a in features.items()}
    tensors |= {_SCALAR + name: np.asarray(a, np.float64) for name, a in scalars.items()}
    tensors[CLIPS] = np.ascontiguousarray(clips[:SHOWN])
    if weights is not None:
        tensors[WEIGHTS] = weights
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").unlink(missing_ok=True)  # until they are written again the file is nobody's
    store.write_tensors(path, tensors)
    store.write_json(path.with_suffix(".json"), dict(facts))


# --- real clips ------------------------------------------------------------------------------------------------------


def reference_path(run: Run, name: str = REAL) -> Path:
    return folder(run) / "samples" / f"{name}.safetensors"


def reference(run: Run, judges: JudgeSpec, stop: StopFlag) -> None:
    """Features and scalars of all real clips of the manifest, and of their reconstructions, each made once."""
    clips = read_manifest(run.manifest)
    pixels = cache.open_kind(run.cache, "pixels")["clips"]
    judge = judges.open(run)
    latents = cache.open_kind(run.cache, "latents").folder.name
    digest = Prompts.of(run, TEST).digest
    inputs = store.sha256_json(
        {"code": CODE, "run": run.id, "judges": judge.identity, "latents": latents, "prompts": digest}
    )
    used = _used_rows(run)
    test = np.unique(Prompts.of(run, TEST).rows, return_index=True)
    first = test[0][np.argsort(test[1])]  # the first caption of every row, in the order of the set
    wanted: dict[str, tuple[np.ndarray, Show]] = {
        REAL: (np.arange(len(clips)), np.asarray),
        CODEC: (used, _through_codec(run)),
        evaluated.STATIC: (first, probe.static),
        evaluated.REVERSED: (first, probe.backwards),
    }
    for name, (rows, show) in wanted.items():
        path = reference_path(run, name)
        facts = path.with_suffix(".json")
        if path.is_file() and facts.is_file() and store.read_json(facts).get("inputs") == inputs:
            continue
        parts = []
        with Progress(f"study: {name} clips", len(rows)) as bar:
            for begin in range(0, len(rows), 2 * BATCH):
                if stop:
                    raise stop.error("the study")
                some = rows[begin : begin + 2 * BATCH]
                parts.append(judge.measure(show(np.array(pixels[some])), [clips[row].caption for row in some]))
                bar.advance(len(some))
        features = {n: np.concatenate([part.features[n] for part in parts]) for n in judge.features}
        scalars = {n: np.concatenate([part.scalars[n] for part in parts]) for n in judge.scalars}
        scalars["row"] = rows.astype(np.float64)
        shown = show(np.array(pixels[rows[:SHOWN]]))
        keep(path, features, scalars, shown, None, {"inputs": inputs, "arm": name})


def show_real(run: Run, prompts: Prompts) -> None:
    """The real clips of a set's first captions, beside the arms' own."""
    path = sample_path(run, prompts.name, 0, REAL)
    if not path.is_file():
        pixels = cache.open_kind(run.cache, "pixels")["clips"]
        path.parent.mkdir(parents=True, exist_ok=True)
        store.write_tensors(path, {CLIPS: np.ascontiguousarray(pixels[prompts.rows[:SHOWN]])})


def _used_rows(run: Run) -> np.ndarray:
    """Rows of the captions of all prompt sets."""
    return np.unique(np.concatenate([Prompts.of(run, name).rows for name in there_are(run)]))


def _through_codec(run: Run) -> Show:
    from archipel.encoders.codecs import from_uint8, load_codec, to_uint8

    codec = load_codec(run.codec)

    @torch.no_grad()
    def show(clips: np.ndarray) -> np.ndarray:
        return to_uint8(codec.decode(codec.encode(from_uint8(clips))))

    return show
