"""A folder of clips held against a run's test clips, on a small made-up run and a stand-in for the networks."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from archipel import cache, store
from archipel.config import Evaluate, build
from archipel.errors import ArchipelError, MissingStageError
from archipel.evaluation.against import Against, against, rich_table
from archipel.evaluation.protocol import require_same
from archipel.manifest import Clip, write_manifest
from archipel.run import Run

NAMES = ("efficientnet-appearance", "efficientnet-motion", "transnet")
F, SIZE, FACTORS = 2, 8, 6


def films(factors: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Clips (N, F, 8, 8, 3) that are linear in the factors, plus noise."""
    fixed = np.random.Generator(np.random.PCG64(1)).normal(size=(FACTORS, F * SIZE * SIZE * 3)) * 18
    draw = np.random.Generator(np.random.PCG64(seed))
    pixels = factors @ fixed + noise * draw.normal(size=(len(factors), fixed.shape[1])) + 128
    return np.uint8(np.clip(pixels, 0, 255)).reshape(-1, F, SIZE, SIZE, 3)


def extract(names: Sequence[str], clips: np.ndarray, config: Evaluate) -> Mapping[str, Any]:
    flat = clips.reshape(len(clips), -1) / 127.5 - 1
    return {
        name: np.float32(flat @ np.random.Generator(np.random.PCG64(len(name))).normal(size=(flat.shape[1], 12)) / 8)
        for name in names
    }


def embedding(factors: np.ndarray) -> np.ndarray:
    return np.float32(factors @ np.random.Generator(np.random.PCG64(2)).normal(size=(FACTORS, 10)))


def factors_of(numbers: Sequence[int]) -> np.ndarray:
    return np.stack([np.random.Generator(np.random.PCG64([9, n])).normal(size=FACTORS) for n in numbers])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    n, train = 100, 60
    clips = {"count": n, "frames": F, "fps": 8.0, "size": SIZE}
    values = {"clips": clips, "evaluate": {"pca": 6, "frames": 2}, "codec": {"patch": [1, 4, 4], "channels": 16}}
    made = Run.create(tmp_path_factory.mktemp("against") / "run", build(values))
    factors = factors_of(range(n))
    rows = [
        Clip(f"{i:016x}", f"{i:064x}", f"{i}.webp", f"clip {i}", f"group {i}", "train" if i < train else "test", 0.1)
        for i in range(n)
    ]
    write_manifest(made.manifest, rows)
    store.write_card(made.clips, "clips", made.id, [made.manifest.name])
    features = {name: np.asarray(t) for name, t in extract(NAMES, films(factors, 12, 1), made.config.evaluate).items()}
    for kind, tensors in (("features", features), ("text", {"pooled": embedding(factors)})):
        entry = cache.build(
            made.cache,
            kind,
            {},
            n,
            lambda a, b, t=tensors: {k: v[a:b] for k, v in t.items()},
            run_id=made.id,
            label=kind,
        )
        cache.set_index(made.cache, {kind: entry.folder.name})
    return made


def fill(folder: Path, clips: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, clip in enumerate(clips):
        images = [Image.fromarray(frame) for frame in clip]
        images[0].save(
            folder / f"{i:03}.webp", save_all=True, append_images=images[1:], duration=125, loop=0, lossless=True
        )
    return folder


def caption(folder: Path, captions: Sequence[str], **columns: Sequence[str]) -> None:
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "caption", *columns])
        writer.writerows(zip([f"{i:03}.webp" for i in range(len(captions))], captions, *columns.values(), strict=True))


def score(run: Run, folder: Path, **options: Any) -> Against:
    return against(run, folder, extract=extract, embed=_embed, **options)


def _embed(captions: list[str]) -> np.ndarray:
    return embedding(factors_of([int(caption.rpartition(" ")[2]) for caption in captions]))


def value(done: Against, metric: str, real: bool = False) -> dict[str, Any]:
    return next(row for row in done.rows if row["metric"] == metric and (row["arm"] == "real") == real)


@pytest.fixture(scope="module")
def good(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips as the run's, of captions that nobody has seen."""
    return fill(tmp_path_factory.mktemp("clips") / "good clips!", films(factors_of(range(500, 540)), 12, 5))


@pytest.fixture(scope="module")
def scored(run: Run, good: Path) -> Against:
    return score(run, good)


def test_rows_are_those_of_a_table_and_are_written(run: Run, scored: Against) -> None:
    assert scored.path.parent == run.scores("test").parent
    name, _, digest = scored.path.stem.rpartition("-")
    assert name == "against-good-clips" and len(digest) == 8
    assert store.read_json(scored.path) == scored.rows
    for row in scored.rows:
        assert set(row) == {"arm", "metric", "value", "low", "high", "n", "groups", "protocol"}
        assert row["arm"] in ("folder good clips!", "real") and row["protocol"]["split"] == "test"
    metrics = {row["metric"] for row in scored.rows}
    assert {f"{kind}-{name}" for kind in ("KID", "FD", "excess-FD") for name in NAMES} <= metrics
    assert {"motion", "train-over-test", "coverage"} <= metrics
    extra = store.read_json(scored.path.with_name(f"{scored.path.stem}.extra.json"))
    assert extra["folder"]["clips"] == 40 and extra["probe"]["withheld"]


def test_clips_like_the_real_ones_are_near_and_others_are_not(run: Run, scored: Against, tmp_path: Path) -> None:
    bad = score(run, fill(tmp_path / "bad", films(factors_of(range(500, 540)) + 1.5, 12, 5)))
    for name in NAMES:
        near, far = value(scored, f"KID-{name}"), value(bad, f"KID-{name}")
        assert near["low"] <= 0 <= near["high"] and far["low"] > near["high"]
        near, far = value(scored, f"excess-FD-{name}"), value(bad, f"excess-FD-{name}")
        assert near["low"] <= 0 <= near["high"] and far["low"] > near["high"]
        assert value(bad, f"FD-{name}")["value"] > value(bad, f"FD-{name}", real=True)["value"]


def test_floor_and_folder_are_held_at_the_same_number_of_clips(run: Run, tmp_path: Path) -> None:
    for count in (17, 90):  # fewer and more than the 40 test clips
        done = score(run, fill(tmp_path / str(count), films(factors_of(range(600, 600 + count)), 12, 6)))
        mine, floor = value(done, "FD-transnet"), value(done, "FD-transnet", real=True)
        require_same({**mine, "arm": "real"}, floor)
        assert mine["protocol"]["n"] == min(count, 40) // 2
        low, high = (value(done, "excess-FD-transnet")[key] for key in ("low", "high"))
        assert low <= 0.5 and high >= -0.5


def test_it_cannot_be_compared_with_arms_or_other_folders(run: Run, scored: Against, tmp_path: Path) -> None:
    other = score(run, fill(tmp_path / "other", films(factors_of(range(700, 740)), 12, 8)))
    mine, theirs = value(scored, "KID-transnet"), value(other, "KID-transnet")
    with pytest.raises(ArchipelError, match="prompts is 'clips of a folder, "):
        require_same(mine, theirs)
    arm = {**mine, "arm": "top1", "protocol": {**mine["protocol"], "prompts": "ab" * 32}}
    with pytest.raises(ArchipelError, match="prompts"):
        require_same(mine, arm)


def test_captions_bring_the_text_probe(run: Run, tmp_path: Path) -> None:
    numbers = list(range(60, 100))  # the test captions
    folder = fill(tmp_path / "spoken", films(factors_of(numbers), 12, 9))
    caption(folder, [f"clip {n}" for n in numbers])
    done = score(run, folder)
    right = value(done, "text-video-probe")
    assert right["low"] > 0.3 and value(done, "retrieval@5")["value"] > 0.4
    assert "clips of a folder" in right["protocol"]["prompts"]
    mute = score(run, fill(tmp_path / "mute" / "spoken", films(factors_of(numbers), 12, 9)))
    assert done.path != mute.path, "captions are part of what was scored"
    caption(folder, [f"clip {n}" for n in numbers[::-1]])
    assert value(score(run, folder), "text-video-probe")["high"] < right["low"]


def test_generated_clips_of_test_captions_share_the_real_clips_content_group(run: Run, tmp_path: Path) -> None:
    numbers = list(range(60, 100))
    folder = fill(tmp_path / "twins", films(factors_of(numbers), 0, 9))
    without = value(score(run, folder), "nearest-test")["value"]
    caption(folder, [f"clip {n}" for n in numbers])
    assert value(score(run, folder), "nearest-test")["value"] > 1.5 * without  # the twin is passed over


def test_groups_of_the_table_are_the_units_of_chance(run: Run, tmp_path: Path) -> None:
    folder = fill(tmp_path / "grouped", films(factors_of(range(500, 530)), 12, 5))
    caption(folder, [f"clip {n}" for n in range(500, 530)], group=[f"g{n // 3}" for n in range(30)])
    assert value(score(run, folder), "KID-transnet")["groups"] == 10


def test_sidecars_are_captions_and_one_missing_withholds_the_probe(run: Run, tmp_path: Path) -> None:
    folder = fill(tmp_path / "sidecars", films(factors_of(range(500, 520)), 12, 5))
    for i in range(20):
        (folder / f"{i:03}.txt").write_text(f"clip {500 + i}")
    assert value(score(run, folder), "text-video-probe")["n"] == 20
    (folder / "007.txt").unlink()
    done = score(run, folder)
    assert value(done, "motion")["n"] == 20 and not any(row["metric"] == "text-video-probe" for row in done.rows)
    assert any("1 of 20 clips have no caption" in note for note in done.notes)


def test_clips_that_the_table_leaves_out_or_that_are_torn_are_told(run: Run, tmp_path: Path) -> None:
    folder = fill(tmp_path / "partly", films(factors_of(range(500, 520)), 12, 5))
    (folder / "003.webp").write_bytes(b"RIFF\xff\xff\xff\xffWEBP")
    caption(folder, [f"clip {n}" for n in range(500, 518)])
    done = score(run, folder)
    said = " / ".join(done.notes)
    assert "2 clips of partly are not in its table" in said and "003.webp (truncated" in said
    assert value(done, "motion")["n"] == 17
    with pytest.raises(ArchipelError, match="1 of 18 clips of partly"):
        score(run, folder, max_rejected=0.0)


def test_the_same_folder_gives_the_same_file(run: Run, scored: Against, good: Path) -> None:
    before = scored.path.read_bytes()
    assert score(run, good).path == scored.path and scored.path.read_bytes() == before


def test_a_run_without_clips_and_a_folder_without_clips_are_refused(run: Run, good: Path, tmp_path: Path) -> None:
    fresh = Run.create(tmp_path / "fresh", run.config)
    with pytest.raises(MissingStageError, match="archipel prepare"):
        score(fresh, good)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArchipelError, match=r"FOLDER_OF_CLIPS.*holds no clips"):
        score(run, tmp_path / "empty")
    with pytest.raises(ArchipelError, match="gives 1 clip"):
        score(run, fill(tmp_path / "one", films(factors_of([1]), 1, 1)))


def test_the_table_shows_the_floor_beside_the_folder(scored: Against) -> None:
    table = rich_table(scored, 80)
    assert [column.header for column in table.columns] == ["metric", "folder good clips!", "real (floor)"]
    assert table.row_count == len({row["metric"] for row in scored.rows})
    assert "too few clips to conclude" in str(table.caption)
