"""Preparation in pieces that are computed elsewhere: the same bytes as here, from nothing but what the pieces are given."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archipel import config, store
from archipel.data import stage
from archipel.errors import ArchipelError, Stopped
from archipel.prepare import prepare
from archipel.progress import StopFlag
from archipel.run import Run
from archipel.spread import Arrays, Make, over_ranges, pack_json, unpack_json

SMALL: dict[str, Any] = {
    "clips": {"source": "shapes", "count": 24, "frames": 4, "size": 16, "phases": 2, "min_motion": 0.002},
    "codec": {"patch": [2, 8, 8], "channels": 12},
    "partition": {"k": 2, "fine": 4},
    "evaluate": {"frames": 2, "image_size": 32},
}


class Elsewhere:
    """Another machine: it has the files that were asked for, under another path, and arrays that went over a wire."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, 0

    def __call__(
        self, make: Make, given: Iterable[Arrays], root: Path, needs: Sequence[str], *, device: str = "cpu"
    ) -> Generator[Arrays, None, None]:
        there = self.folder / make.__name__
        for name in needs:
            source, target = root / name, there / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        for number, piece in enumerate(given):
            wire = self.folder / f"{make.__name__}-{number}.safetensors"
            store.write_tensors(wire, piece)
            self.made += 1
            made = make(there, {name: np.array(array) for name, array in store.map_tensors(wire).items()})
            store.write_tensors(wire, made)
            yield {name: np.array(array) for name, array in store.map_tensors(wire).items()}


def new_run(folder: Path, over: dict[str, Any] | None = None) -> Run:
    return Run.create(folder, config.build(config.merge(SMALL, over or {})))


def contents(run: Run) -> dict[str, bytes]:
    """Everything but logs and locks."""
    files = (path for path in run.root.rglob("*") if path.is_file() and path.suffix not in (".log", ".lock"))
    return {str(path.relative_to(run.root)): path.read_bytes() for path in files}


def test_a_run_prepared_elsewhere_has_the_bytes_of_one_prepared_here(tmp_path: Path) -> None:
    here, there = new_run(tmp_path / "here"), new_run(tmp_path / "there")
    prepare(here)
    elsewhere = Elsewhere(tmp_path / "elsewhere")
    prepare(there, spread=elsewhere)
    assert contents(here) == contents(there)
    assert elsewhere.made == 1 + 1 + 1 + 2  # shards of pixels, latents, text and features
    prepare(there, spread=elsewhere)
    assert elsewhere.made == 5  # what is there is not made again


def test_what_was_begun_here_is_finished_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_PER_SHARD", 8)
    here, there = new_run(tmp_path / "here"), new_run(tmp_path / "there")
    stage.ingest(here, StopFlag())

    class AfterOne(StopFlag):
        def __bool__(self) -> bool:
            return len(list(there.cache.glob("pixels-*/shard-*"))) == 1

    with pytest.raises(Stopped):
        stage.ingest(there, AfterOne())
    elsewhere = Elsewhere(tmp_path / "elsewhere")
    stage.ingest(there, StopFlag(), elsewhere)
    assert elsewhere.made == 2 and contents(here) == contents(there)


def test_clips_that_cannot_be_used_are_told_as_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder_of_clips: Callable[[Path], Path]
) -> None:
    monkeypatch.setattr(stage, "_PER_SHARD", 2)
    clips = {"source": "folder", "path": str(folder_of_clips(tmp_path / "clips")), "max_rejected": 0.9, "phases": 1}
    here, there = (new_run(tmp_path / name, {"clips": clips}) for name in ("here", "there"))
    stage.ingest(here, StopFlag())
    stage.ingest(there, StopFlag(), Elsewhere(tmp_path / "elsewhere"))
    assert (here.clips / "rejected.csv").read_text().count("not a clip") == 1
    assert (here.clips / "rejected.csv").read_text().count("static") == 1
    assert contents(here) == contents(there)


@pytest.fixture
def folder_of_clips() -> Callable[[Path], Path]:
    """Four moving clips, one that stands still and one that is none."""
    from PIL import Image

    def make(folder: Path) -> Path:
        folder.mkdir()
        for number in range(5):
            shift = 0 if number == 2 else 4
            levels = np.random.Generator(np.random.PCG64(number)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            frames = [Image.fromarray(np.roll(levels, shift * step, axis=1)) for step in range(6)]
            frames[0].save(
                folder / f"{number}.webp", save_all=True, append_images=frames[1:], duration=125, lossless=True
            )
        (folder / "5.webp").write_bytes(b"no picture")
        for number in range(6):
            (folder / f"{number}.txt").write_text(f"clip {number}")
        return folder

    return make


def test_ranges_go_out_in_order_and_only_as_they_are_asked_for() -> None:
    asked: list[tuple[int, int]] = []

    def give(begin: int, end: int) -> Arrays:
        asked.append((begin, end))
        return {"numbers": np.arange(begin, end)}

    def here(
        make: Make, given: Iterable[Arrays], root: Path, needs: Sequence[str], *, device: str = "cpu"
    ) -> Generator[Arrays, None, None]:
        yield from (make(root, piece) for piece in given)

    made = over_ranges(here, lambda _, given: {"twice": 2 * given["numbers"]}, give, [(0, 2), (2, 5)], Path(), [])
    assert next(made)["twice"].tolist() == [0, 2] and asked == [(0, 2)]
    assert next(made)["twice"].tolist() == [4, 6, 8]
    assert unpack_json(pack_json({"ä": [1, None]})) == {"ä": [1, None]}


def test_too_many_that_cannot_be_used_are_refused_as_here(
    tmp_path: Path, folder_of_clips: Callable[[Path], Path]
) -> None:
    clips = {"source": "folder", "path": str(folder_of_clips(tmp_path / "clips")), "max_rejected": 0.1, "phases": 1}
    with pytest.raises(ArchipelError, match="2 of 6 clips cannot be used"):
        stage.ingest(new_run(tmp_path / "run", {"clips": clips}), StopFlag(), Elsewhere(tmp_path / "elsewhere"))
