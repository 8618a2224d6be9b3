"""Publish a run: what islands need, and nothing else, put where they can reach it. The clips stay at home."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archipel import FORMAT, store
from archipel.errors import ArchipelError, DamagedError, MissingStageError
from archipel.islands import keys
from archipel.islands.objects import Objects, encode
from archipel.islands.urls import check_url, local_root
from archipel.partition.shards import carries_start
from archipel.progress import Progress, StopFlag
from archipel.run import MONOLITH, Run, begins_with_base

_RECORDS = ".published"  # in the run's folder: what was sent where, so that a broken publish goes on


@dataclass(frozen=True)
class Published:
    """What `publish` did: the run's id, how many files the bucket now lists, and how many bytes went there just now."""

    run_id: str
    url: str
    files: int
    sent: int


def to_send(run: Run) -> tuple[dict[str, Path], dict[str, Any]]:
    """Key -> file, and key -> {"sha256", "bytes"}, of all that islands (and whoever generates) need, every folder held to its card first.

    Raises MissingStageError before *partition* (or before the shared start of a warm run), DamagedError naming a damaged file.
    """
    if run.config.expert.warm_start and run.done(run.shard(MONOLITH)) and not carries_start(run):
        raise MissingStageError(
            f"the shards of {run.root} do not carry the shared start yet: run `archipel train {run.root} trunk` first"
        )
    folders = {"codec": run.codec}
    if run.config.text.path:
        folders[keys.TEXT] = run.text
    if begins_with_base(run.config):
        folders[keys.BASE] = run.base
    folders |= {keys.shard(name): run.shard(name) for name in run.expert_names}
    folders[keys.shard("all")] = run.shard(MONOLITH)
    files, listing = {keys.RUN: run.root / "run.toml"}, {}
    for prefix, folder in folders.items():
        run.need(folder, "partition" if prefix.startswith("shards/") else "prepare")
        problems = store.check_card(folder)
        if problems:
            raise DamagedError(f"{problems[0].path} {problems[0].reason}: make it anew with `archipel run {run.root}`")
        card = store.read_card(folder) or {"files": {}}
        for file in (*card["files"], keys.CARD):
            files[f"{prefix}/{file}"] = folder / file
            listing[f"{prefix}/{file}"] = card["files"].get(file)  # held to it just now
    for key, path in files.items():
        listing[key] = listing.get(key) or {"sha256": store.sha256_file(path), "bytes": path.stat().st_size}
    return files, listing


def publish(run: Run, url: str, stop: StopFlag) -> Published:
    """Put a run into a bucket or folder; called again it sends what is missing and changes nothing that is there.

    The store is probed first, the list of files (``published.json``) is created last. Raises ArchipelError for a prefix that
    holds another run, Stopped with everything kept, StoreError.
    """
    folder = local_root(check_url(url))
    if folder is not None and folder.resolve() == run.root.resolve():
        raise ArchipelError(f"{url} is the run's own folder: publish to another, such as {run.root / 'store'}")
    files, listing = to_send(run)
    objects = Objects.open(url, make=True)
    objects.give_up = lambda: bool(stop)
    objects.probe()
    _claim_prefix(objects, run)
    body = encode({"format": FORMAT, "kind": "published", "run": run.id, "jobs": run.job_names, "files": listing})
    before = objects.get(keys.PUBLISHED)
    if before in (None, body):  # else nothing there may be touched: islands may be training on it
        _send(objects, run, files, listing, stop)
    if before not in (None, body) or not objects.create(keys.PUBLISHED, body):
        raise ArchipelError(
            f"{objects.url} was published before from other shards of the same run.toml (the partition was made again?): "
            "islands may be training on them; publish to another prefix"
        )
    return Published(run.id, objects.url, len(files), objects.traffic.sent)


def _claim_prefix(objects: Objects, run: Run) -> None:
    data = (run.root / "run.toml").read_bytes()
    if objects.create(keys.RUN, data):
        return
    found = store.sha256_bytes(objects.get(keys.RUN) or b"")
    raise ArchipelError(f"{objects.url} holds another run ({found[:12]}, this is {run.id[:12]}): choose another prefix")


def _send(objects: Objects, run: Run, files: dict[str, Path], listing: dict[str, Any], stop: StopFlag) -> None:
    record = run.root / _RECORDS / f"{store.sha256_bytes(objects.url.encode())[:16]}.json"
    sent: dict[str, str] = {}
    with contextlib.suppress(ArchipelError):
        known = store.read_json(record) if record.exists() else {}
        sent = known if isinstance(known, dict) else {}
    there = {e.key: e.size for prefix in ("codec", keys.TEXT, keys.BASE, "shards") for e in objects.list(prefix)}
    todo = [
        key
        for key in files
        if key != keys.RUN and not (sent.get(key) == listing[key]["sha256"] and there.get(key) == listing[key]["bytes"])
    ]
    if not todo:
        return
    total = sum(listing[key]["bytes"] for key in todo)
    with Progress("publish (kB)", total // 1000) as bar:
        for key in todo:
            if stop:
                raise stop.error("publish")
            objects.put(key, files[key])
            sent[key] = listing[key]["sha256"]
            store.write_json(record, sent)
            bar.advance(listing[key]["bytes"] // 1000, key)
