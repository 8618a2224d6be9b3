"""The runs of a study: made from the run's own clips, partitioned, trained, calibrated. All of it continues where it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from archipel import pipeline, store
from archipel.cache import open_kind, set_index
from archipel.errors import ArchipelError
from archipel.islands.launch.local import Job, cores, launch_jobs
from archipel.manifest import read_manifest
from archipel.partition.assignment import load_assignment
from archipel.partition.shards import carries_start
from archipel.progress import StopFlag
from archipel.run import MONOLITH, ROUTER, TRUNK, Run
from archipel.study.plan import MAIN, MIXED, TEST, VALIDATION, Member, Plan, member_config
from archipel.study.prompts import Prompts
from archipel.training import bases, machine

_KINDS = ("pixels", "latents", "text", "features")
_CARD = ("format", "kind", "run", "files", "check")


@dataclass(frozen=True)
class Members:
    """The opened runs of a plan by member and seed."""

    run: Run
    plan: Plan
    runs: dict[tuple[str, int], Run]

    def of(self, member: str, seed: int) -> Run:
        return self.runs[member, seed]

    def each(self) -> Iterator[tuple[Member, int, Run]]:
        """Seed by seed, so that a study that was stopped has whole seeds to show."""
        for seed in range(self.plan.seeds):
            for member in self.plan.members:
                if (member.name, seed) in self.runs:
                    yield member, seed, self.runs[member.name, seed]

    def jobs(self) -> list[Job]:
        return [
            Job(run, name, f"{member.name}-s{seed}/")
            for member, seed, run in self.each()
            for name in _longest_first(member.names(run.config))
        ]


def folder(run: Run) -> Path:
    """RUN/study."""
    return run.root / "study"


def open_members(run: Run, plan: Plan) -> Members:
    """Make or open every member's folder. The first seed of ``main`` is the run itself, so nothing is trained twice.

    Raises ArchipelError where a member was made with other settings than the run's plan now gives.
    """
    found: dict[tuple[str, int], Run] = {}
    for member in plan.members:
        for seed in range(member.seeds):
            if (member.name, seed) == (MAIN, 0):
                found[MAIN, 0] = run
                continue
            root, wanted = folder(run) / "runs" / f"{member.name}-s{seed}", member_config(run.config, member, seed)
            if not (root / "run.toml").exists():
                found[member.name, seed] = Run.create(root, wanted)
                continue
            opened = Run.open(root)
            if opened.config != wanted:
                raise ArchipelError(
                    f"{root} was made with other settings than this study plans now (another version of Archipel, or an "
                    f"edited run.toml): remove that folder to train it anew, or {folder(run)} to begin again"
                )
            found[member.name, seed] = opened
    return Members(run, plan, found)


def make(members: Members, stop: StopFlag, *, workers: int | None = None, threads: int | None = None) -> None:
    """Prepare, partition, train and calibrate all members. Raises Stopped with everything kept, and what a stage raises."""
    run = members.run
    pipeline.prepare(run, stop)
    _check_splits(members)
    for member, _, one in members.each():
        if not _partitioned(one) or (one.config.expert.warm_start and not carries_start(one)):
            if stop:
                raise stop.error("the study")
            if one is not run:
                share(run, one)
            _partition(one, stop, member)
    _check_clusters(members)
    gpus = machine.accelerators()
    slots = workers or (gpus or cores())
    launch_jobs(members.jobs(), stop, workers=slots, threads=threads, accelerators=gpus, label="study: train")
    route(members, stop)


def _check_splits(members: Members) -> None:
    """Raises ArchipelError, before anything is trained, where a split that arms are scored on cannot be scored."""
    wanted = {name for arm in members.plan.arms for name in arm.sets}
    clips = read_manifest(members.run.manifest)
    uses = {TEST: "arms are judged on", VALIDATION: "the baseline (and in a pilot every trial) is chosen on"}
    for name, use in uses.items():
        groups = {clip.group for clip in clips if clip.split == name}
        if name in wanted and len(groups) < 2:  # distances are over pairs of different groups
            raise ArchipelError(
                f"{members.run.root}: the {name} split, which {use}, has {len(groups)} content groups and needs 2 at least: make a "
                "run with more clips, or with a larger share in clips.split"
            )


def _check_clusters(members: Members) -> None:
    """Raises ArchipelError, before anything is trained, where captions cannot be mixed, and where a router would be asked
    for experts of other clusters than it was trained on (a partition that was made on another machine, say)."""
    if any(MIXED in arm.sets for arm in members.plan.arms):
        Prompts.of(members.run, MIXED)
    asked = {(arm.member, arm.router or MAIN) for arm in members.plan.arms if arm.router or arm.how == "cluster"}
    for seed in range(members.plan.seeds):
        for name, router in sorted(asked):
            if (name, seed) not in members.runs or (router, seed) not in members.runs:
                continue
            one, two = members.of(name, seed), members.of(router, seed)
            if not np.array_equal(load_assignment(one), load_assignment(two)):
                other = two if one is members.run else one
                raise ArchipelError(
                    f"{one.root} and {two.root} have different clusters, although their settings for them are the same: one was "
                    f"partitioned on another machine or by another version. Remove {other.root} and start again"
                )


def _partitioned(run: Run) -> bool:
    return run.done(run.partition) and all(run.done(run.shard(name)) for name in (*run.expert_names, MONOLITH))


def _partition(run: Run, stop: StopFlag, member: Member) -> None:
    if TRUNK in member.jobs:
        pipeline.train_trunk(run, stop)
    else:
        pipeline.partition(run, stop)


def _longest_first(names: list[str]) -> list[str]:
    return sorted((name for name in names if name != TRUNK), key=lambda name: (name != MONOLITH, name == ROUTER, name))


def route(members: Members, stop: StopFlag) -> None:
    """Calibrate every member's router on its own validation labels."""
    for member, _, one in members.each():
        if ROUTER in member.jobs and not _calibrated(one):
            if stop:
                raise stop.error("the study")
            pipeline.route(one, stop)


def _calibrated(run: Run) -> bool:
    from archipel.routing.router import read_calibration

    return read_calibration(run) is not None and (run.expert(ROUTER) / "quality.json").is_file()


# --- shared clips ----------------------------------------------------------------------------------------------------


def share(run: Run, member: Run) -> None:
    """Give a member the clips, codec and cache of the run by hard links (copies where the disk has none).

    A member with a codec of its own (a pilot's trial) makes its own latents. Raises ArchipelError where clips or captions
    differ: members are compared on the same ones.
    """
    one, two = run.config, member.config
    if one.clips.model_copy(update={"seed": 0}) != two.clips.model_copy(update={"seed": 0}) or one.text != two.text:
        raise ArchipelError(
            f"{member.root}: a study's members share clips and captions with {run.root}, and theirs differ"
        )
    same = one.codec == two.codec
    kinds = [kind for kind in _KINDS if same or kind != "latents"]
    index = {kind: open_kind(run.cache, kind).folder.name for kind in kinds}
    for name in index.values():
        _link(run.cache / name, member.cache / name)
    set_index(member.cache, index)
    for source, target in ((run.codec, member.codec), (run.clips, member.clips)):
        if not member.done(target) and (same or source != run.codec):
            _adopt(source, target, member)
    if not same:
        pipeline.prepare(member)
    elif member.config.expert.weights:
        bases.take(member)


def _link(source: Path, target: Path) -> None:
    """The files of a committed folder, its card last."""
    if (target / "card.json").exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == "card.json"):
        if path.is_file() and not path.name.startswith("."):
            _one(path, target / path.name)


def _one(source: Path, target: Path) -> None:
    with store.aside(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, temporary)


def _adopt(source: Path, target: Path, member: Run) -> None:
    """A committed folder of the run as the member's own: the same files under a card with the member's id."""
    card = store.read_card(source) or {}
    problems = store.check_card(source)
    if problems:
        raise ArchipelError(f"{problems[0].path} {problems[0].reason}: run `archipel verify` on the run")
    target.mkdir(parents=True, exist_ok=True)
    for name in card["files"]:
        _one(source / name, target / name)
    facts: dict[str, Any] = {key: value for key, value in card.items() if key not in _CARD}
    store.write_card(target, card["kind"], member.id, card["files"], **facts)
