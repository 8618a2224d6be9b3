"""An island end to end, in this process: published run in, committed results out; and all that may be wrong with it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archipel import store
from archipel.errors import ArchipelError, DamagedError, MissingStageError, Stopped
from archipel.islands import gc, keys, worker
from archipel.islands.bucket import Bucket, checkpoints
from archipel.islands.claims import claim
from archipel.islands.publish import publish
from archipel.islands.status import status
from archipel.islands.worker import Options, join
from archipel.progress import StopFlag
from archipel.run import Run
from archipel.training.local import Local

ONE = Local(threads=1)
SHARD = ("card.json", "train.safetensors", "validation.safetensors")


def work(bucket: Bucket, place: Path, **options: Any) -> list[str]:
    with StopFlag() as stop:
        return join(bucket, Options(work=place, local=ONE, **options), stop)


def result(bucket: Bucket, name: str) -> dict[str, Any]:
    return bucket.objects.get_json(f"{bucket.state(name).committed['key']}/card.json")


def undisturbed(run: Run, place: Path, name: str) -> str:
    """The weights' sha256 of plain training of a copy of the run."""
    shutil.copytree(run.root, place)
    worker._train(Run.open(place), name, local=ONE)
    return str(store.read_json(Run.open(place).expert(name) / "card.json")["sha256"])


def bucket_file(bucket: Bucket, key: str) -> Path:
    assert bucket.objects.root is not None
    return bucket.objects.root / key


# --- publish ---------------------------------------------------------------------------------------------------------


def test_publish_sends_what_islands_need_and_nothing_of_the_clips(small_run: Run, bucket: Bucket) -> None:
    (small_run.clips / "secret.webp").parent.mkdir(parents=True, exist_ok=True)
    listed = {entry.key for prefix in ("codec", "shards", "jobs") for entry in bucket.objects.list(prefix)}
    shards = {f"shards/{name}/{file}" for name in ("0", "1", "all") for file in SHARD}
    assert listed == {"codec/card.json", "codec/model.safetensors", *shards}
    assert set(bucket.files) == listed | {"run.toml"} and bucket.id == small_run.id


def test_publish_again_changes_nothing_and_another_run_or_partition_is_refused(
    tmp_path: Path, small_run: Run, bucket: Bucket, make_run: Callable[..., Run]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in bucket_file(bucket, "shards").rglob("*.safetensors")}
    with StopFlag() as stop:
        assert publish(small_run, bucket.url, stop).run_id == small_run.id
        with pytest.raises(ArchipelError, match="holds another run"):
            publish(make_run(tmp_path / "other", expert={"steps": 25}), bucket.url, stop)
        shard = small_run.shard("1")
        train = dict(store.map_tensors(shard / "train.safetensors"))
        store.write_tensors(shard / "train.safetensors", {**train, "latents": train["latents"] + 1})
        with pytest.raises(DamagedError, match=r"train\.safetensors"):
            publish(small_run, bucket.url, stop)
        store.write_card(shard, "shard", small_run.id, ["train.safetensors", "validation.safetensors"], cluster=1)
        with pytest.raises(ArchipelError, match="published before from other shards"):
            publish(small_run, bucket.url, stop)
    assert before == {p: p.stat().st_mtime_ns for p in bucket_file(bucket, "shards").rglob("*.safetensors")}


def test_publish_before_partition_names_the_stage(tmp_path: Path, small_run: Run) -> None:
    shutil.rmtree(small_run.shard("0"))
    with StopFlag() as stop, pytest.raises(MissingStageError, match="archipel partition"):
        publish(small_run, (tmp_path / "b").as_uri(), stop)


def test_a_broken_publish_is_no_run_until_it_is_finished(tmp_path: Path, small_run: Run) -> None:
    url = (tmp_path / "b").as_uri()
    with StopFlag() as stop:
        publish(small_run, url, stop)
    (tmp_path / "b" / "published.json").unlink()
    (tmp_path / "b" / "shards" / "1" / "train.safetensors").unlink()
    with pytest.raises(ArchipelError, match="not published whole"):
        Bucket.open(url)
    with StopFlag() as stop:
        sent = publish(small_run, url, stop).sent
    assert Bucket.open(url).id == small_run.id
    assert sent < 3 * (tmp_path / "b" / "shards" / "1" / "train.safetensors").stat().st_size


# --- join ------------------------------------------------------------------------------------------------------------


def test_an_island_brings_every_job_to_the_weights_of_plain_training(
    tmp_path: Path, small_run: Run, bucket: Bucket
) -> None:
    done = work(bucket, tmp_path / "work", name="reef")
    assert sorted(done) == ["0", "1", "monolith", "router"]
    for name in done:
        card = result(bucket, name)
        assert card["sha256"] == undisturbed(small_run, tmp_path / f"plain-{name}", name)
        assert card["sha256"] == store.sha256_file(bucket_file(bucket, f"{keys.result(name, 1)}/model.safetensors"))
        assert card["bitwise"] and card["island"]["name"] == "reef" and card["island"]["traffic"]["bytes_sent"] > 0
    told = status(bucket)["jobs"]
    assert [row["state"] for row in told] == ["done"] * 4 and all(row["holder"] == "reef" for row in told)
    assert work(bucket, tmp_path / "late") == [], "a late island finds nothing to do and ends"


def test_an_island_touches_the_keys_of_its_own_job_only(tmp_path: Path, bucket: Bucket) -> None:
    work(bucket, tmp_path / "work", only=("1",))
    seen = result(bucket, "1")["island"]["store"]
    assert seen["read"] == ["published.json", "run.toml", *(f"shards/1/{file}" for file in SHARD)]
    assert all(key.startswith("jobs/1/00000001/") for key in seen["wrote"])
    assert not (tmp_path / "work" / "shards" / "0").exists() and not (tmp_path / "work" / "shards" / "all").exists()
    touched = bucket.objects.reads | bucket.objects.writes
    assert all(key in ("run.toml", "published.json", "probe") or key.startswith("jobs/1/") for key in touched)


def test_jobs_and_only_limit_what_is_taken(tmp_path: Path, bucket: Bucket) -> None:
    assert work(bucket, tmp_path / "work", jobs=1, only=("1", "router")) == ["1"]
    states = {row["name"]: row["state"] for row in status(bucket)["jobs"]}
    assert states == {"0": "free", "1": "done", "monolith": "free", "router": "free"}
    with pytest.raises(ArchipelError, match="'9' is not a job of this run: it has 0, 1, monolith, router"):
        work(bucket, tmp_path / "work", only=("9",))


def test_the_run_that_was_asked_for_is_the_one_that_is_joined(bucket: Bucket) -> None:
    assert Bucket.open(bucket.url, bucket.id[:8]).id == bucket.id
    with pytest.raises(ArchipelError, match="not deadbeefdead"):
        Bucket.open(bucket.url, "deadbeef" * 8)
    with pytest.raises(ArchipelError, match="is no run id"):
        Bucket.open(bucket.url, "latest")


def test_a_damaged_shard_is_refused_naming_the_key_and_a_damaged_copy_is_fetched_anew(
    tmp_path: Path, bucket: Bucket
) -> None:
    path = bucket_file(bucket, "shards/0/train.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArchipelError, match=r"job 0 failed here: shards/0/train\.safetensors .* is damaged"):
        work(bucket, tmp_path / "work", only=("0",))
    assert bucket.state("0").released, "what failed here is given back"
    path.write_bytes(whole)
    copy = tmp_path / "work" / "shards" / "0" / "train.safetensors"
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(whole[: len(whole) // 2])
    assert work(bucket, tmp_path / "work", only=("0",)) == ["0"]
    assert copy.read_bytes() == whole


class Stopping:
    """Training that is asked to stop after so many checkpoints."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.flag: StopFlag | None = None
        real, left = worker._train, after

        def train(run: Run, name: str, **settings: Any) -> None:
            nonlocal left
            before = settings["on_checkpoint"]

            def on_checkpoint(path: Path) -> None:
                nonlocal left
                before(path)
                left -= 1
                if left == 0 and self.flag is not None:
                    self.flag.cancel("the test says so")

            real(run, name, **settings | {"on_checkpoint": on_checkpoint})

        monkeypatch.setattr(worker, "_train", train)


def stop_midway(
    monkeypatch: pytest.MonkeyPatch, bucket: Bucket, place: Path, *, name: str = "0", after: int = 3
) -> None:
    with monkeypatch.context() as patch, StopFlag() as stop:
        stopping = Stopping(patch, after)
        stopping.flag = stop
        with pytest.raises(Stopped):
            join(bucket, Options(work=place, only=(name,), local=ONE), stop)


def test_another_island_goes_on_from_the_last_checkpoint(
    tmp_path: Path, small_run: Run, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_midway(monkeypatch, bucket, tmp_path / "first")
    state = bucket.state("0")
    assert state.released and checkpoints(state)[0] == (15, 1), (
        "the last checkpoint was sent before the job was given back"
    )
    assert work(bucket, tmp_path / "second", only=("0",)) == ["0"]
    card = result(bucket, "0")
    assert card["resumed"] == 1 and card["island"]["fence"] == 2
    assert card["sha256"] == undisturbed(small_run, tmp_path / "plain", "0")


@pytest.mark.parametrize("how", ["bit", "short", "missing", "manifest", "sealed", "step", "other-model"])
def test_a_damaged_checkpoint_is_named_and_an_older_one_serves(
    how: str,
    tmp_path: Path,
    small_run: Run,
    bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    stop_midway(monkeypatch, bucket, tmp_path / "first")
    newest = bucket_file(bucket, keys.checkpoint("0", 1, 15))
    state, manifest = newest / "state.safetensors", newest / "manifest.json"
    data = state.read_bytes()
    if how == "bit":
        state.write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])
    elif how == "short":
        state.write_bytes(data[:-100])
    elif how == "missing":
        state.unlink()
    elif how == "manifest":
        manifest.write_bytes(manifest.read_bytes()[:-40])
    elif how == "sealed":
        manifest.write_bytes(manifest.read_bytes().replace(b'"seconds"', b'"sekonds"', 1))
    elif how == "step":
        manifest.write_bytes((newest.parent / "00000010" / "manifest.json").read_bytes())
    else:  # right checksums, wrong network
        import numpy as np

        store.write_tensors(state, {"weight/x": np.zeros(3, np.float32)})
        value = store.read_json(manifest)
        value["files"]["state.safetensors"] = {"sha256": store.sha256_file(state), "bytes": state.stat().st_size}
        store.write_sealed(manifest, value)
    assert work(bucket, tmp_path / "second", only=("0",)) == ["0"]
    said = capsys.readouterr().err
    assert "checkpoint 15 of attempt 1 is passed over" in said
    assert result(bucket, "0")["sha256"] == undisturbed(small_run, tmp_path / "plain", "0")


def test_a_woken_island_that_lost_its_job_says_so_and_commits_nothing(
    tmp_path: Path, small_run: Run, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its training ends after another claimed the job: the check before the commit finds out."""
    real = worker._train

    def train(run: Run, name: str, **settings: Any) -> None:
        real(run, name, **settings)
        if bucket.state(name).fence == 1:
            assert claim(bucket.objects, bucket.state(name), "successor") is not None

    monkeypatch.setattr(worker, "_train", train)
    with StopFlag() as stop:
        stop.limit(60)
        assert join(bucket, Options(work=tmp_path / "work", only=("0",), local=ONE), stop) == ["0"]
    assert "job 0, fence 1: it was claimed again (fence 2); this attempt commits nothing" in capsys.readouterr().err
    state = bucket.state("0")
    assert state.committed["fence"] == 3, "the successor never moved: after a lease the job was taken back"
    assert result(bucket, "0")["sha256"] == undisturbed(small_run, tmp_path / "plain", "0")


def test_a_job_that_fails_here_is_given_back_and_the_others_are_done(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = worker._train

    def train(run: Run, name: str, **settings: Any) -> None:
        if name == "1":
            raise ArchipelError("the loss is not finite at step 3")
        real(run, name, **settings)

    monkeypatch.setattr(worker, "_train", train)
    with pytest.raises(ArchipelError, match="job 1 failed here: the loss is not finite at step 3"):
        work(bucket, tmp_path / "work")
    states = {row["name"]: row["state"] for row in status(bucket)["jobs"]}
    assert states == {"0": "done", "1": "free", "monolith": "done", "router": "done"}


def test_two_islands_share_a_machine_but_not_a_folder(tmp_path: Path, bucket: Bucket) -> None:
    with (
        store.lock(tmp_path / "work" / ".locks" / "island.lock", "it"),
        pytest.raises(ArchipelError, match="island's folder"),
    ):
        work(bucket, tmp_path / "work")
    with StopFlag() as stop:
        join(bucket, Options(only=("0",), local=ONE), stop)
    places = Path(os.environ["ARCHIPEL_CACHE"]) / "islands" / bucket.id[:16]
    with store.lock(places / "0" / ".locks" / "island.lock", "it"), StopFlag() as stop:
        join(bucket, Options(only=("1",), local=ONE), stop)
    assert {path.name for path in places.iterdir()} == {"0", "1"}


def test_the_folder_of_an_island_of_another_run_is_left_alone(
    tmp_path: Path, bucket: Bucket, make_run: Callable[..., Run]
) -> None:
    other = make_run(tmp_path / "other", run={"seed": 5})
    with pytest.raises(ArchipelError, match="island of another run"):
        work(bucket, other.root)


# --- gc --------------------------------------------------------------------------------------------------------------


def test_gc_keeps_claims_results_and_the_furthest_checkpoints(
    tmp_path: Path, small_run: Run, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_midway(monkeypatch, bucket, tmp_path / "first")
    bucket.objects.put("jobs/0/notes.txt", b"a stranger's")
    assert not gc.find(bucket).entries and gc.find(bucket).young == 2
    found = gc.find(bucket, grace=0.0)
    assert {e.key for e in found.entries} == {
        f"{keys.checkpoint('0', 1, 5)}/{f}" for f in ("manifest.json", "state.safetensors")
    }
    assert found.unknown == ["jobs/0/notes.txt"]
    work(bucket, tmp_path / "second", only=("0",))
    with StopFlag() as stop:
        gc.collect(bucket, gc.find(bucket, grace=0.0), stop)
    left = {entry.key for entry in bucket.objects.list("jobs")}
    kept = {f"{keys.result('0', 2)}/{f}" for f in ("card.json", "config.json", "metrics.jsonl", "model.safetensors")}
    assert left == kept | {
        keys.claim("0", 1),
        keys.claim("0", 2),
        keys.committed("0"),
        keys.heartbeat("0", 2),
        "jobs/0/notes.txt",
    }
    assert work(bucket, tmp_path / "third", only=("0", "1")) == ["1"], "nothing that counted is gone"


# --- processes -------------------------------------------------------------------------------------------------------


def start(bucket: Bucket, place: Path, *options: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "archipel.cli",
        "join",
        bucket.url,
        "--work",
        str(place),
        "--threads",
        "1",
        *options,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(what: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.1)


@pytest.mark.slow
def test_sigterm_gives_the_job_back_and_kill_9_leaves_it_to_the_lease(
    tmp_path: Path, make_run: Callable[..., Run]
) -> None:
    run = make_run(tmp_path / "long", expert={"steps": 240, "checkpoint_every": 10})
    with StopFlag() as stop:
        publish(run, (tmp_path / "b").as_uri(), stop)
    bucket = Bucket.open((tmp_path / "b").as_uri())

    first = start(bucket, tmp_path / "one", "--only", "0")
    wait_for(lambda: bool(checkpoints(bucket.state("0"))))
    assert {row["name"]: row["state"] for row in status(bucket)["jobs"]}["0"] == "claimed"
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=60)[0]
    assert first.returncode == 130 and "interrupted" in said, said
    state = bucket.state("0")
    assert state.released and not state.done
    furthest = checkpoints(state)[0][0]

    second = start(bucket, tmp_path / "two", "--only", "0")
    wait_for(lambda: checkpoints(bucket.state("0"))[0][0] > furthest)
    second.kill()
    second.communicate()
    assert not bucket.state("0").released

    furthest = checkpoints(bucket.state("0"))[0][0]
    third = start(bucket, tmp_path / "three", "--only", "0", "--jobs", "1")
    said = third.communicate(timeout=120)[0]
    assert third.returncode == 0 and "stood still" in said, said
    card = result(bucket, "0")
    assert card["resumed"] == 2 and card["island"]["fence"] == 3 and furthest <= 240
    assert card["sha256"] == undisturbed(run, tmp_path / "plain", "0")


@pytest.mark.slow
def test_a_time_limit_ends_an_island_cleanly_and_wrong_urls_in_a_sentence(tmp_path: Path, bucket: Bucket) -> None:
    done = start(bucket, tmp_path / "one", "--for", "1s")
    said = done.communicate(timeout=120)[0]
    assert done.returncode == 0 and "time limit" in said, said
    assert all(bucket.state(name).released or bucket.state(name).done for name in bucket.jobs)
    command = [sys.executable, "-m", "archipel.cli", "join"]
    for url, words in (
        (str(tmp_path / "nowhere"), "there is no folder"),
        (str(tmp_path), "there is no run in"),
        ("s3://key:secret@bucket/run", "carries credentials"),
        ("ftp://bucket/run", "is no store"),
    ):
        wrong = subprocess.run([*command, url], capture_output=True, text=True, check=False)
        assert wrong.returncode == 2 and words in wrong.stderr and "secret" not in wrong.stderr, wrong.stderr


def test_an_outbox_sends_the_newest_and_never_holds_training_up(tmp_path: Path, bucket: Bucket) -> None:
    from archipel.islands.outbox import Outbox

    gate, sent = threading.Event(), []

    class Slow:
        give_up = staticmethod(lambda: False)

        def put(self, key: str, path: Path) -> None:
            assert gate.wait(30)
            sent.append((key, path.read_bytes()))

    with Outbox(Slow(), tmp_path / "outbox", lambda step: f"c/{step}") as outbox:  # type: ignore[arg-type]
        for step in (1, 2, 3):
            folder = tmp_path / f"{step:08d}"
            folder.mkdir()
            (folder / "state.safetensors").write_bytes(b"state %d" % step)
            (folder / "manifest.json").write_bytes(b"manifest %d" % step)
            outbox.add(folder)
            shutil.rmtree(folder)  # the trainer keeps the newest two: what waits is not taken away with it
            time.sleep(0.05 if step == 1 else 0)
        gate.set()
        assert outbox.finish()
    steps = [key for key, _ in sent if key.endswith("manifest.json")]
    assert steps[-1] == "c/3/manifest.json" and "c/2/manifest.json" not in steps
    assert sent[-2:] == [("c/3/state.safetensors", b"state 3"), ("c/3/manifest.json", b"manifest 3")]
