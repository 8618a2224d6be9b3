"""A job as people meet it: the card, locks, --for, thread counts, what was touched, and what cannot be written."""

from __future__ import annotations

import json
import logging
import os
import platform
import resource
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from archipel import store
from archipel.backbones.registry import load_denoiser
from archipel.errors import ArchipelError, LockedError, MissingStageError, Stopped
from archipel.progress import StopFlag
from archipel.run import MONOLITH, Run
from archipel.training import checkpoint, heldout, isolation
from archipel.training.stage import plan, train


class After(StopFlag):
    """Stops after so many looks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def __bool__(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def card_of(run: Run, name: str) -> dict:
    card = store.read_card(run.expert(name))
    assert card is not None
    return card


def test_the_card_says_what_was_done_and_is_true(small_run: Run) -> None:
    train(small_run, "1", threads=1)
    card, folder = card_of(small_run, "1"), small_run.expert("1")
    assert small_run.done(folder) and store.check_card(folder) == []
    assert card["kind"] == "expert" and card["cluster"] == 1 and card["name"] == "1"
    assert card["sha256"] == store.sha256_file(folder / "model.safetensors")
    assert (card["steps"], card["samples"], card["resumed"], card["threads"]) == (24, 96, 0, 1)
    assert card["flops"] == 3 * card["forward_flops"] * 96 and card["epochs"] == 8.0
    model = load_denoiser(folder)
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    last = checkpoint.latest(folder / "checkpoints", small_run.id)
    assert last is not None
    saved = store.map_tensors(folder / "model.safetensors")
    assert all((saved[name] == last.arrays[f"average/network.{name}"]).all() for name in saved)


def test_the_card_lists_its_own_shard_and_no_other_and_names_no_machine(small_run: Run, tmp_path: Path) -> None:
    train(small_run, "0", threads=1)
    card = card_of(small_run, "0")
    touched = card["touched"]
    assert touched["read"] == [
        "run.toml",
        "shards/0/card.json",
        "shards/0/train.safetensors",
        "shards/0/validation.safetensors",
    ]
    assert {name.split("/")[0] for name in touched["wrote"]} == {".locks", "experts"}
    assert "experts/0/checkpoints/*/state.safetensors" in touched["wrote"]
    assert touched["connected"] == [] and "native code" in touched["evidence"]
    text = json.dumps(card)
    assert str(tmp_path) not in text and platform.node() not in text


def test_what_an_earlier_process_touched_stays_in_the_card(small_run: Run) -> None:
    with pytest.raises(Stopped):
        train(small_run, "0", threads=1, stop=After(7))
    path = small_run.expert("0") / "checkpoints" / "00000007" / "manifest.json"
    manifest = store.read_json(path)
    manifest["touched"]["connected"] = ["192.0.2.1:443"]
    store.write_sealed(path, manifest)
    train(small_run, "0", threads=1)
    card = card_of(small_run, "0")
    assert card["touched"]["connected"] == ["192.0.2.1:443"] and card["resumed"] == 1 and card["bitwise"]


def test_the_watch_sees_reads_writes_and_connections(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.txt").write_text("a")
    (tmp_path / "outside.txt").write_text("b")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    with server, isolation.watch(tmp_path / "link") as touched:
        (tmp_path / "run" / "a.txt").read_text()
        (tmp_path / "outside.txt").read_text()
        store.write_json(tmp_path / "link" / "deep" / "b.json", 1)
        os.close(os.open(tmp_path / "run" / "c", os.O_CREAT | os.O_WRONLY))
        socket.create_connection(("127.0.0.1", port)).close()
    (tmp_path / "run" / "late.txt").write_text("not seen")
    seen = touched.as_dict()
    assert seen["read"] == ["a.txt"] and seen["wrote"] == ["c", "deep/b.json"]
    assert seen["connected"] == [f"127.0.0.1:{port}"]


def test_a_finished_job_is_left_alone(small_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    train(small_run, "0", threads=1)
    before = (small_run.expert("0") / "card.json").stat().st_mtime_ns
    train(small_run, "0", threads=1)
    assert "expert 0 is already trained" in capsys.readouterr().err
    assert (small_run.expert("0") / "card.json").stat().st_mtime_ns == before


def test_lost_weights_come_back_from_the_last_checkpoint(small_run: Run) -> None:
    train(small_run, "0", threads=1)
    path = small_run.expert("0") / "model.safetensors"
    before = path.read_bytes()
    path.unlink()
    train(small_run, "0", threads=1)
    assert path.read_bytes() == before and store.check_card(path.parent) == []


def test_a_second_process_is_refused(small_run: Run) -> None:
    with (
        store.lock(small_run.root / ".locks" / "train-0.lock", "a test"),
        pytest.raises(LockedError, match="expert 0"),
    ):
        train(small_run, "0")
    train(small_run, "1", threads=1)


def test_a_wrong_name_and_a_missing_shard_are_named(small_run: Run) -> None:
    with pytest.raises(ArchipelError, match="'7' is not a job of this run: it has 0, 1, monolith, router"):
        train(small_run, "7")
    shutil.rmtree(small_run.shard("1"))
    with pytest.raises(MissingStageError, match="archipel partition"):
        train(small_run, "1")


def test_a_time_limit_stops_cleanly_and_the_next_call_continues(tmp_path: Path, make_run) -> None:
    run = make_run(tmp_path / "run", expert={"steps": 2000, "checkpoint_every": 500, "validate_every": 500})
    with pytest.raises(Stopped) as caught:
        train(run, "0", seconds=0.5, threads=1)
    assert not caught.value.interrupted and not run.done(run.expert("0"))
    found = checkpoint.latest(run.expert("0") / "checkpoints", run.id)
    assert found is not None and 0 < found.step < 2000
    with StopFlag() as stop, pytest.raises(Stopped):
        train(run, "0", seconds=0.5, threads=1, stop=stop)
    later = checkpoint.latest(run.expert("0") / "checkpoints", run.id)
    assert later is not None and later.step > found.step and later.manifest["resumed"] == 1
    assert later.manifest["seconds"] > found.manifest["seconds"]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_resuming_uses_the_recorded_threads_and_says_where_the_build_differs(
    small_run: Run, two_threads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("0", "1"):
        with pytest.raises(Stopped):
            train(small_run, name, threads=1, stop=After(6))
    train(small_run, "0")
    assert card_of(small_run, "0")["threads"] == 1 and card_of(small_run, "0")["bitwise"]
    assert "another build" not in capsys.readouterr().err
    path = small_run.expert("1") / "checkpoints" / "00000006" / "manifest.json"
    manifest = store.read_json(path)
    manifest["builds"][-1] |= {"torch": "1.0", "threads": 3}
    store.write_sealed(path, manifest)
    train(small_run, "1", threads=1)
    said = capsys.readouterr().err
    assert "torch 1.0, now " in said and "threads 3, now 1" in said and "not agree bit for bit" in said
    card = card_of(small_run, "1")
    assert [build["threads"] for build in card["builds"]] == [3, 1] and not card["bitwise"]
    assert torch.get_num_threads() == 2


def test_a_damaged_newest_checkpoint_costs_steps_but_no_bits(
    small_run: Run, tmp_path: Path, make_run, caplog: pytest.LogCaptureFixture
) -> None:
    twin = make_run(tmp_path / "twin")
    train(twin, "0", threads=1)
    with pytest.raises(Stopped):
        train(small_run, "0", threads=1, stop=After(17))
    path = small_run.expert("0") / "checkpoints" / "00000017" / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.INFO, "archipel"):
        train(small_run, "0", threads=1)
    assert "00000017 is passed over" in caplog.text and "continues at step 15" in caplog.text
    assert card_of(small_run, "0")["sha256"] == card_of(twin, "0")["sha256"]


def test_a_disk_that_fills_up_loses_nothing(small_run: Run, tmp_path: Path, make_run) -> None:
    twin = make_run(tmp_path / "twin")
    train(twin, "0", threads=1)
    with pytest.raises(Stopped):
        train(small_run, "0", threads=1, stop=After(10))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a checkpoint has more than a megabyte
    try:
        with pytest.raises(ArchipelError, match=r"step 15: .*cannot be written .*free space"):
            train(small_run, "0", threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = sorted(path.name for path in (small_run.expert("0") / "checkpoints").iterdir())
    assert kept == ["00000005", "00000010"]
    assert not list(small_run.root.rglob("*.tmp*"))
    train(small_run, "0", threads=1)
    assert card_of(small_run, "0")["sha256"] == card_of(twin, "0")["sha256"]


def test_a_folder_that_is_in_the_way_is_named(small_run: Run) -> None:
    (small_run.root / "experts").write_text("a file")
    with pytest.raises(ArchipelError, match="experts"):
        train(small_run, "0", threads=1)


def test_a_read_only_run_is_refused_in_a_sentence(make_run) -> None:
    root = Path(tempfile.mkdtemp())
    try:
        run = make_run(root / "run")
        for path in (root, *root.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        child = os.fork()
        if child == 0:  # as nobody, since root may write anywhere
            status = 3
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                train(run, "0", threads=1)
            except ArchipelError as error:
                status = 0 if "make it writable" in str(error) else 4
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        for path in (root, *root.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(root)


def test_a_changed_run_toml_is_noticed(small_run: Run) -> None:
    path = small_run.root / "run.toml"
    path.write_text(path.read_text().replace("seed = 0", "seed = 1"))
    with pytest.raises(ArchipelError, match=r"run\.toml changed"):
        train(small_run, "0", threads=1)
    with pytest.raises(Stopped):
        train(Run.open(small_run.root), "0", threads=1, stop=After(3))
    path.write_text(path.read_text().replace("seed = 1", "seed = 2"))
    with pytest.raises(ArchipelError, match=r"another run\.toml"):
        train(Run.open(small_run.root), "0", threads=1)


def test_a_shard_of_another_shape_is_refused(tmp_path: Path, make_run) -> None:
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other", codec={"channels": 7})
    shutil.rmtree(one.shard("0"))
    shutil.copytree(other.shard("0"), one.shard("0"))
    with pytest.raises(ArchipelError, match=r"latents \(7, 2, 2, 2\)"):
        train(one, "0", threads=1)


def test_weights_that_no_gradient_reaches_are_kept_in_checkpoints(tmp_path: Path, make_run) -> None:
    """Without single blocks nothing reads the last double block's text stream."""
    made = [make_run(tmp_path / name, expert={"double_blocks": 1, "single_blocks": 0, "steps": 6}) for name in "ab"]
    train(made[0], "0", threads=1)
    with pytest.raises(Stopped):
        train(made[1], "0", threads=1, stop=After(4))
    train(made[1], "0", threads=1)
    cards = [store.read_card(run.expert("0")) for run in made]
    assert cards[0] is not None and cards[1] is not None and cards[1]["resumed"] == 1
    assert cards[0]["sha256"] == cards[1]["sha256"]


def test_hooks_see_every_checkpoint_and_put_their_facts_into_the_card(small_run: Run) -> None:
    seen: list[str] = []

    def on_checkpoint(path: Path) -> None:
        assert (path / "manifest.json").is_file() and path.parent == small_run.expert("0") / "checkpoints"
        seen.append(path.name)

    with pytest.raises(Stopped):
        train(small_run, "0", threads=1, stop=After(7), on_checkpoint=on_checkpoint)
    assert seen == ["00000005", "00000007"]
    train(small_run, "0", threads=1, on_checkpoint=on_checkpoint, facts=lambda: {"checkpoints": len(seen)})
    assert seen[2:] == ["00000010", "00000015", "00000020", "00000024"]
    assert card_of(small_run, "0")["island"] == {"checkpoints": 6}
    train(small_run, "1", threads=1)
    assert "island" not in card_of(small_run, "1")


def test_a_flag_cancelled_from_another_thread_saves_and_tells_the_reason(small_run: Run) -> None:
    flag = StopFlag()

    def on_checkpoint(path: Path) -> None:
        other = threading.Thread(target=flag.cancel, args=("another island took over",))
        other.start()
        other.join()
        flag.cancel("a later reason")

    with pytest.raises(Stopped, match=r"training 0 .*another island took over") as caught:
        train(small_run, "0", threads=1, stop=flag, on_checkpoint=on_checkpoint)
    assert not caught.value.interrupted and flag
    found = checkpoint.latest(small_run.expert("0") / "checkpoints", small_run.id)
    assert found is not None and found.step == 5


def test_the_average_that_validated_best_is_kept_where_it_is_asked_for(tmp_path: Path, make_run) -> None:
    over = {
        "lr": 0.1,
        "cooldown": 0.0,
        "validate_every": 4,
        "checkpoint_every": 12,
    }  # too fast: the end is not the best
    last, best = (make_run(tmp_path / keep, expert={**over, "keep": keep}) for keep in ("last", "best"))
    assert [plan(run, MONOLITH).settings.keep for run in (last, best)] == ["last", "best"]
    for run in (last, best):
        train(run, "0", threads=1)
    kept = card_of(best, "0")
    assert card_of(last, "0")["best"] is None and kept["best"]["step"] < kept["steps"]
    losses = [
        heldout.measure(run.config, run.expert("0"), run.shard("0") / "validation.safetensors").loss
        for run in (last, best)
    ]
    assert losses[1] == pytest.approx(kept["best"]["loss"], rel=1e-5) and losses[1] < losses[0]
    assert losses[0] == pytest.approx(kept["validation"]["ema"]["loss"], rel=1e-5)  # the same training otherwise
