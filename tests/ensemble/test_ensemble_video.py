"""Clips as files: what is read back, and that the same clip gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from archipel.ensemble import video
from archipel.errors import ArchipelError


def clip(frames: int = 6, height: int = 32, width: int = 32) -> np.ndarray:
    """A red block on blue that moves one column a frame."""
    made = np.zeros((frames, height, width, 3), np.uint8)
    made[..., 2] = 180
    for i in range(frames):
        made[i, 8:24, 4 + 2 * i : 16 + 2 * i] = (230, 40, 20)
    return made


def decode(path: Path) -> tuple[np.ndarray, float, float]:
    """Frames, frames per second and duration in seconds, as players see them."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        return np.stack(frames), float(stream.average_rate), float(stream.duration * stream.time_base)


def animation(path: Path) -> tuple[np.ndarray, list[int]]:
    with Image.open(path) as image:
        frames, durations = [], []
        for i in range(image.n_frames):
            image.seek(i)
            image.load()
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(int(image.info["duration"]))
        assert image.info.get("loop", 0) == 0
    return np.stack(frames), durations


@pytest.mark.parametrize("fps", [4.0, 8.0, 23.976])
def test_mp4_holds_every_frame_at_its_time(tmp_path: Path, fps: float) -> None:
    frames, rate, duration = decode(video.write(tmp_path / "a.mp4", clip(), fps, scale=4))
    assert frames.shape == (6, 128, 128, 3)
    assert rate == pytest.approx(fps, rel=1e-3) and duration == pytest.approx(6 / fps, rel=0.01)
    wanted = clip().repeat(4, 1).repeat(4, 2).astype(int)
    assert np.abs(frames.astype(int) - wanted).mean() < 6


def test_odd_sides_and_a_single_frame_can_be_mp4(tmp_path: Path) -> None:
    frames, _, _ = decode(video.write(tmp_path / "a.mp4", clip(1, 33, 31), 5))
    assert frames.shape == (1, 34, 32, 3)


def test_webp_without_loss_gives_the_pixels_back(tmp_path: Path) -> None:
    still = clip()
    still[3] = still[2]  # the encoder makes one longer frame of two equal ones: played, it is the same
    frames, durations = animation(video.write(tmp_path / "a.webp", still, 8))
    assert durations == [125, 125, 250, 125, 125] and np.array_equal(frames[[0, 1, 2, 2, 3, 4]], still)
    small = video.write(tmp_path / "b.webp", clip(), 8, lossless=False, scale=4, resample="bicubic")
    frames, _ = animation(small)
    assert frames.shape == (6, 128, 128, 3)


def test_gif_counts_in_hundredths_without_drifting(tmp_path: Path) -> None:
    frames, durations = animation(video.write(tmp_path / "a.gif", clip(), 24))
    assert frames.shape == (6, 32, 32, 3) and np.abs(frames.astype(int) - clip()).max() < 12
    assert set(durations) <= {40, 50} and sum(durations) == 250


def test_frames_folder_is_replaced_as_a_whole_and_nothing_else_is_touched(tmp_path: Path) -> None:
    folder = video.write(tmp_path / "frames", clip(6), 8)
    video.write(folder, clip(3), 8)
    assert sorted(p.name for p in folder.iterdir()) == ["frame-0000.png", "frame-0001.png", "frame-0002.png"]
    assert np.array_equal(np.asarray(Image.open(folder / "frame-0002.png")), clip(3)[2])
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ArchipelError, match=r"notes\.txt"):
        video.write(folder, clip(), 8)
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["a.mp4", "a.webp", "a.gif", "frames"])
def test_same_clip_same_bytes(tmp_path: Path, name: str) -> None:
    def content(path: Path) -> list[bytes]:
        return [p.read_bytes() for p in sorted(path.iterdir())] if path.is_dir() else [path.read_bytes()]

    first = content(video.write(tmp_path / "one" / name, clip(), 8, scale=2))
    assert content(video.write(tmp_path / "two" / name, clip(), 8, scale=2)) == first


@pytest.mark.parametrize("name", ["clip.avi", "clip.png", "clip.mp4v", "clip.v1"])
def test_unknown_suffix_names_those_that_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArchipelError, match=r"\.mp4, \.webp, \.gif"):
        video.write(tmp_path / name, clip(), 8)
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_is_kept_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.webp"
    path.write_bytes(b"before")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video, "_webp", full)
    with pytest.raises(ArchipelError, match="No space left"):
        video.write(path, clip(), 8)
    assert path.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == ["a.webp"]


def test_unusable_clips_names_and_scales_are_refused(tmp_path: Path) -> None:
    for bad in (clip().astype(np.float32), clip()[0], clip()[:0], clip()[..., :2]):
        with pytest.raises(ArchipelError, match="uint8"):
            video.write(tmp_path / "a.mp4", bad, 8)
    for fps in (0, -1, float("nan")):
        with pytest.raises(ArchipelError, match="fps"):
            video.write(tmp_path / "a.mp4", clip(), fps)
    for scale in (0, -2, 1000):
        with pytest.raises(ArchipelError, match="scale"):
            video.write(tmp_path / "a.mp4", clip(), 8, scale=scale)
    with pytest.raises(ArchipelError, match="nearest or bicubic"):
        video.enlarge(clip(), 2, "lanczos")  # type: ignore[arg-type]
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ArchipelError, match="is a folder"):
        video.write(tmp_path / "folder.mp4", clip(), 8)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArchipelError, match="is a file"):
        video.write(tmp_path / "file", clip(), 8)
    with pytest.raises(ArchipelError, match="cannot be written"):
        video.write(tmp_path / "file" / "below.gif", clip(), 8)


def test_several_clips_get_numbers(tmp_path: Path) -> None:
    paths = video.write_clips(tmp_path / "c.gif", np.stack([clip(), clip()[::-1]]), 8)
    assert [p.name for p in paths] == ["c-000.gif", "c-001.gif"] and all(p.is_file() for p in paths)
    assert video.write_clips(tmp_path / "c.gif", clip()[None], 8) == [tmp_path / "c.gif"]
