"""Generating from a bucket: only what was admitted, verified and cached once, late experts, hostile and damaged files."""

from __future__ import annotations

import json
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

from archipel import cli, store
from archipel.ensemble.pipeline import Archipelago
from archipel.errors import ArchipelError, DamagedError, MissingStageError
from archipel.islands import keys, remote
from archipel.islands.objects import StoreError
from archipel.islands.pull import pull
from archipel.progress import StopFlag
from archipel.run import MONOLITH, ROUTER, Run

_HARBOURS = runpy.run_path(str(Path(__file__).parent / "harbours.py"))
harbours, harbour, letters, train_by_hand = (
    _HARBOURS[name] for name in ("harbours", "harbour", "letters", "train_by_hand")
)
PROMPTS = ["a red ball", "two green cats", "rain"]
ALL = ["0", "1", "2", MONOLITH, ROUTER]


def opened(where: Any, letters: Any, **more: Any) -> Archipelago:
    model = Archipelago.load(where, **more)
    model.parts.text = letters
    return model


def cache_of(run: Run) -> Path:
    return Path(os.environ["ARCHIPEL_CACHE"]) / "runs" / run.id


def test_a_bucket_generates_what_the_run_s_folder_generates(harbour: Any, letters: Any) -> None:
    harbour.commit(*ALL)
    harbour.admit(*ALL)
    for strategy in ("top1", "full", "ancestral", "monolith", "expert-2"):
        here = opened(harbour.run.root, letters).generate(PROMPTS, strategy=strategy, seeds=4)
        there = opened(harbour.url, letters).generate(PROMPTS, strategy=strategy, seeds=4)
        assert np.array_equal(here.clips, there.clips) and there.warnings == []
    plain = opened(harbour.root, letters).generate(PROMPTS, strategy="top1", seeds=4)  # a path instead of a URL
    assert np.array_equal(plain.clips, opened(harbour.url, letters).generate(PROMPTS, strategy="top1", seeds=4).clips)


def test_a_bucket_generates_within_a_bound_on_memory(harbour: Any, letters: Any) -> None:
    harbour.commit(*ALL)
    harbour.admit(*ALL)
    sizes = {name: (harbour.run.expert(name) / "model.safetensors").stat().st_size for name in ALL}
    most = sizes[ROUTER] + max(sizes[name] for name in "012") + 5000
    whole = opened(harbour.url, letters).generate(PROMPTS, strategy="full", seeds=4)
    model = opened(harbour.url, letters, memory=most)
    assert np.array_equal(model.generate(PROMPTS, strategy="full", seeds=4).clips, whole.clips)
    assert model.parts.shelf.used <= most and sum(model.parts.shelf.fetched.values()) > 4


def test_the_same_from_s3(harbour: Any, letters: Any, s3_url: str, tmp_path: Path) -> None:
    harbour.commit("0", "1", "2", ROUTER)
    harbour.admit("0", "2", ROUTER)
    harbour.copy_to(s3_url)
    here, there = (
        opened(where, letters).generate(PROMPTS, strategy="full", seeds=4) for where in (harbour.url, s3_url)
    )
    assert np.array_equal(here.clips, there.clips)
    assert f"`archipel admit {s3_url} 1`" in there.warnings[0]
    with StopFlag() as stop:
        done = pull(s3_url, tmp_path / "new", stop)
    assert done.brought == ["0", "2", ROUTER] and done.waiting == ["1"]
    assert np.array_equal(
        opened(tmp_path / "new", letters).generate(PROMPTS, strategy="full", seeds=4).clips, here.clips
    )


def test_only_what_a_strategy_needs_is_fetched_and_only_once(harbour: Any, letters: Any) -> None:
    harbour.commit(*ALL)
    harbour.admit(*ALL)
    model = opened(harbour.url, letters)
    objects = model.parts.source._objects  # type: ignore[attr-defined]
    model.generate("rain", strategy="monolith")
    sha256 = store.sha256_file(harbour.run.expert(MONOLITH) / "card.json")
    assert {key for key in objects.reads if key.endswith("model.safetensors")} == {
        keys.admitted(sha256, "model.safetensors"),
        "codec/model.safetensors",
    }
    assert not any(key.startswith(("jobs/", "shards/")) for key in objects.reads)
    again = opened(harbour.url, letters)
    again.generate("rain", strategy="monolith")
    assert not any("safetensors" in key for key in again.parts.source._objects.reads)  # type: ignore[attr-defined]
    folder = cache_of(harbour.run) / "admitted" / sha256
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "config.json", "model.safetensors"]
    assert (cache_of(harbour.run) / "run.toml").read_bytes() == (harbour.run.root / "run.toml").read_bytes()


def test_what_is_committed_and_not_admitted_is_never_loaded_and_named(
    harbour: Any, letters: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    harbour.commit("0", "1", "2", ROUTER)
    harbour.admit("0", "1", ROUTER)
    model = opened(harbour.url, letters)
    made = model.generate(PROMPTS, strategy="full")
    assert made.weights is not None and (made.weights[..., 2] == 0).all()
    (warning,) = made.warnings
    assert f"expert 2 is committed but not admitted: `archipel admit {harbour.url} 2`" in warning
    with pytest.raises(MissingStageError, match="expert 2 is committed but not admitted"):
        model.generate("rain", strategy="expert-2")
    with pytest.raises(MissingStageError, match="the monolith is not trained yet"):
        model.generate("rain", strategy="monolith")
    source = model.parts.source
    assert not any(key.startswith("jobs/2/0") for key in source._objects.reads)  # type: ignore[attr-defined]


def test_a_refused_expert_is_named_with_its_rule(harbour: Any, letters: Any) -> None:
    harbour.commit("0", "1")
    harbour.admit("0")
    refusal = {"format": 1, "name": "1", "fence": 1, "rule": "loss", "detail": "no better than silence"}
    harbour.objects.put(keys.refused("1", 1), json.dumps(refusal).encode())
    made = opened(harbour.url, letters).generate("rain", strategy="top1")
    assert any("expert 1 was refused (rule loss)" in warning for warning in made.warnings)
    assert any("no router" in warning and "expert 0" in warning for warning in made.warnings)


def test_late_experts_of_a_bucket_arrive_without_restart(
    harbour: Any, letters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = opened(harbour.run.root, letters)
    harbour.commit("0", "1", "2", ROUTER)
    harbour.admit("0", ROUTER)
    model = opened(harbour.url, letters)
    assert model.refresh() == []
    assert "missing: 1, 2" in model.generate(PROMPTS, strategy="full").warnings[0]
    harbour.admit("2")
    assert "missing: 1, 2" in model.generate(PROMPTS, strategy="full").warnings[0], "it looked a moment ago"
    assert model.refresh() == ["2"]
    assert "missing: 1" in model.generate(PROMPTS, strategy="full").warnings[0]
    harbour.admit("1")
    monkeypatch.setattr(remote, "LOOK_EVERY", 0.0)
    made = model.generate(PROMPTS, strategy="full")  # looks by itself
    assert made.warnings == [] and np.array_equal(made.clips, whole.generate(PROMPTS, strategy="full").clips)


def test_another_admission_replaces_and_a_withdrawn_one_is_gone(
    harbour: Any, letters: Any, train_by_hand: Callable[[Run, str, int], None]
) -> None:
    harbour.commit("0")
    harbour.admit("0")
    model = opened(harbour.url, letters)
    before = model.generate("rain", strategy="expert-0").clips
    train_by_hand(harbour.run, "0", 55)
    harbour.admit("0")
    assert model.refresh() == ["0"]
    after = model.generate("rain", strategy="expert-0").clips
    assert not np.array_equal(before, after)
    assert len(list((cache_of(harbour.run) / "admitted").iterdir())) == 2, "what is there is never replaced"
    (harbour.root / "admitted" / "0.json").unlink()
    assert model.refresh() == []
    with pytest.raises(MissingStageError, match="committed but not admitted"):
        model.generate("rain", strategy="expert-0")


def test_a_router_without_calibration_answers_as_it_is_and_says_so(harbour: Any, letters: Any) -> None:
    harbour.commit("0", "1", "2", ROUTER)
    harbour.admit("0", "1", "2")
    harbour.admit(ROUTER, calibrated=False)
    model = opened(harbour.url, letters)
    made = model.generate(PROMPTS, strategy="full")
    assert any("without a calibration" in warning for warning in made.warnings)
    harbour.admit(ROUTER)  # the same weights, calibrated since
    assert model.refresh() == [ROUTER]
    calibrated = model.generate(PROMPTS, strategy="full")
    assert calibrated.warnings == [] and calibrated.weights is not None and made.weights is not None
    assert np.abs(calibrated.weights - made.weights).max() > 1e-4


def test_the_run_id_is_held(harbour: Any) -> None:
    assert Archipelago.load(harbour.url, run_id=harbour.run.id[:16]).parts.run.id == harbour.run.id
    with pytest.raises(ArchipelError, match="holds run"):
        Archipelago.load(harbour.url, run_id="0" * 16)
    toml = harbour.root / "run.toml"
    toml.write_bytes(toml.read_bytes() + b"\n# changed\n")
    with pytest.raises(ArchipelError):
        Archipelago.load(harbour.url)


# --- damaged and hostile -----------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("file", ["card.json", "config.json", "model.safetensors", "calibration.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove", "link"])
def test_damaged_files_of_the_bucket_are_refused_by_name(harbour: Any, letters: Any, file: str, how: str) -> None:
    name = ROUTER if file == "calibration.json" else "0"
    harbour.commit("0", "1", ROUTER)
    harbour.admit("0", "1", ROUTER)
    path = harbour.root / keys.admitted(store.sha256_file(harbour.run.expert(name) / "card.json"), file)
    if how == "flip":
        flip(path)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif how == "remove":
        path.unlink()
    else:
        copy = path.with_name("elsewhere")
        path.rename(copy)
        path.symlink_to(copy)
    with pytest.raises(DamagedError, match=r"admitted/.*" + file.replace(".", r"\.")):
        opened(harbour.url, letters).generate("rain", strategy="full")
    assert len(opened(harbour.url, letters).generate("rain", strategy="expert-1").clips) == 1, "others go on"


def test_swapped_cards_and_impossible_pointers_are_refused(harbour: Any, letters: Any) -> None:
    harbour.commit("0", "1")
    harbour.admit("0", "1")
    pointer = harbour.root / "admitted" / "0.json"
    whole = json.loads(pointer.read_text())
    other = json.loads((harbour.root / "admitted" / "1.json").read_text())
    for wrong in (
        {**whole, "sha256": other["sha256"]},  # another job's weights under this name
        {**whole, "sha256": "../../jobs/0/00000001/result"},
        {**whole, "name": "1"},
        {**whole, "fence": 10**9},
        {**whole, "fence": True},
        {**whole, "files": [1]},
        [],
    ):
        pointer.write_text(json.dumps(wrong))
        with pytest.raises(DamagedError, match="admi"):
            opened(harbour.url, letters).generate("rain", strategy="expert-0")
    pointer.write_bytes(b"\x80\x04pickle")
    with pytest.raises(DamagedError, match=r"admitted/0\.json"):
        opened(harbour.url, letters).generate("rain", strategy="full")


def rewritten(harbour: Any, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """An admission whose card was made up: its sha256 agrees, its content does not."""
    card = json.loads((harbour.run.expert(name) / "card.json").read_text())
    card.pop("check", None)
    change(card)
    data = json.dumps(card).encode()
    sha256 = store.sha256_bytes(data)
    for file in ("model.safetensors", "config.json"):
        harbour.objects.put(keys.admitted(sha256, file), harbour.run.expert(name) / file)
    harbour.objects.put(keys.admitted(sha256, "card.json"), data)
    pointer = {"format": 1, "name": name, "sha256": sha256, "fence": 1, "files": {}}
    harbour.objects.put(keys.admitted(name), json.dumps(pointer).encode())


def test_a_card_that_promises_too_much_is_refused_before_anything_is_fetched(harbour: Any, letters: Any) -> None:
    def huge(card: dict[str, Any]) -> None:
        card["files"]["model.safetensors"]["bytes"] = 10**15

    rewritten(harbour, "0", huge)
    model = opened(harbour.url, letters)
    with pytest.raises(ArchipelError, match=r"model\.safetensors of expert 0 .* has 10{15} bytes"):
        model.generate("rain", strategy="expert-0")
    assert not any(key.endswith("model.safetensors") and "admitted" in key for key in model.parts.source._objects.reads)  # type: ignore[attr-defined]

    def more_than_the_disk(card: dict[str, Any]) -> None:
        card["files"]["model.safetensors"]["bytes"] = 60 << 30

    if shutil.disk_usage(harbour.root).free < 60 << 30:
        rewritten(harbour, "0", more_than_the_disk)
        with pytest.raises(ArchipelError, match="ARCHIPEL_CACHE"):
            opened(harbour.url, letters).generate("rain", strategy="expert-0")


def test_cards_of_another_run_or_without_files_are_refused(harbour: Any, letters: Any) -> None:
    def another_run(card: dict[str, Any]) -> None:
        card["run"] = "0" * 64

    def no_weights(card: dict[str, Any]) -> None:
        del card["files"]["model.safetensors"]

    def outside(card: dict[str, Any]) -> None:
        card["files"]["../../evil"] = {"sha256": "x", "bytes": 1}

    for change in (another_run, no_weights, outside):
        rewritten(harbour, "0", change)
        with pytest.raises(DamagedError, match="expert 0"):
            opened(harbour.url, letters).generate("rain", strategy="expert-0")


def test_a_damaged_cache_is_mended(harbour: Any, letters: Any) -> None:
    harbour.commit("0")
    harbour.admit("0")
    wanted = opened(harbour.url, letters).generate("rain", strategy="expert-0").clips
    cache = cache_of(harbour.run)
    (folder,) = (cache / "admitted").iterdir()
    for damage in (
        lambda: flip(folder / "model.safetensors"),
        lambda: flip(folder / "card.json"),
        lambda: (folder / "config.json").unlink(),
        lambda: flip(cache / "codec" / "model.safetensors"),
        lambda: shutil.rmtree(cache),
    ):
        damage()
        assert np.array_equal(opened(harbour.url, letters).generate("rain", strategy="expert-0").clips, wanted)


def test_an_interrupted_fetch_goes_on_where_it_was(harbour: Any, letters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from archipel.islands import objects as objects_module

    harbour.commit("0")
    harbour.admit("0")
    monkeypatch.setattr(objects_module, "_CHUNK", 20_000)
    real, pieces = objects_module.Objects._range, []

    def broken(self: Any, key: str, begin: int, end: int) -> bytes:
        if key.endswith("model.safetensors") and key.startswith("admitted/"):
            pieces.append(begin)
            if len(pieces) == 4:
                raise KeyboardInterrupt
        return real(self, key, begin, end)

    monkeypatch.setattr(objects_module.Objects, "_range", broken)
    with pytest.raises(KeyboardInterrupt):
        opened(harbour.url, letters).generate("rain", strategy="expert-0")
    assert not list(cache_of(harbour.run).glob("admitted/*/card.json"))
    opened(harbour.url, letters).generate("rain", strategy="expert-0")
    assert pieces == sorted(pieces) and pieces.count(pieces[3]) == 2 and pieces.count(0) == 1


FETCH = """
import sys
from archipel.islands import remote
source = remote.open_source(sys.argv[1])
version = source.look()["0"]
print("ready", flush=True)
sys.stdin.readline()
source.folder("0", version)
print(sum("safetensors" in key for key in source._objects.reads))
"""


def test_processes_share_the_cache_and_fetch_once(harbour: Any) -> None:
    harbour.commit("0")
    harbour.admit("0")
    command = [sys.executable, "-c", FETCH, harbour.url]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(3)
    ]
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    assert sorted(worker.communicate(timeout=120)[0].strip() for worker in workers) == ["0", "0", "1"]


def test_a_store_that_goes_away_stops_nobody_who_has_what_they_need(
    harbour: Any, letters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    harbour.commit("0")
    harbour.admit("0")
    model = opened(harbour.url, letters)
    wanted = model.generate("rain", strategy="expert-0").clips
    monkeypatch.setattr(remote, "LOOK_EVERY", 0.0)

    def away(self: Any, prefix: str) -> Any:
        raise StoreError("the store is away")

    monkeypatch.setattr(remote.Objects, "list", away)
    assert np.array_equal(model.generate("rain", strategy="expert-0").clips, wanted)
    with pytest.raises(StoreError):
        model.refresh()
    with pytest.raises(StoreError):
        opened(harbour.url, letters)


# --- the shell -----------------------------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    text = "".join(capsys.readouterr())
    assert "Traceback" not in text and "internal error" not in text, text
    return int(ended.value.code or 0), text


@pytest.mark.parametrize(
    ("verb", "instead"),
    [
        (["prepare"], "archipel publish RUN {url}"),
        (["partition"], "archipel publish RUN {url}"),
        (["train", "2"], "archipel join {url} --only 2"),
        (["run"], "archipel join {url}"),
        (["route"], "archipel join {url} --only router"),
        (["evaluate"], "archipel pull {url} RUN"),
        (["report"], "archipel pull {url} RUN"),
        (["verify"], "archipel pull {url} RUN"),
        (["init"], "archipel publish RUN {url}"),
        (["generate", "--arms"], "archipel pull {url} RUN"),
    ],
)
def test_verbs_that_need_a_folder_say_what_is_meant_for_a_bucket(
    harbour: Any, capsys: pytest.CaptureFixture[str], verb: list[str], instead: str
) -> None:
    for url in ("s3://bucket/prefix", str(harbour.root)):
        code, text = said(capsys, verb[0], url, *verb[1:])
        assert code == 2 and instead.format(url=url) in text and "no run at" not in text
        assert verb[0] in text or "--arms" in text


def test_generate_from_a_url_in_the_shell(
    harbour: Any, letters: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from archipel.encoders import text

    monkeypatch.setattr(text, "open_text", lambda config, folder: letters)
    harbour.commit("0", "1", ROUTER)
    harbour.admit("0", ROUTER)
    here = ["-o", tmp_path / "clip.webp", "--scale", "1", "--run-id", harbour.run.id[:12]]
    code, output = said(capsys, "generate", harbour.url, "a red ball", *here)
    assert code == 0 and (tmp_path / "clip.webp").is_file()
    assert "2 of 3 experts missing: 1, 2" in output and f"archipel admit {harbour.url} 1" in output
    code, output = said(capsys, "generate", "--run", harbour.url, "a red ball", "-o", tmp_path / "b.webp")
    assert code == 0 and (tmp_path / "b.webp").is_file()
    code, output = said(capsys, "generate", harbour.url, "a red ball", "--run-id", "0" * 12)
    assert code == 2 and "holds run" in output
    code, output = said(capsys, "generate", harbour.url)
    assert code == 2 and "a prompt is missing" in output
    code, output = said(capsys, "generate", "s3://key:secret@bucket/prefix", "a red ball")
    assert code == 2 and "credentials" in output and "secret@" not in output
