from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archipel import cache, config, store
from archipel.data import decode, stage
from archipel.data.stage import ingest
from archipel.errors import ArchipelError, LockedError, Stopped
from archipel.manifest import read_manifest
from archipel.progress import StopFlag
from archipel.run import Run


def make_run(root: Path, **clips: Any) -> Run:
    values = {"frames": 4, "fps": 8.0, "size": 16, **clips}
    return Run.create(root, config.build({"clips": values, "codec": {"patch": [2, 4, 4]}, "evaluate": {"frames": 2}}))


def rejected_of(run: Run) -> list[list[str]]:
    with open(run.clips / "rejected.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.fixture
def folder(tmp_path: Path, make_video: Callable[..., bytes], make_loop: Callable[..., bytes]) -> Path:
    """Six good clips and one of everything that is wrong."""
    data = tmp_path / "data"
    data.mkdir()
    video = make_video(24)

    def put(name: str, content: bytes, caption: bytes | None = b"a clip") -> None:
        (data / name).write_bytes(content)
        if caption is not None:
            (data / name).with_suffix(".txt").write_bytes(caption)

    put("a.mp4", video, b"the first")
    put("b.webm", make_video(24, container="webm"))
    for number in range(4):
        put(f"c{number}.webp", make_loop(5 + number))
    put("d-cut.mp4", video[:-200])
    put("e-empty.gif", b"")
    put("f-nocaption.webp", make_loop(9), None)
    put("g-latin.webp", make_loop(10), b"caf\xe9")
    put("h-twin.mp4", video, b"the same bytes")
    put("i-still.png", make_loop(1, kind="png"))
    put("j-short.mp4", make_video(6))
    put("k-text.gif", b"hello there")
    return data


EXPECTED = [
    ["file", "reason"],
    ["d-cut.mp4", "truncated: the file ends before its container does"],
    ["e-empty.gif", "no frames: the file is empty"],
    ["f-nocaption.webp", "no caption: f-nocaption.txt is missing"],
    ["g-latin.webp", "undecodable text: the caption is not UTF-8 (byte 3)"],
    ["h-twin.mp4", "duplicate: the same bytes as a.mp4"],
    ["i-still.png", "static: motion 0.0000 is below 0.001"],
    ["j-short.mp4", "too short: 0.25 s, the window's last frame is at 0.38 s"],
    ["k-text.gif", "not a clip: the bytes are not MP4, MOV, WebM, AVI, GIF, WebP or PNG"],
]


def test_a_folder_is_read_in(
    folder: Path, tmp_path: Path, read_numbers: Callable[[np.ndarray], list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", source="folder", path=str(folder), min_motion=0.001, max_rejected=0.6)
    ingest(run, StopFlag())
    assert rejected_of(run) == EXPECTED
    clips = read_manifest(run.manifest)
    assert [clip.file for clip in clips] == ["a.mp4", "b.webm", "c0.webp", "c1.webp", "c2.webp", "c3.webp"]
    assert clips[0].caption == "the first"
    assert clips[0].sha256 == store.sha256_file(folder / "a.mp4") and clips[0].id == clips[0].sha256[:16]
    assert {clip.split for clip in clips} == {"train", "validation", "test"}
    rows = cache.open_kind(run.cache, "pixels")["clips"]
    assert rows.shape == (6, 4, 16, 16, 3) and rows.dtype == np.uint8
    assert read_numbers(rows[0]) == [0, 3, 6, 9]
    assert read_numbers(rows[2]) == [0, 1, 2, 3]
    for clip, row in zip(clips, rows[:], strict=True):
        assert clip.motion == pytest.approx(decode.motion_of(row), abs=1e-6)
    card = store.read_card(run.clips, "clips")
    assert card is not None and run.done(run.clips)
    assert card["counts"]["used"] == 6 and card["counts"]["candidates"] == 14
    assert card["counts"]["rejected"] == {
        "duplicate": 1, "no caption": 1, "no frames": 1, "not a clip": 1, "static": 1, "too short": 1, "truncated": 1,
        "undecodable text": 1,
    }  # fmt: skip
    assert str(tmp_path) not in json.dumps(card)
    assert store.check_card(run.clips) == []
    assert "6 of 14 used" in capsys.readouterr().err
    assert not (run.clips / "rejected.jsonl").exists()


def test_the_same_source_gives_the_same_manifest(folder: Path, tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / name, source="folder", path=str(folder), min_motion=0.001, max_rejected=0.6)
        for name in ("one", "two")
    ]
    for run in runs:
        ingest(run, StopFlag())
    one, two = (run.clips for run in runs)
    assert read_manifest(one / "manifest.parquet") == read_manifest(two / "manifest.parquet")
    assert (one / "rejected.csv").read_bytes() == (two / "rejected.csv").read_bytes()
    assert store.read_json(runs[0].cache / "index.json") == store.read_json(runs[1].cache / "index.json")


def test_work_that_was_interrupted_continues(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_PER_SHARD", 3)
    decoded: list[str] = []
    real = stage._outcomes
    flag = StopFlag()

    def noting(source: Any, candidates: list[Any], *rest: Any) -> Any:
        decoded.extend(c.item.key for c in candidates)
        yield from real(source, candidates, *rest)
        if len(decoded) == 6:
            flag.signal = 15

    monkeypatch.setattr(stage, "_outcomes", noting)
    settings = {"source": "folder", "path": str(folder), "min_motion": 0.001, "max_rejected": 0.6}
    run = make_run(tmp_path / "run", **settings)
    with pytest.raises(Stopped):
        ingest(run, flag)
    assert not run.done(run.clips) and len(decoded) == 6
    ingest(run, StopFlag())
    assert len(decoded) == len(set(decoded)) == 10  # nothing was decoded twice
    assert rejected_of(run) == EXPECTED
    whole = make_run(tmp_path / "whole", **settings)
    monkeypatch.setattr(stage, "_outcomes", real)
    ingest(whole, StopFlag())
    assert read_manifest(run.manifest) == read_manifest(whole.manifest)
    left, right = (cache.open_kind(r.cache, "pixels")["clips"][:] for r in (run, whole))
    np.testing.assert_array_equal(left, right)


def test_reasons_survive_a_kill_between_a_shard_and_its_reasons(folder: Path, tmp_path: Path) -> None:
    settings = {"source": "folder", "path": str(folder), "min_motion": 0.001, "max_rejected": 0.6}
    run = make_run(tmp_path / "run", **settings)
    ingest(run, StopFlag())
    shutil.rmtree(run.clips)  # the cache is whole, everything else has to be found again
    ingest(run, StopFlag())
    assert rejected_of(run) == EXPECTED


def test_a_finished_stage_is_left_alone_and_a_lost_cache_is_made_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", source="shapes", count=9)
    ingest(run, StopFlag())
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.*")}
    ingest(run, StopFlag())
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.*")}
    manifest = run.manifest.read_bytes()
    shutil.rmtree(run.cache)
    ingest(run, StopFlag())
    assert run.manifest.read_bytes() == manifest
    assert len(cache.open_kind(run.cache, "pixels")["clips"]) == 9


def test_too_many_failures_stop_the_run_and_say_why(folder: Path, tmp_path: Path) -> None:
    for number in range(5):
        (folder / f"x{number}.gif").write_bytes(b"GIF89a" + bytes([number]) * 50)
        (folder / f"x{number}.txt").write_text("x")
    run = make_run(tmp_path / "run", source="folder", path=str(folder), max_rejected=0.5)
    with pytest.raises(
        ArchipelError, match=r"12 of 19 clips cannot be used: truncated 6, .*clips\.max_rejected \(now 0\.5\)"
    ):
        ingest(run, StopFlag())
    assert len(rejected_of(run)) == 13
    assert not run.done(run.clips)


def test_a_source_that_gives_nothing_usable_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    run = make_run(tmp_path / "a", source="folder", path=str(tmp_path / "data"), max_rejected=1.0)
    with pytest.raises(ArchipelError, match="gives no clips"):
        ingest(run, StopFlag())
    (tmp_path / "data" / "x.mp4").write_bytes(b"x")
    with pytest.raises(ArchipelError, match="1 of 1 clips cannot be used: no caption 1"):
        ingest(run, StopFlag())


def test_more_clusters_than_clips_are_refused(tmp_path: Path, make_loop: Callable[..., bytes]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.webp").write_bytes(make_loop(4))
    (data / "a.txt").write_text("only one")
    run = make_run(tmp_path / "run", source="folder", path=str(data))
    with pytest.raises(ArchipelError, match=r"partition\.k = 3 is larger than the number of clips 1"):
        ingest(run, StopFlag())


def test_given_splits_reach_the_manifest_and_conflicts_are_refused(
    tmp_path: Path, make_loop: Callable[..., bytes]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = ["file,caption,group,split"]
    for number in range(6):
        (data / f"{number}.webp").write_bytes(make_loop(4 + number))
        rows.append(f"{number}.webp,clip {number},g{number // 2},{'test' if number < 2 else ''}")
    (data / "clips.csv").write_text("\n".join(rows))
    run = make_run(tmp_path / "run", source="folder", path=str(data))
    ingest(run, StopFlag())
    splits = [clip.split for clip in read_manifest(run.manifest)]
    assert splits[:2] == ["test", "test"] and "test" not in splits[2:] and splits[2] == splits[3]
    (data / "clips.csv").write_text("\n".join(rows).replace("clip 1,g0,test", "clip 1,g0,train"))
    with pytest.raises(ArchipelError, match="group 'g0' is in two splits, test and train"):
        ingest(make_run(tmp_path / "other", source="folder", path=str(data)), StopFlag())


def test_a_count_takes_a_part_that_a_larger_count_contains(tmp_path: Path, make_loop: Callable[..., bytes]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(12):
        (data / f"{number:02d}.gif").write_bytes(make_loop(4 + number, kind="gif"))
        (data / f"{number:02d}.txt").write_text(f"clip {number}")
    found = []
    for count in (4, 8):
        run = make_run(tmp_path / str(count), source="folder", path=str(data), count=count)
        ingest(run, StopFlag())
        found.append([clip.file for clip in read_manifest(run.manifest)])
    assert len(found[0]) == 4 and len(found[1]) == 8 and set(found[0]) < set(found[1])
    assert found[1] == sorted(found[1]) != [f"{number:02d}.gif" for number in range(8)]


def test_two_processes_do_not_read_in_the_same_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", source="shapes", count=4)
    with store.lock(run.clips / ".lock", "it"), pytest.raises(LockedError, match="the clips of"):
        ingest(run, StopFlag())


def test_file_names_that_are_not_text_are_told_apart(tmp_path: Path, make_loop: Callable[..., bytes]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number, name in enumerate([b"caf\xe9.webp", b"caf\xe8.webp", b"plain.webp"]):
        with open(os.fsencode(data) + b"/" + name, "wb") as file:
            file.write(make_loop(4 + number))
        with open(os.fsencode(data) + b"/" + name[:-5] + b".txt", "wb") as file:
            file.write(b"a clip")
    run = make_run(tmp_path / "run", source="folder", path=str(data))
    ingest(run, StopFlag())
    assert [clip.file for clip in read_manifest(run.manifest)] == ["caf\\xe8.webp", "caf\\xe9.webp", "plain.webp"]
