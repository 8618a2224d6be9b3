"""The whole pipeline on procedural shapes, through the shell, as a newcomer would run it without a network."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from archipel import pipeline, store

pytestmark = pytest.mark.slow

Shell = Callable[..., "subprocess.CompletedProcess[str]"]
Inside = Callable[..., tuple[int, str]]


def test_every_stage_left_its_files(finished: Path, archipel: Shell) -> None:
    status = json.loads(archipel("status", finished, "--json").stdout)
    assert status["format"] == 1 and status["root"] == str(finished)
    assert status["run"] == store.sha256_file(finished / "run.toml")
    assert [s["name"] for s in status["stages"]] == list(pipeline.STAGES)
    assert [(s["name"], s["state"]) for s in status["stages"] if s["state"] != "done"] == []
    assert [job["name"] for job in status["jobs"]] == ["0", "1", "monolith", "router"]
    for job in status["jobs"]:
        assert job["state"] == "done" and job["step"] == job["steps"] > 0 and job["loss"] > 0
    for name in ("0", "1", "monolith"):
        card = store.read_json(finished / "experts" / name / "card.json")
        assert card["resumed"] == 0
        assert card["sha256"] == store.sha256_file(finished / "experts" / name / "model.safetensors")
        assert all("step" in row for row in store.read_jsonl(finished / "experts" / name / "metrics.jsonl"))
    assert (finished / "router" / "card.json").exists()
    logs = {path.stem for path in (finished / "logs").glob("*.log")}
    assert logs >= {"prepare", "partition", "train-0", "train-router", "route", "generate", "evaluate", "report", "run"}


def test_the_ledger_is_matched_and_adds_up(finished: Path) -> None:
    ledger = store.read_json(finished / "ledger.json")
    assert set(ledger["experts"]) == {"0", "1"}
    total = sum(ledger["experts"].values()) + ledger["router"]
    assert ledger["ratio"] == pytest.approx(total / ledger["monolith"])
    assert abs(ledger["ratio"] - 1) <= 0.01
    assert ledger["matched"] is True


def test_scores_have_protocols_and_intervals(finished: Path) -> None:
    rows = store.read_json(finished / "scores" / "test.json")
    arms = {row["arm"] for row in rows}
    assert {"top1", "top2", "full", "threshold", "ancestral", "oracle", "monolith", "real"} <= arms
    for row in rows:
        assert set(row) == {"arm", "metric", "value", "low", "high", "n", "groups", "protocol"}
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


def test_same_seed_same_bytes(finished: Path, tmp_path: Path, archipel: Shell, inside: Inside) -> None:
    def words(name: str, seed: int) -> list[object]:
        return [
            "generate", finished, "a red ball bounces", "--strategy", "top1", "--steps", 2, "--seed", seed,
            "-o", tmp_path / name,
        ]  # fmt: skip

    for name in ("1.mp4", "2.mp4"):  # processes of their own, as a user's would be
        done = archipel(*words(name, 1))
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{tmp_path / name}\n"
    assert inside(*words("3.mp4", 2))[0] == 0
    first, second, third = ((tmp_path / f"{number}.mp4").read_bytes() for number in (1, 2, 3))
    assert first == second and first != third


def test_samples_are_not_noise(finished: Path) -> None:
    """Even a tiny monolith must have left white noise behind: neighbouring pixels agree."""
    clips = store.map_tensors(finished / "samples" / "test" / "monolith.safetensors")["clips"].astype(np.float32)
    assert clips.ndim == 5 and clips.shape[-1] == 3 and clips.shape[0] == 8
    left, right = clips[:, :, :, :-1].ravel(), clips[:, :, :, 1:].ravel()
    assert np.corrcoef(left, right)[0, 1] > 0.3


def test_a_moved_run_goes_on_from_another_folder_and_through_a_link(
    copy: Path, tmp_path: Path, archipel: Shell, inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in a run says where it lies. A second `run` does nothing again; what is missing is made."""
    cards = {path: path.stat().st_mtime_ns for path in copy.rglob("card.json")}
    (copy / "scores" / "test.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to("../copy")
    again = archipel("run", "link", cwd=tmp_path / "elsewhere")
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("card.json")} == cards
    assert (copy / "scores" / "test.json").exists()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert inside("verify", "../copy")[0] == 0


def test_no_file_of_a_run_names_its_place(finished: Path) -> None:
    place = finished.parent.name.encode()
    for path in finished.rglob("*"):
        if path.is_file() and path.parent.name != "logs":
            assert place not in path.read_bytes(), path


# --- interrupted, killed, in time ------------------------------------------------------------------------------------


def _wait_for(done: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, f"it ended early: {process.stderr and process.stderr.read()}"
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def _children(root: Path) -> list[str]:
    """Command lines of the processes that train in this run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"-- {root} " in line:
            found.append(line)
    return found


def test_ctrl_c_in_training_costs_no_bit(finished: Path, copy: Path, environment: dict[str, str]) -> None:
    """`archipel run` interrupted: the children save and stop, and the weights come out the same. (Kill -9 of a training
    is tried in tests/faults, kill -9 of the parent in tests/islands, where a process does not cost seconds of imports.)
    """
    for made in ("experts", "router", "samples", "scores", "report"):
        shutil.rmtree(copy / made)
    (copy / "ledger.json").unlink()
    command = [sys.executable, "-m", "archipel.cli", "run", str(copy), "--threads", "1"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    fifth = copy / "experts" / "monolith" / "checkpoints" / "00000005" / "manifest.json"
    _wait_for(fifth.exists, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "everything is kept" in said and "Traceback" not in said, said
    assert _children(copy) == []
    run = pipeline.open_run(copy)
    for name in ("monolith", "0", "1"):
        pipeline.train(run, name, threads=1)
        model = f"experts/{name}/model.safetensors"
        assert (copy / model).read_bytes() == (finished / model).read_bytes(), name
    assert store.read_json(copy / "experts" / "monolith" / "card.json")["resumed"] == 1


def test_a_time_limit_ends_well_and_a_second_process_is_refused(copy: Path, finished: Path, inside: Inside) -> None:
    shutil.rmtree(copy / "experts" / "0")
    with store.lock(copy / ".locks" / "train-0.lock", "a test"):
        code, said = inside("train", copy, "0")
        assert code == 2 and "another process" in said
    code, said = inside("train", copy, "0", "--for", "0.2s", "--threads", 1)
    assert code == 0 and "time limit" in said, said
    progress = store.read_json(copy / "experts" / "0" / "progress.json")
    assert progress["step"] < progress["steps"] and not (copy / "experts" / "0" / "card.json").exists()
    assert inside("train", copy, "0")[0] == 0
    model = "experts/0/model.safetensors"
    assert (copy / model).read_bytes() == (finished / model).read_bytes()
