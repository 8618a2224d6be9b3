"""Islands against poisoned checkpoints, faults of their own, wrong use, and work that an earlier attempt left behind."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archipel import store
from archipel.errors import ArchipelError, Stopped
from archipel.islands import keys, objects, worker
from archipel.islands.bucket import Bucket
from archipel.islands.outbox import Outbox
from archipel.islands.publish import publish
from archipel.progress import StopFlag
from archipel.run import Run

_JOIN = runpy.run_path(str(Path(__file__).with_name("test_join.py")))
work, result, undisturbed, ONE = _JOIN["work"], _JOIN["result"], _JOIN["undisturbed"], _JOIN["ONE"]
stop_midway, bucket_file = _JOIN["stop_midway"], _JOIN["bucket_file"]


def nan(arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
    next(value for name, value in arrays.items() if name.startswith("weight/")).flat[0] = np.nan


def nan_average(arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
    next(value for name, value in arrays.items() if name.startswith("average/")).flat[-1] = np.inf


def enormous(arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
    for name, value in arrays.items():
        if name.startswith("weight/"):
            value[...] = 3e38


def builds(arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
    manifest["builds"] = [{}, 3]


def seconds(arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
    manifest["seconds"] = "many"


def escape(arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
    manifest["builds"][0]["torch"] = "\x1b]0;gone\x07"


def terabytes(arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
    manifest["terabytes"] = True


POISONS = [nan, nan_average, enormous, builds, seconds, escape, terabytes]


def poison(folder: Path, how: Callable[[dict[str, np.ndarray], dict[str, Any]], None]) -> None:
    """A checkpoint with right checksums that no training goes on from."""
    arrays = {name: np.array(value) for name, value in store.map_tensors(folder / "state.safetensors").items()}
    manifest = store.read_json(folder / "manifest.json")
    how(arrays, manifest)
    store.write_tensors(folder / "state.safetensors", arrays)
    size = 10**400 if manifest.pop("terabytes", False) else (folder / "state.safetensors").stat().st_size
    manifest["files"] = {
        "state.safetensors": {"sha256": store.sha256_file(folder / "state.safetensors"), "bytes": size}
    }
    store.write_sealed(folder / "manifest.json", manifest)


@pytest.mark.parametrize("how", POISONS)
def test_a_poisoned_checkpoint_is_passed_over_and_the_job_is_done(
    how: Callable[[dict[str, np.ndarray], dict[str, Any]], None],
    tmp_path: Path,
    small_run: Run,
    bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    stop_midway(monkeypatch, bucket, tmp_path / "first")
    poison(bucket_file(bucket, keys.checkpoint("0", 1, 15)), how)
    capsys.readouterr()
    assert work(bucket, tmp_path / "second", only=("0",)) == ["0"]
    said = capsys.readouterr().err
    assert "checkpoint 15 of attempt 1 is passed over" in said and "\x1b" not in said
    assert result(bucket, "0")["sha256"] == undisturbed(small_run, tmp_path / "plain", "0")


def test_poison_that_an_earlier_process_brought_here_does_not_stay(
    tmp_path: Path, small_run: Run, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every checkpoint is poisoned, and one lies in the island's own folder already: it begins from the start."""
    stop_midway(monkeypatch, bucket, tmp_path / "first")
    for step in (5, 10, 15):
        poison(bucket_file(bucket, keys.checkpoint("0", 1, step)), enormous)
    for path in (tmp_path / "first" / "experts" / "0" / "checkpoints").iterdir():
        poison(path, nan)
    assert work(bucket, tmp_path / "first", only=("0",)) == ["0"]
    assert result(bucket, "0")["sha256"] == undisturbed(small_run, tmp_path / "plain", "0")


def test_a_training_that_diverges_by_itself_is_given_up_after_a_few_tries(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_midway(monkeypatch, bucket, tmp_path / "first")
    tries = 0

    def train(run: Run, name: str, **settings: Any) -> None:
        nonlocal tries
        tries += 1
        raise ArchipelError("training 0: the loss is not finite at step 20")

    monkeypatch.setattr(worker, "_train", train)
    with pytest.raises(ArchipelError, match=r"job 0 failed here: .* not finite at step 20"):
        work(bucket, tmp_path / "second", only=("0",))
    assert tries == 3


def test_a_checkpoint_beyond_the_end_is_none(tmp_path: Path, small_run: Run, bucket: Bucket) -> None:
    bucket.objects.put(keys.claim("0", 1), b'{"nonce": "x"}')
    bucket.objects.put(keys.heartbeat("0", 1), b'{"nonce": "x", "state": "released"}')
    bucket.objects.put(f"{keys.checkpoint('0', 1, 99_999_999)}/manifest.json", b"{}")
    assert work(bucket, tmp_path / "work", only=("0",)) == ["0"]
    read = result(bucket, "0")["island"]["store"]["read"]
    assert not [key for key in read if "checkpoints" in key]


def test_a_result_that_was_finished_before_and_could_not_be_committed_becomes_this_attempts(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(worker, "_send_result", lambda *_: (_ for _ in ()).throw(ArchipelError("the store says no")))
        with pytest.raises(ArchipelError, match="the store says no"):
            work(bucket, tmp_path / "work", only=("0",))
    trained = []
    real = worker._train
    monkeypatch.setattr(
        worker, "_train", lambda run, name, **s: (trained.append(run.done(run.expert(name))), real(run, name, **s))
    )
    assert work(bucket, tmp_path / "work", only=("0",)) == ["0"] and trained == [True]
    assert result(bucket, "0")["island"]["fence"] == bucket.state("0").committed["fence"] == 2, "or `admit` refuses it"


def test_a_fault_of_ours_in_one_job_leaves_the_others_to_be_done(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = worker._train

    def train(run: Run, name: str, **settings: Any) -> None:
        if name == "1":
            raise RuntimeError("out of memory: tried to allocate 20 GiB\nand more lines")
        real(run, name, **settings)

    monkeypatch.setattr(worker, "_train", train)
    with pytest.raises(
        ArchipelError, match=r"job 1 failed here: RuntimeError: out of memory: tried to allocate 20 GiB \("
    ):
        work(bucket, tmp_path / "work", only=("0", "1"))
    assert bucket.state("0").done and bucket.state("1").released


def test_what_a_stranger_heaps_under_one_job_leaves_the_others_to_be_done(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(60):
        bucket.objects.put(f"jobs/0/spam/{number}", b"")
    monkeypatch.setattr(objects, "MOST", 50)
    with pytest.raises(ArchipelError, match=r"job 0 failed here: jobs/0 in .* holds more than 50 objects"):
        work(bucket, tmp_path / "work", only=("0", "1"))
    assert bucket.state("1").done


def test_a_time_limit_does_not_hide_what_failed(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(run: Run, name: str, *, stop: StopFlag, **settings: Any) -> None:
        if name == "0":
            raise ArchipelError("no room")
        raise Stopped("training 1 reached its time limit", interrupted=False)

    monkeypatch.setattr(worker, "_train", train)
    with pytest.raises(ArchipelError, match="job 0 failed here: no room"):
        work(bucket, tmp_path / "work", only=("0", "1"))


def test_the_folder_of_an_attempt_that_was_overtaken_goes(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_midway(monkeypatch, bucket, tmp_path / "first")
    assert (tmp_path / "first" / "experts" / "0" / "checkpoints").is_dir()
    work(bucket, tmp_path / "second", only=("0",))
    assert work(bucket, tmp_path / "first", only=("0",)) == []
    assert not (tmp_path / "first" / "experts" / "0").exists()


def test_an_owners_run_is_no_folder_for_an_island(small_run: Run, bucket: Bucket) -> None:
    (small_run.expert("0")).mkdir(parents=True)
    (small_run.expert("0") / "model.safetensors").write_bytes(b"weeks of work")
    with pytest.raises(ArchipelError, match="give another with --work"):
        work(bucket, small_run.root, only=("0",))
    assert (small_run.expert("0") / "model.safetensors").read_bytes() == b"weeks of work"


def test_a_run_is_not_published_into_itself(small_run: Run) -> None:
    for url in (str(small_run.root), small_run.root.as_uri() + "/"):
        with StopFlag() as stop, pytest.raises(ArchipelError, match="the run's own folder"):
            publish(small_run, url, stop)
    assert not (small_run.root / "published.json").exists()


def test_waiting_for_a_store_that_is_away_ends_when_asked(tmp_path: Path) -> None:
    """Nobody listens there: --for ends the wait that comes before any work, too."""
    program = [sys.executable, "-m", "archipel.cli", "join", "s3://bucket/run", "--for", "1s"]
    env = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    done = subprocess.run(program, capture_output=True, text=True, timeout=100, env=os.environ | env, check=False)
    assert done.returncode in (0, 130) and "stopped while waiting for the store" in done.stderr, done.stderr


def test_a_key_that_cannot_sign_is_told_before_any_work(tmp_path: Path, bucket: Bucket) -> None:
    from archipel import cli_islands

    with pytest.raises(ArchipelError):
        cli_islands._signer(tmp_path / "nowhere.pem")
    assert not bucket.state("0").fence


def test_an_outbox_on_a_full_disk_lets_training_go_on_and_keeps_attempts_apart(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "00000005"
    checkpoint.mkdir()
    for file in ("state.safetensors", "manifest.json"):
        (checkpoint / file).write_bytes(b"one")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with Outbox(bucket.objects, tmp_path / "outbox", lambda step: f"jobs/0/x{step}") as outbox:
        with monkeypatch.context() as patch:
            patch.setattr("os.link", full)
            patch.setattr("shutil.copyfile", full)
            outbox.add(checkpoint)
        with Outbox(bucket.objects, tmp_path / "outbox", lambda step: f"jobs/1/x{step}") as other:
            other.add(checkpoint)
            shutil.rmtree(checkpoint)
            assert other.finish()
        assert outbox.finish() and outbox.sent == [] and other.sent == [5]
    assert bucket.objects.get("jobs/1/x5/state.safetensors") == b"one"
