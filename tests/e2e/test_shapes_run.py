"""The whole pipeline on procedural shapes, through the shell, as a newcomer would run it without a network."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from archipel import store

pytestmark = pytest.mark.slow

QUICK = ["--set", "expert.steps=30", "--set", "router.steps=20", "--set", "evaluate.count=8", "--set", "sample.steps=4"]
# Smaller than preset tiny: these tests are about the flow, not the clips.
SMALL = [*QUICK, "--set", "clips.count=48", "--set", "expert.checkpoint_every=5", "--set", "router.checkpoint_every=5"]


def archipel(*arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "archipel.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment())


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run; tests that change it work on a copy."""
    root = tmp_path_factory.mktemp("e2e") / "run"
    made = archipel("init", root, "--source", "shapes", "--preset", "tiny", *SMALL)
    assert made.returncode == 0, made.stderr
    done = archipel("run", root)
    assert done.returncode == 0, done.stderr
    assert "report" in done.stderr
    return root


def copy_of(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    return folder


def test_every_stage_left_its_files(finished: Path) -> None:
    status = json.loads(archipel("status", finished, "--json").stdout)
    assert [(s["name"], s["state"]) for s in status["stages"] if s["state"] != "done"] == []
    assert {job["state"] for job in status["jobs"]} == {"done"}
    for name in ("0", "1", "monolith"):
        card = store.read_json(finished / "experts" / name / "card.json")
        assert card["resumed"] == 0
        assert card["sha256"] == store.sha256_file(finished / "experts" / name / "model.safetensors")
        assert all("step" in row for row in store.read_jsonl(finished / "experts" / name / "metrics.jsonl"))
    assert (finished / "router" / "card.json").exists()


def test_the_ledger_is_matched_and_adds_up(finished: Path) -> None:
    ledger = store.read_json(finished / "ledger.json")
    total = sum(ledger["experts"].values()) + ledger["router"]
    assert ledger["ratio"] == pytest.approx(total / ledger["monolith"])
    assert abs(ledger["ratio"] - 1) <= 0.01
    assert ledger["matched"] is True


def test_scores_have_protocols_and_intervals(finished: Path) -> None:
    rows = store.read_json(finished / "scores" / "test.json")
    arms = {row["arm"] for row in rows}
    assert {"top1", "top2", "full", "threshold", "ancestral", "oracle", "monolith", "real"} <= arms
    for row in rows:
        assert set(row) >= {"arm", "metric", "value", "low", "high", "n", "groups", "protocol"}
        if None not in (row["value"], row["low"], row["high"]):
            assert row["low"] <= row["value"] <= row["high"], row


def test_experts_saw_their_own_shard_and_nothing_else(finished: Path) -> None:
    for name, other in (("0", "shards/1"), ("1", "shards/0")):
        touched = json.dumps(store.read_json(finished / "experts" / name / "card.json")["touched"])
        assert f"shards/{name}/train.safetensors" in touched
        for foreign in (other, "shards/all", "clips/", "cache/", "partition/"):
            assert foreign not in touched
        assert str(finished) not in touched


def test_the_report_is_one_self_contained_page(finished: Path) -> None:
    page = (finished / "report" / "index.html").read_text(encoding="utf-8")
    assert "data:image/webp;base64," in page
    for outside in ('src="http', "src='http", 'href="http', "url(http"):
        assert outside not in page


def test_a_second_run_does_nothing_again(finished: Path) -> None:
    cards = {path: path.stat().st_mtime_ns for path in finished.rglob("card.json")}
    again = archipel("run", finished)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("card.json") if path in cards} == cards


def test_same_seed_same_bytes(finished: Path, tmp_path: Path) -> None:
    def make(name: str, *more: object) -> bytes:
        done = archipel("generate", finished, "a red ball bounces", "--steps", 3, *more, "-o", tmp_path / name)
        assert done.returncode == 0, done.stderr
        return (tmp_path / name).read_bytes()

    first = make("1.mp4", "--strategy", "top1", "--seed", 1)
    assert first == make("2.mp4", "--strategy", "top1", "--seed", 1)
    assert first != make("3.mp4", "--strategy", "top1", "--seed", 2)
    assert make("4.webp", "--strategy", "monolith", "--seed", 1)
    assert make("5.gif", "--strategy", "ancestral", "--seed", 1)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["x" * 10_000], "10000"),
        (["   "], "empty"),
        (["a ball", "--steps", "0"], "steps"),
        (["a ball", "--steps", "-3"], "steps"),
        (["a ball", "--strategy", "top-1"], "top1"),
        (["a ball", "-o", "clip.xyz"], "mp4"),
    ],
)
def test_impossible_wishes_are_refused(finished: Path, tmp_path: Path, words: list[str], named: str) -> None:
    words = [str(tmp_path / word) if word.endswith(".xyz") else word for word in words]
    done = archipel("generate", finished, *words)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr.lower().replace(",", "")
    assert "Traceback" not in done.stderr


def test_verify_names_a_damaged_file(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path / "run")
    assert archipel("verify", run).returncode == 0
    for victim in ("experts/0/model.safetensors", "shards/1/train.safetensors"):
        path = run / victim
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    found = archipel("verify", run)
    assert found.returncode == 2
    assert "experts/0/model.safetensors" in found.stderr and "shards/1/train.safetensors" in found.stderr
    assert archipel("generate", run, "a ball", "--strategy", "full", "-o", tmp_path / "x.mp4").returncode == 2


def test_an_edited_run_toml_is_noticed(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path / "run")
    path = run / "run.toml"
    path.write_text(path.read_text().replace("guidance =", "guidance  ="))
    done = archipel("run", run)
    assert done.returncode == 2 and "changed" in done.stderr


def _wait_for(path: Path, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "it ended early"
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_and_killed_runs_continue_to_the_same_bits(
    finished: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """Stop `archipel run` in the middle of training, by Ctrl-C or kill -9 of the parent: started again, same weights."""
    run = copy_of(finished, tmp_path / "run")
    for made in ("experts", "router", "samples", "scores", "report", "ledger.json"):
        path = run / made
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    command = [sys.executable, "-m", "archipel.cli", "run", str(run)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE)
    _wait_for(run / "experts" / "monolith" / "checkpoints" / "5" / "manifest.json", process)
    process.send_signal(how)
    _, said = process.communicate(timeout=120)
    if how is signal.SIGINT:
        assert process.returncode == 130, said
        assert b"Traceback" not in said
    deadline = time.monotonic() + 60  # the killed parent's children notice, save and stop
    while subprocess.run(["pgrep", "-f", str(run)], capture_output=True, check=False).stdout:
        assert time.monotonic() < deadline, "children outlived their parent"
        time.sleep(0.2)
    for name in ("0", "1", "monolith"):
        done = archipel("train", run, name, "--threads", 1)
        assert done.returncode == 0, done.stderr
        model = Path("experts") / name / "model.safetensors"
        assert (run / model).read_bytes() == (finished / model).read_bytes(), name


def test_a_second_process_on_the_same_expert_is_refused(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path / "run")
    shutil.rmtree(run / "experts" / "0")
    slow = subprocess.Popen([sys.executable, "-m", "archipel.cli", "train", str(run), "0"], env=environment())
    try:
        _wait_for(run / "experts" / "0" / "progress.json", slow)
        second = archipel("train", run, "0")
        assert second.returncode == 2, second.stderr
        assert "another process" in second.stderr
    finally:
        slow.kill()
        slow.wait()


def test_samples_are_not_noise(finished: Path) -> None:
    """Even a tiny monolith must have left white noise behind: neighbouring pixels agree."""
    clips = store.map_tensors(finished / "samples" / "test" / "monolith.safetensors")["clips"].astype(np.float32)
    assert clips.ndim == 5 and clips.shape[-1] == 3 and clips.shape[0] == 8
    left, right = clips[:, :, :, :-1].ravel(), clips[:, :, :, 1:].ravel()
    assert np.corrcoef(left, right)[0, 1] > 0.3
