"""Two folders of clips: read a few at a time, told what could not be used, scored with interval, protocol and floor."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from archipel.errors import ArchipelError, Stopped
from archipel.evaluation import distances, folders
from archipel.evaluation.distances import Moments
from archipel.evaluation.protocol import require_same
from archipel.progress import StopFlag

WIDTH = 5


class Given:
    """Stands in for the judges: fixed projections of pixels. Remembers how many clips it was handed at a time."""

    def __init__(self, names: Sequence[str] = ("net",), least: int = 1, metric: str = "FD-net") -> None:
        self.features, self.least, self.handed = tuple(names), least, []
        facts = {"weights": "w" * 8, "layer": "last", "resize": 8, "frames": 0, "code": 1, "metric": metric}
        self.identity = dict.fromkeys((*names, "a scalar"), facts)

    def require_frames(self, frames: int) -> None:
        if frames < self.least:
            raise ArchipelError(f"net needs {self.least} frames")

    def measure(self, clips: np.ndarray, captions: Sequence[str] = ()) -> Any:
        assert clips.dtype == np.uint8 and len(captions) == len(clips)
        self.handed.append(clips.shape)
        flat = clips.reshape(len(clips), -1) / 255
        draw = np.random.Generator(np.random.PCG64(3)).normal(size=(flat.shape[1], WIDTH)) / 8
        return SimpleNamespace(features={name: np.float32(flat @ draw) for name in self.features}, scalars={})


def film(seed: int, frames: int = 6, light: int = 128) -> list[np.ndarray]:
    draw = np.random.Generator(np.random.PCG64(seed))
    return [np.uint8(np.clip(draw.normal(light, 40, (8, 8, 3)), 0, 255)) for _ in range(frames)]


def save(path: Path, pictures: Sequence[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.fromarray(picture) for picture in pictures]
    options: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    images[0].save(path, save_all=True, append_images=images[1:], duration=125, loop=0, **options)


def video(path: Path, pictures: Sequence[np.ndarray], rate: int = 8) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    target = io.BytesIO()
    format_ = {".mp4": "mp4", ".webm": "webm", ".mkv": "matroska", ".avi": "avi"}[path.suffix]
    with av.open(target, "w", format=format_) as out:
        codec = {"webm": "libvpx", "avi": "mpeg4"}.get(format_, "libx264")
        stream: Any = out.add_stream(codec, rate=rate)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            big = np.kron(picture, np.ones((2, 2, 1), np.uint8))
            for packet in stream.encode(av.VideoFrame.from_ndarray(big, format="rgb24")):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    path.write_bytes(target.getvalue())


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    a, b = tmp_path / "a", tmp_path / "b"
    for i in range(12):
        save(a / f"{i}.webp", film(i))
        save(b / "deep" / f"{i}.webp", film(100 + i, light=100))
    return a, b


def run(a: Path, b: Path, judges: Given | None = None, **options: Any) -> dict[str, Any]:
    return folders.compare(a, b, judges or Given(), **{"frames": 6, "size": 8, **options})  # type: ignore[arg-type]


def pick(found: dict[str, Any], arm: str, metric: str) -> dict[str, Any]:
    return next(row for row in found["scores"] if (row["arm"], row["metric"]) == (arm, metric))


def test_scores_are_the_distances_of_the_clips_features(two: tuple[Path, Path]) -> None:
    found = json.loads(json.dumps(run(*two), allow_nan=False))
    tables = [
        Given().measure(np.stack([np.stack(film(base + i, light=light)) for i in range(12)]), [""] * 12).features["net"]
        for base, light in ((0, 128), (100, 100))
    ]
    fd, kid = pick(found, folders.BOTH, "FD-net"), pick(found, folders.BOTH, "KID-net")
    # Files are read in the order of their names, and lossless: 8x8 frames are not resized.
    assert fd["value"] == pytest.approx(distances.frechet(*(Moments.of(one) for one in tables)), rel=1e-6)
    assert kid["value"] == pytest.approx(distances.kid(*tables), rel=1e-6)
    for row in (fd, kid):
        assert row["low"] < row["value"] < row["high"] and row["n"] == row["groups"] == 12
        assert row["protocol"]["n"] == row["protocol"]["reference"] == 12 and row["protocol"]["frames"] == 6
    assert fd["protocol"]["divisor"] == found["divisor"] == "n-1" and kid["protocol"]["divisor"] == ""
    assert (found["a"]["clips"], found["b"]["clips"]) == (12, 12)


def test_the_floor_stands_beside_the_value_of_as_many_clips(two: tuple[Path, Path]) -> None:
    found = run(*two)
    half, floor = pick(found, folders.HALF, "FD-net"), pick(found, folders.FLOOR, "FD-net")
    assert half["n"] == floor["n"] == 6 and half["value"] > floor["value"] > 0
    require_same(half, floor)
    with pytest.raises(ArchipelError, match="estimator"):
        require_same(pick(found, folders.BOTH, "FD-net"), floor)


def test_a_distance_to_other_clips_is_of_another_protocol(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = two
    other = tmp_path / "other"
    for i in range(12):
        save(other / f"{i}.webp", film(300 + i))
    one, two_ = run(a, b), run(other, b)
    with pytest.raises(ArchipelError, match="clips is"):
        require_same(pick(one, folders.BOTH, "FD-net"), pick(two_, folders.BOTH, "FD-net"))
    with pytest.raises(ArchipelError, match="frames is"):
        require_same(pick(one, folders.BOTH, "FD-net"), pick(run(a, b, frames=4), folders.BOTH, "FD-net"))


def test_names_of_files_do_not_matter_but_what_is_measured_does(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = two
    moved = tmp_path / "moved"
    for path in a.iterdir():
        save(moved / "x" / path.name, film(int(path.stem)))
    assert run(moved, b)["a"]["sha256"] == run(a, b)["a"]["sha256"] != run(a, b, size=16)["a"]["sha256"]


def test_few_clips_are_in_memory_at_a_time(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_CLIPS", 5)
    judges = Given()
    run(*two, judges)
    assert [shape[0] for shape in judges.handed] == [5, 5, 2] * 2
    monkeypatch.setattr(folders, "_BYTES", 3 * 6 * 8 * 8 * 3)  # large frames: fewer clips
    judges = Given()
    run(*two, judges)
    assert [shape[0] for shape in judges.handed] == [3, 3, 3, 3] * 2


def test_whatever_can_be_decoded_is_read(two: tuple[Path, Path]) -> None:
    a, b = two
    for suffix in (".mp4", ".webm", ".mkv", ".avi"):
        video(b / f"v{suffix}", film(7))
    save(b / "anim.gif", film(8))
    save(b / "anim.png", film(9))
    save(b / ".hidden" / "no.webp", film(9))
    assert run(a, b)["b"]["clips"] == 12 + 6


def test_clips_that_cannot_be_used_are_named_and_counted(two: tuple[Path, Path]) -> None:
    a, b = two
    (b / "torn.mp4").write_bytes(b"\x00\x00\x00\x18ftyp")
    found = run(a, b)
    assert [one["file"] for one in found["b"]["unreadable"]] == ["torn.mp4"] and found["b"]["clips"] == 12
    assert any("torn.mp4 (truncated" in note for note in found["notes"])
    (b / "page.webm").write_text("<html>")
    with pytest.raises(ArchipelError, match=r"2 of 14 clips of B .*page\.webm \(not a clip.*--max-rejected"):
        run(a, b)
    assert run(a, b, max_rejected=0.2)["b"]["clips"] == 12


def test_links_out_of_the_folder_are_not_followed(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = two
    save(tmp_path / "outside.webp", film(55))
    (b / "link.webp").symlink_to(tmp_path / "outside.webp")
    assert "outside the folder" in run(a, b)["b"]["unreadable"][0]["reason"]


def test_the_window_is_what_nearly_all_clips_are_long_enough_for(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for i in range(4):
        video(a / f"{i}.mp4", film(i, 10))
        video(b / f"{i}.webm", film(20 + i, 7))
    found = run(a, b, frames=0, fps=8.0)
    assert found["window"]["frames"] == 7 and found["b"]["clips"] == 4
    for i in range(4, 24):
        video(b / f"{i}.webm", film(20 + i, 9))
    for i in range(4):
        (b / f"{i}.webm").unlink()
    video(b / "short.webm", film(90, 2))  # one of 21: it does not shorten the others, it is left out
    found = run(a, b, frames=0, fps=8.0)
    assert found["window"]["frames"] == 9
    assert found["b"]["unreadable"][0]["file"] == "short.webm"
    with pytest.raises(ArchipelError, match="too short"):
        run(a, b, frames=11)
    with pytest.raises(ArchipelError, match="needs 12 frames"):
        run(a, b, Given(least=12), frames=0)


def test_loops_have_as_many_frames_as_are_wanted(two: tuple[Path, Path]) -> None:
    assert run(*two, frames=0)["window"]["frames"] == folders.MOST_FRAMES


def test_what_a_reader_must_know_is_said(two: tuple[Path, Path]) -> None:
    a, b = two
    save(a / "still.png", film(1)[:1])
    (b / "same.webp").write_bytes((a / "3.webp").read_bytes())
    (b / "again.webp").write_bytes((a / "3.webp").read_bytes())
    said = " / ".join(run(a, b)["notes"])
    for words in ("too few clips to conclude: 13 and 14", "every clip counts as its own", "divided by n-1"):
        assert words in said
    assert "1 clips are in both folders" in said and "B holds 1 clips more than once" in said
    assert "1 of 13 clips of A do not move" in said


def test_only_i3d_gives_an_fvd(two: tuple[Path, Path]) -> None:
    found = run(*two, Given(["i3d"], metric="FVD"))
    assert {row["metric"] for row in found["scores"]} == {"FVD", "KID-i3d"}


def test_two_clips_have_values_without_intervals_and_no_floor(two: tuple[Path, Path]) -> None:
    a, b = two
    for path in [*a.iterdir()][2:]:
        path.unlink()
    found = run(a, b)
    assert [row["arm"] for row in found["scores"]] == [folders.BOTH] * 2
    assert all(row["value"] is not None and row["low"] is None for row in found["scores"])
    assert found["notes"][-1].startswith("no real floor")


def test_folders_that_cannot_be_compared_are_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = two
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    save(tmp_path / "one" / "1.webp", film(1))
    (tmp_path / "link").symlink_to(a)
    for first, second, words in (
        (a, tmp_path / "nowhere", "FOLDER_B.*no such folder"),
        (tmp_path / "file", b, "FOLDER_A.*is a file"),
        (a, tmp_path / "empty", "FOLDER_B.*holds no clips.*mp4"),
        (a, a, "same folder"),
        (a, tmp_path / "link", "same folder"),
        (b, b / "deep", "lies within"),
        (a, tmp_path / "one", "gives 1 clip: .*at least 2"),
        (Path("s3://bucket/x"), b, "remote address|no such folder"),
    ):
        with pytest.raises(ArchipelError, match=words):
            run(first, second)


def test_features_that_are_not_finite_name_the_clip(two: tuple[Path, Path]) -> None:
    class Broken(Given):
        def measure(self, clips: np.ndarray, captions: Sequence[str] = ()) -> Any:
            made = super().measure(clips, captions)
            made.features["net"][2, 1] = np.nan
            return made

    with pytest.raises(ArchipelError, match=r"10\.webp: net gives numbers that are not finite"):
        run(*two, Broken())


def test_a_stop_ends_it(two: tuple[Path, Path]) -> None:
    stop = StopFlag()
    stop.signal = 2
    with pytest.raises(Stopped, match="nothing was written"):
        run(*two, stop=stop)
