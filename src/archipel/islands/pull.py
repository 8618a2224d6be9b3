"""``archipel pull``: what a run's owner admitted, brought from the bucket into a run's folder, where the stages go on.

Only ``admitted/`` is brought; what is committed and not admitted is named and left. Everything is fetched aside
(``RUN/.pull``), held to its sha256, and moved into its place with the card last; called again it continues.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archipel import store
from archipel.errors import ArchipelError, DamagedError
from archipel.islands import keys
from archipel.islands.bucket import Bucket
from archipel.islands.objects import decode
from archipel.islands.remote import (
    Admitted,
    fetch_admitted,
    fetch_published,
    listed_files,
    read_admitted,
    read_card,
    title,
)
from archipel.islands.trust import Bounds
from archipel.progress import StopFlag
from archipel.run import MONOLITH, Run, begins_with_base

METRICS = "metrics.jsonl"
Admit = Callable[[str], Mapping[str, Any]]
"""``admit(name) -> {"admitted": bool, "rule", "detail"}``: the owner's admission of one job."""


@dataclass
class Pulled:
    """What `pull` did. ``brought``, ``kept`` (there already), ``waiting`` (committed, not admitted), ``open`` (not done yet):
    names of jobs; ``notes``: sentences about what needs a person."""

    run: Run
    url: str
    brought: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def pull(
    url: str | Path, root: Path, stop: StopFlag, *, run_id: str | None = None, admit: Admit | None = None
) -> Pulled:
    """Bring what is admitted into the folder ``root``: the run's own, or a new one, which gets codec and shards as well.

    ``admit`` is asked about each committed job that is not admitted. Raises ArchipelError where the folder holds another
    run or other shards than were published, LockedError where a job is being trained there, StoreError, Stopped.
    """
    bucket = Bucket.open(url, run_id, give_up=lambda: bool(stop))
    run = _folder(bucket, root)
    done = Pulled(run, bucket.url)
    with store.lock(run.root / ".locks" / "pull.lock", f"pull into {run.root}"):
        _published(bucket, run, stop)
        for name in bucket.jobs:
            if stop:
                raise stop.error("pull")
            _job(bucket, run, name, admit, done)
        shutil.rmtree(run.root / ".pull", ignore_errors=True)
    return done


def _folder(bucket: Bucket, root: Path) -> Run:
    """The folder as a run: an existing one of the same id, or a new one with the bucket's run.toml, byte for byte."""
    path = root / keys.RUN
    if path.exists():
        run = Run.open(root)
        if run.id != bucket.id:
            raise ArchipelError(
                f"{root} holds run {run.id[:12]}, {bucket.url} holds run {bucket.id[:12]}: pull into its own folder, or a new one"
            )
        return run
    if root.is_file():
        raise ArchipelError(f"{root} is a file: a run is a folder")
    torn = set(root.glob(".run.*.tmp.toml"))
    if root.exists() and set(root.iterdir()) - torn:
        raise ArchipelError(f"{root} is not empty and holds no run: choose another folder")
    store.write_bytes(path, bucket.run_toml)
    return Run.open(root)


def _published(bucket: Bucket, run: Run, stop: StopFlag) -> None:
    """Codec and shards where they are missing; where they are there they must be the ones that were published, since
    experts that learned on others do not fit."""
    folders = {"codec": run.codec, keys.shard("all"): run.shard(MONOLITH)}
    if run.config.text.path:
        folders[keys.TEXT] = run.text
    if begins_with_base(run.config):
        folders[keys.BASE] = run.base
    folders |= {keys.shard(name): run.shard(name) for name in run.expert_names}
    for prefix, folder in folders.items():
        if stop:
            raise stop.error("pull")
        card = bucket.files.get(f"{prefix}/{keys.CARD}")
        if run.done(folder):
            if card is None or store.sha256_file(folder / keys.CARD) != card.sha256:
                raise ArchipelError(
                    f"{folder} is not the one that was published to {bucket.url} (prepared or partitioned again since?): "
                    "the experts there do not fit this folder; pull into a new one"
                )
            continue
        fetch_published(bucket, prefix, folder)


def _job(bucket: Bucket, run: Run, name: str, admit: Admit | None, done: Pulled) -> None:
    found = read_admitted(bucket.objects, name)
    if found is None:
        state = bucket.state(name)
        if not state.done:
            done.open.append(name)
            return
        answer = admit(name) if admit is not None else {}
        if answer and not answer.get("admitted"):
            done.notes.append(f"{title(name)} was refused ({answer.get('rule')}): {answer.get('detail')}")
        found = read_admitted(bucket.objects, name) if answer.get("admitted") else None
        if found is None:
            done.waiting.append(name)
            return
    folder = run.expert(name)
    if run.done(folder):
        if store.sha256_file(folder / keys.CARD) != found.sha256:
            done.kept.append(name)
            done.notes.append(
                f"{title(name)} in {folder} is another one than the admitted: it is kept; remove the folder to bring that one"
            )
            return
        if not store.check_card(folder):
            done.kept.append(name)
            return
    with store.lock(run.root / ".locks" / f"train-{name}.lock", f"{title(name)} of {run.root}"):
        _bring(bucket, run, found)
    done.brought.append(name)


def _bring(bucket: Bucket, run: Run, found: Admitted) -> None:
    """Fetch aside, then move: weights and the rest first, the card last."""
    aside, folder = run.root / ".pull" / found.version, run.expert(found.name)
    card = decode(read_card(bucket.objects, found, run.id))
    files = listed_files(card.get("files"), f"the card of {title(found.name)} in {bucket.url}")
    if METRICS in files:
        sha256, size = files[METRICS]
        if size > Bounds().metrics:
            raise ArchipelError(
                f"{METRICS} of {title(found.name)} has {size} bytes, at most {Bounds().metrics} are read"
            )
        key = f"{keys.result(found.name, found.fence)}/{METRICS}"
        try:
            bucket.objects.fetch(key, aside / METRICS, sha256=sha256, size=size)
        except DamagedError as error:
            raise DamagedError(f"{error}; without it {title(found.name)} is not whole: admit another result") from error
    fetch_admitted(bucket.objects, found, run.id, aside)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / keys.CARD).unlink(missing_ok=True)
    for path in sorted(aside.iterdir(), key=lambda path: path.name == keys.CARD):
        if not path.name.endswith(".part"):
            path.replace(folder / path.name)
