"""What the islands' page knows: of a folder, of a store, and of a store that went away."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.studio.folders import make

from archipel import store
from archipel.islands import keys
from archipel.islands.objects import Objects
from archipel.run import Run
from archipel.studio import islands_facts
from archipel.studio.islands_facts import Curve, Job, Look, Watch
from archipel.studio.islands_page import charts, html

HOSTILE = '</td><img src=x onerror="alert(1)">'


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(islands_facts, "EVERY", 0.0)
    monkeypatch.setattr(islands_facts, "_PATIENCE", 0.05)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make(tmp_path / "run")


@pytest.fixture
def bucket(run: Run, tmp_path: Path) -> Objects:
    """A published run in a folder: of its parts only what a look needs."""
    objects = Objects.open(tmp_path / "bucket", make=True)
    toml = (run.root / "run.toml").read_bytes()
    objects.put("run.toml", toml)
    files = {"run.toml": {"sha256": store.sha256_bytes(toml), "bytes": len(toml)}}
    objects.put(
        "published.json", json.dumps({"format": 1, "kind": "published", "run": run.id, "files": files}).encode()
    )
    return objects


def hold(objects: Objects, name: str, **beat: Any) -> None:
    claim = {"nonce": "n", "island": "reef-1"}
    objects.put(keys.claim(name, 1), json.dumps(claim).encode())
    objects.put(keys.heartbeat(name, 1), json.dumps({"nonce": "n", "state": "working", **beat}).encode())


def until(watch: Watch, good: Callable[[Look], bool]) -> Look:
    end = time.monotonic() + 30
    while not good(look := watch.look()):
        assert time.monotonic() < end, look
        time.sleep(0.02)
    return look


def test_a_folder_tells_who_is_at_work_and_how_far(run: Run) -> None:
    for name in ("0", "1"):
        told = {"step": 10, "steps": 40, "loss": 1.5, "steps_per_s": 2.0, "state": "training", "resumed": 2}
        store.write_json(run.expert(name) / "progress.json", told)
    old = time.time() - 3600
    os.utime(run.expert("1") / "progress.json", (old, old))
    store.write_card(run.expert("monolith"), "expert", run.id, [])
    jobs = {job.name: job for job in Watch(run).look().jobs}
    at_work = jobs["0"]
    assert (at_work.state, at_work.step, at_work.attempt, at_work.left, at_work.loss) == ("working", 10, 3, 15.0, 1.5)
    assert jobs["1"].state == "stopped" and jobs["1"].seen >= 3600 and jobs["1"].left is None
    assert (jobs["monolith"].state, jobs["monolith"].step) == ("done", 80) and jobs["router"].state == "free"


def test_curves_grow_with_the_file_and_begin_again_with_it(run: Run) -> None:
    path, watch = run.expert("0") / "metrics.jsonl", Watch(run)
    store.write_text(
        path, '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0, "validation": 2.5, "validation_ema": 2.4}\n{"st'
    )
    assert watch.look().curves[0] == Curve("0", ((1.0, 3.0), (2.0, 2.0)), ((2.0, 2.4),))
    with path.open("a") as file:
        file.write('ep": 3, "loss": 1.0}\nnot json\n{"step": 4, "loss": NaN}\n')
    assert watch.look().curves[0].train == ((1.0, 3.0), (2.0, 2.0), (3.0, 1.0))
    store.write_text(path, '{"step": 1, "loss": 9.0}\n')  # as a resumed training does
    assert watch.look().curves[0].train == ((1.0, 9.0),)


def test_a_store_tells_holders_and_remembers_what_they_said(run: Run, bucket: Objects) -> None:
    hold(bucket, "0", step=4, steps=40, loss=2.0, steps_per_s=1.0)
    watch = Watch(None, bucket.url, run.id)
    look = until(watch, lambda look: bool(look.jobs))
    job = look.jobs[0]
    assert (job.state, job.holder, job.attempt, job.step, job.left) == ("working", "reef-1", 1, 4, 36.0)
    hold(bucket, "0", step=8, steps=40, loss=1.0)
    look = until(watch, lambda look: look.jobs[0].step == 8)
    assert look.curves[0].train == ((4.0, 2.0), (8.0, 1.0))


def test_a_holder_that_says_nothing_for_a_lease_is_silent(run: Run, bucket: Objects) -> None:
    hold(bucket, "1", step=4, steps_per_s=1.0)
    old = time.time() - 7200
    for key in (keys.claim("1", 1), keys.heartbeat("1", 1)):
        os.utime(bucket.root / key, (old, old))  # type: ignore[operator]
    job = until(Watch(None, bucket.url), lambda look: bool(look.jobs)).jobs[1]
    assert job.state == "silent" and job.left is None and job.seen > 7000


def test_a_store_that_went_away_is_named_with_the_time_and_comes_back(
    run: Run, bucket: Objects, tmp_path: Path
) -> None:
    watch = Watch(None, bucket.url)
    until(watch, lambda look: bool(look.jobs))
    (tmp_path / "bucket").rename(tmp_path / "elsewhere")
    look = until(watch, lambda look: bool(look.away))
    assert look.jobs and look.since and look.told and look.told <= look.since
    assert until(watch, lambda _: True).since == look.since
    page = html(look, now=look.since + 75)
    assert 'role="alert"' in page and "for 1m15s" in page and "stale" in page and str(tmp_path) not in page
    (tmp_path / "elsewhere").rename(tmp_path / "bucket")
    back = until(watch, lambda look: not look.away)
    assert back.jobs and back.since is None


def test_another_runs_store_is_no_source(run: Run, bucket: Objects) -> None:
    look = until(Watch(None, bucket.url, "0" * 64), lambda look: bool(look.away))
    assert not look.jobs and "no published run" in look.away


def test_a_runs_own_store_is_found(run: Run, bucket: Objects, tmp_path: Path) -> None:
    assert not Watch(run).has_store
    (tmp_path / "bucket").rename(run.root / "store")
    assert Watch(run).has_store


def test_nothing_that_a_stranger_wrote_becomes_markup() -> None:
    job = Job(HOSTILE, HOSTILE, 1, 2, 1, HOSTILE)
    look = Look("store", (job,), (Curve(HOSTILE, ((1.0, 2.0), (2.0, 1.0))),), away=HOSTILE, since=0.0)
    page = html(look) + charts(look)
    assert "<img" not in page and "&lt;img" in page
