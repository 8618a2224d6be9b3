"""Several processes, micro-batches and bfloat16 train the same thing as one process at once; what each writes and says."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from archipel import store
from archipel.backbones.registry import load_denoiser
from archipel.errors import ArchipelError, Stopped
from archipel.progress import StopFlag
from archipel.run import Run
from archipel.training import checkpoint, launch, machine, precision
from archipel.training.batches import open_shard, shares, training_batch
from archipel.training.local import Local
from archipel.training.ranks import LAUNCHED, LostError, _leaving_errors, own_device
from archipel.training.stage import plan, train

TOLERANCE = 1e-5
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """``ask(run, name, size, **request)`` trains by ``size`` processes (see teams.py) and says how they ended."""
    script = Path(__file__).with_name("teams.py")
    process = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdin is not None and process.stdout is not None
    to, back = process.stdin, process.stdout

    def asking(run: Run, name: str, size: int, **request: Any) -> dict[str, Any]:
        to.write(json.dumps({"run": str(run.root), "name": name, "size": size, **request}) + "\n")
        to.flush()
        found: dict[str, Any] = json.loads(back.readline())
        return found

    yield asking
    to.close()
    assert process.wait(30) == 0


@pytest.fixture
def pair(tmp_path: Path, make_run: Callable[..., Run]) -> tuple[Run, Run]:
    """The same run twice; 5 clips a step, which two processes cannot share evenly."""
    over = {"expert": {"batch": 5, "steps": 12}, "router": {"batch": 5, "steps": 8, "validate_every": 2}}
    one, other = (make_run(tmp_path / name, **over) for name in ("one", "other"))
    return one, other


def card_of(run: Run, name: str = "0") -> dict[str, Any]:
    card = store.read_card(run.expert(name))
    assert card is not None and store.check_card(run.expert(name)) == []
    return card


def same_training(one: Run, other: Run, name: str = "0") -> None:
    """Losses, norms, validation and weights agree, and the same files are there."""
    lines = [store.read_jsonl(run.expert(name) / "metrics.jsonl") for run in (one, other)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for a, b in zip(*lines, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=TOLERANCE), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a.keys() == b.keys() and a["lr"] == b["lr"]
        if "validation" in a:
            assert a["validation"] == pytest.approx(b["validation"], abs=TOLERANCE)
            assert a["validation_ema"] == pytest.approx(b["validation_ema"], abs=TOLERANCE)
    weights = [store.map_tensors(run.expert(name) / "model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert max(float(np.abs(weights[0][key] - weights[1][key]).max()) for key in weights[0]) < 1e-4
    names = [sorted(str(path.relative_to(run.root)) for path in run.expert(name).rglob("*")) for run in (one, other)]
    assert names[0] == names[1]
    states = [checkpoint.latest(run.expert(name) / "checkpoints", run.id) for run in (one, other)]
    assert states[0] is not None and states[1] is not None
    shapes = [{key: (a.shape, a.dtype) for key, a in state.arrays.items()} for state in states if state]
    assert shapes[0] == shapes[1]


# --- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size,ranks,micro", [(16, 1, 0), (16, 4, 2), (5, 2, 0), (5, 2, 2), (7, 3, 1), (2, 5, 0), (1, 3, 1)]
)
def test_every_clip_is_computed_once_by_one_process(size: int, ranks: int, micro: int) -> None:
    all_parts = [shares(size, ranks, rank, micro) for rank in range(ranks)]
    assert len({len(parts) for parts in all_parts}) == 1  # every process takes part in every exchange
    clips = [clip for parts in all_parts for part, weight in parts if weight for clip in range(size)[part]]
    assert sorted(clips) == list(range(size))
    for part, weight in (one for parts in all_parts for one in parts):
        count = len(range(size)[part])
        assert count >= 1 and weight in (0.0, 1.0) and (not micro or count <= micro)


def test_a_part_of_a_batch_is_that_part_of_the_whole(small_run: Run) -> None:
    clips = open_shard(small_run.shard("0")).train
    made: dict[str, Any] = {"shift": 1.5, "text_dropout": 0.5}
    whole = training_batch(clips, 3, 9, 30, **made)  # more clips than the shard has: some are seen twice
    for part in (slice(0, 7), slice(7, 8), slice(20, 30)):
        found = training_batch(clips, 3, 9, 30, part=part, **made)
        for key in ("x0", "noise", "t", "cluster", "x_t"):
            assert torch.equal(getattr(found, key), getattr(whole, key)[part]), key
        assert torch.equal(found.cond.tokens, whole.cond.tokens[part])
        assert torch.equal(found.cond.mask, whole.cond.mask[part])


# --- one process -----------------------------------------------------------------------------------------------------


def test_micro_batches_make_up_the_same_step(pair: tuple[Run, Run]) -> None:
    one, other = pair
    train(one, "0", threads=1)
    train(other, "0", local=Local(threads=1, micro_batch=2))
    same_training(one, other)
    assert card_of(one)["build"]["micro_batch"] == 5 and card_of(other)["build"]["micro_batch"] == 2
    assert card_of(other)["samples"] == card_of(one)["samples"] == 60
    train(one, "1", threads=1)
    train(other, "1", local=Local(threads=1, micro_batch=5))  # as many as there are: nothing is split
    assert card_of(one, "1")["sha256"] == card_of(other, "1")["sha256"]
    assert card_of(one, "1")["builds"] == card_of(other, "1")["builds"]


def test_a_checkpoint_from_before_there_was_a_choice_continues_without_a_word(
    pair: tuple[Run, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = pair
    train(one, "0", threads=1)
    flag = StopFlag()
    with pytest.raises(Stopped):
        train(other, "0", threads=1, stop=flag, on_checkpoint=lambda _: flag.cancel("enough"))
    path = other.expert("0") / "checkpoints" / "00000005" / "manifest.json"
    manifest = store.read_json(path)
    for key in ("precision", "micro_batch", "world_size"):
        del manifest["builds"][-1][key]
    store.write_sealed(path, manifest)
    train(other, "0")
    assert "another build" not in capsys.readouterr().err
    assert card_of(other)["sha256"] == card_of(one)["sha256"] and card_of(other)["bitwise"]


def test_bfloat16_is_warned_about_on_a_cpu_kept_in_the_card_and_learns_the_same(
    pair: tuple[Run, Run], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = pair
    train(one, "0", threads=1)
    assert "bfloat16" not in capsys.readouterr().err
    with caplog.at_level(logging.WARNING, "archipel"):
        train(other, "0", local=Local(threads=1, precision="bfloat16"))
    assert "bfloat16 on a CPU" in capsys.readouterr().err and "bfloat16 on a CPU" in caplog.text
    cards = [card_of(run) for run in pair]
    assert cards[1]["build"]["precision"] == "bfloat16" and cards[0]["build"]["precision"] == "float32"
    losses = [card["validation"]["raw"]["loss"] for card in cards]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
    weights = store.map_tensors(other.expert("0") / "model.safetensors")
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}
    assert any((array.view(np.uint32) & 0xFFFF).any() for array in weights.values())  # they use all their bits


def test_under_bfloat16_times_are_embedded_in_float32(small_run: Run) -> None:
    train(small_run, "0", threads=1)
    model = load_denoiser(small_run.expert("0"))
    clips = open_shard(small_run.shard("0")).train
    batch = training_batch(clips, 0, 0, 4, shift=1.0, text_dropout=0.0)
    seen: dict[str, Any] = {}
    embedder, block = model.network.time_text_embed, model.blocks()[0]
    embedder.register_forward_hook(lambda _, given, out: seen.update(t=given[0], out=out))
    block.register_forward_hook(lambda *call: seen.update(block=call[-1][1]), with_kwargs=False)
    plain = model.predict(batch.x_t, batch.t, batch.cond)
    embedded = seen["out"]
    precision.keep_float32(model.ends())
    precision.norms_in_input_dtype(model)
    cast = precision.autocast("bfloat16", "cpu")
    with cast():
        half = model.predict(batch.x_t, batch.t, batch.cond)
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")
    assert torch.equal(seen["t"], batch.t * 1000) and torch.equal(seen["out"], embedded)
    assert half.dtype == torch.float32 and not torch.equal(half, plain)
    assert (half - plain).abs().max() < 0.05 * plain.abs().max()
    with precision.autocast("float32", "cpu")():
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    "wrong,named",
    [({"precision": "float16"}, "float16"), ({"micro_batch": -1}, "micro_batch -1"), ({"gpus": 0}, "gpus 0")],
)
def test_settings_that_cannot_be_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ArchipelError, match=named):
        Local(**wrong)


def test_every_process_gets_its_own_gpu_or_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("cuda", 2) == "cuda:1" and chosen == [1]
    assert own_device("cpu", 2) == "cpu" and own_device("cuda:1", 1) == "cuda:1"
    with pytest.raises(ArchipelError, match="cuda:0 is one GPU"):
        own_device("cuda:0", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ArchipelError, match="1 GPUs for 2 processes") as caught:
        own_device("cuda", 2)
    assert caught.value.told  # the first process says it


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_what_one_trains_and_one_of_them_writes(pair: tuple[Run, Run], ask: Ask) -> None:
    one, other = pair
    train(one, "0", threads=1)
    found = ask(other, "0", 2)
    assert found["codes"] == [0, 0] and found["said"][1] == ""
    same_training(one, other)
    cards = card_of(one), card_of(other)
    assert cards[1]["build"] == cards[0]["build"] | {"world_size": 2, "micro_batch": 3}
    names = {"sha256", "seconds", "validation", "build", "builds", "files", "check"}
    assert {k: v for k, v in cards[0].items() if k not in names} == {
        k: v for k, v in cards[1].items() if k not in names
    }
    config = [(run.expert("0") / "config.json").read_bytes() for run in pair]
    assert config[0] == config[1]
    again = ask(other, "0", 2)
    assert again["codes"] == [0, 0] and "already trained" in again["said"][0] and again["said"][1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "ltx", "hunyuan", "cogvideox"])
def test_two_processes_train_every_backbone_as_one_does(
    name: str, tmp_path: Path, make_run: Callable[..., Run], ask: Ask
) -> None:
    part = {"backbone": name, "batch": 5, "steps": 4, "validate_every": 2}
    runs = [make_run(tmp_path / kind, expert=part) for kind in ("one", "two", "half")]
    assert ask(runs[0], "0", 1)["codes"] == [0]
    assert ask(runs[1], "0", 2)["codes"] == [0, 0]
    same_training(*runs[:2])
    assert ask(runs[2], "0", 2, local={"precision": "bfloat16"})["codes"] == [0, 0]
    losses = [card_of(run)["validation"]["raw"]["loss"] for run in runs]
    assert losses[2] == pytest.approx(losses[0], rel=0.02) and losses[2] != losses[0]


@pytest.mark.slow
def test_checkpointing_and_an_average_on_the_host_change_no_bit_of_two_processes(
    pair: tuple[Run, Run], ask: Ask
) -> None:
    switched = {"checkpointing": True, "ema": "host"}
    for run, local in zip(pair, ({}, switched), strict=True):
        assert ask(run, "0", 2, local=local)["codes"] == [0, 0]
    cards = [card_of(run) for run in pair]
    assert cards[0]["sha256"] == cards[1]["sha256"] and cards[0]["validation"] == cards[1]["validation"]
    assert cards[1]["build"] == cards[0]["build"] | switched


@pytest.mark.slow
def test_moments_of_8_bits_are_dealt_out_saved_and_resumed(
    tmp_path: Path, make_run: Callable[..., Run], ask: Ask
) -> None:
    wide = {"width": 64, "rope_axes": [8, 12, 12], "steps": 24, "checkpoint_every": 24, "validate_every": 12}
    one, other, alone = (make_run(tmp_path / name, expert=wide) for name in ("one", "other", "alone"))
    local = {"optimizer": "adamw8bit"}
    assert ask(one, "0", 2, local=local)["codes"] == [0, 0]
    assert ask(other, "0", 2, local=local, stop_at={"0": 3})["codes"] == [130, 130]
    assert ask(other, "0", 2, local=local)["codes"] == [0, 0]
    assert card_of(other)["bitwise"] and card_of(other)["resumed"] == 1
    assert card_of(one)["sha256"] == card_of(other)["sha256"]
    train(alone, "0", threads=1)
    losses = [card_of(run)["validation"]["ema"]["loss"] for run in (one, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.slow
def test_the_best_weights_are_kept_by_more_processes_than_clips_divide_into(pair: tuple[Run, Run], ask: Ask) -> None:
    one, other = pair
    assert ask(one, "router", 1)["codes"] == [0]
    assert ask(other, "router", 3, local={"micro_batch": 1})["codes"] == [0, 0, 0]
    same_training(one, other, "router")
    best = [card_of(run, "router")["best"] for run in pair]
    assert best[0]["step"] == best[1]["step"] and best[0]["loss"] == pytest.approx(best[1]["loss"], abs=TOLERANCE)
    assert card_of(other, "router")["build"]["micro_batch"] == 1
    last = checkpoint.latest(other.expert("router") / "checkpoints", other.id)
    assert last is not None and any(name.startswith("best/") for name in last.arrays)


@pytest.mark.slow
def test_checkpoints_open_on_either_side_and_a_signal_to_any_process_stops_all(
    tmp_path: Path, make_run: Callable[..., Run], ask: Ask
) -> None:
    over = {"expert": {"batch": 5, "steps": 60, "checkpoint_every": 30, "validate_every": 30}}
    one, other = (make_run(tmp_path / name, **over) for name in ("one", "other"))
    train(one, "0", threads=1)
    train(one, "1", threads=1)
    found = ask(other, "0", 2, stop_at={"1": 4})
    assert found["codes"] == [130, 130] and "interrupted" in found["said"][0] and found["said"][1] == ""
    (kept,) = (other.expert("0") / "checkpoints").iterdir()
    assert 4 <= int(kept.name) < 30
    assert store.read_jsonl(other.expert("0") / "metrics.jsonl")[-1]["step"] == int(kept.name)
    found = ask(other, "0", 1)
    assert found["codes"] == [0] and "world_size 2, now 1" in found["said"][0]
    same = [store.read_jsonl(run.expert("0") / "metrics.jsonl")[-1] for run in (one, other)]
    assert same[0]["loss"] == pytest.approx(same[1]["loss"], abs=TOLERANCE)
    assert not card_of(other)["bitwise"] and card_of(other)["resumed"] == 1
    # ... and the other way round
    flag = StopFlag()
    with pytest.raises(Stopped):
        train(other, "1", threads=1, stop=flag, on_checkpoint=lambda _: flag.cancel("enough"))
    assert ask(other, "1", 2)["codes"] == [0, 0]
    same = [store.read_jsonl(run.expert("1") / "metrics.jsonl")[-1] for run in (one, other)]
    assert same[0]["validation_ema"] == pytest.approx(same[1]["validation_ema"], abs=TOLERANCE)
    assert [build["world_size"] for build in card_of(other, "1")["builds"]] == [1, 2]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_a_sentence(
    tmp_path: Path, make_run: Callable[..., Run], ask: Ask
) -> None:
    run = make_run(tmp_path / "run", expert={"steps": 5000, "checkpoint_every": 3, "validate_every": 5000})
    for name, dead in (("0", 1), ("1", 0)):
        found = ask(run, name, 2, kill_at={dead: 6})
        assert found["codes"][dead] == -9 and found["codes"][1 - dead] == 2, found
        assert f"another of the 2 processes that train expert {name} has ended" in found["said"][1 - dead]
        last = checkpoint.latest(run.expert(name) / "checkpoints", run.id)
        assert last is not None and last.step >= 3
    with store.lock(run.root / ".locks" / "train-0.lock", "a test"):
        found = ask(run, "0", 2)
    assert found["codes"] == [2, 2] and "another process is working on expert 0" in found["said"][0]
    assert found["said"][1] == ""


@pytest.mark.slow
def test_the_launcher_starts_processes_tells_of_checkpoints_and_stops_them(
    tmp_path: Path, make_run: Callable[..., Run]
) -> None:
    run = make_run(tmp_path / "run", expert={"steps": 3000, "checkpoint_every": 4, "validate_every": 3000})
    flag, seen = StopFlag(), []

    def on_checkpoint(path: Path) -> None:
        seen.append(path)
        flag.cancel("a test has seen enough")

    local = Local(device="cpu", threads=1, gpus=2, micro_batch=1)
    with pytest.raises(Stopped, match="a test has seen enough") as caught:
        train(run, "0", local=local, stop=flag, on_checkpoint=on_checkpoint)
    assert not caught.value.interrupted
    assert seen and all(path.parent == run.expert("0") / "checkpoints" for path in seen)
    last = checkpoint.latest(run.expert("0") / "checkpoints", run.id)
    assert last is not None and 4 <= last.step < 3000
    build = last.manifest["builds"][-1]
    assert (build["world_size"], build["micro_batch"], build["device"]) == (2, 1, "cpu")
    assert (store.read_json(run.expert("0") / "progress.json"))["state"] == "stopped"


def test_what_a_dead_process_means_for_all() -> None:
    assert launch._judge("expert 0", 2, {1: -9, 0: 2}) == 2
    assert launch._judge("expert 0", 2, {0: 130, 1: -15}) == 130
    assert launch._judge("expert 0", 2, {0: 2, 1: 1}) == 1
    assert launch._judge("expert 0", 2, {0: -15}) == 130


def test_a_process_is_started_with_this_islands_settings_and_facts_are_put_into_its_card(small_run: Run) -> None:
    local = Local(device="cpu", precision="bfloat16", micro_batch=3, threads=2, gpus=4)
    words = launch.command(small_run, "1", local)
    assert words[:5] == ["train", "--precision", "bfloat16", "--micro-batch", "3"]
    assert words == ["train", *local.words(), "--device", "cpu", "--threads", "2", "--", str(small_run.root), "1"]
    train(small_run, "1", threads=1)
    launch.add_to_card(small_run.expert("1"), {"fence": 3})
    assert card_of(small_run, "1")["island"] == {"fence": 3}
    assert plan(small_run, "1").batch == 4 and machine.build("cpu", 1, world_size=2)["world_size"] == 2


def test_a_processs_own_error_reaches_whoever_launched_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCHED, str(tmp_path))
    told = ArchipelError("the first process says it")
    told.told = True
    for rank, error in enumerate((ArchipelError("no such shard"), told, LostError("gone"), Stopped("enough"))):
        with pytest.raises(type(error)), _leaving_errors(rank):
            raise error
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "no such shard"}
    assert launch._judge("expert 0", 4, {3: -9}) == 2
    assert "process 3 of the 4 that train expert 0 was ended by SIGKILL" in (tmp_path / "of-3").read_text()


# --- adapters --------------------------------------------------------------------------------------------------------


def test_two_processes_train_the_adapter_that_one_trains(
    tmp_path: Path, make_run: Callable[..., Run], ask: Ask
) -> None:
    """Each holds half of the frozen base as well."""
    from archipel.training import bases

    expert = {"batch": 4, "steps": 12, "warm_start": "trunk", "trunk_steps": 4, "lora_rank": 2, "lora_alpha": 6.0}
    one, other = (make_run(tmp_path / name, expert=expert) for name in ("one", "other"))
    for run in (one, other):
        train(run, "trunk", threads=1)
        bases.from_trunk(run)
    train(one, "0", threads=1)
    found = ask(other, "0", 2)
    assert found["codes"] == [0, 0], found
    same_training(one, other)
    assert card_of(one)["parameters"] == card_of(other)["parameters"]
