from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from PIL import Image

from archipel.data import decode
from archipel.data.base import Rejected, Window
from archipel.data.decode import decode_clip, motion_of, to_square, video_length
from archipel.data.sniff import check_whole, kind_of


def window(frames: int = 4, fps: float = 8.0, start: float = 0.0, size: int = 16, crop: str = "center") -> Window:
    return Window(frames, fps, start, size, crop, (255, 255, 255))


@pytest.mark.parametrize("container", ["mp4", "mov", "webm"])
@pytest.mark.parametrize(
    ("frames", "fps", "start", "expected"),
    [
        (4, 8.0, 0.0, [0, 3, 6, 9]),
        (4, 24.0, 0.0, [0, 1, 2, 3]),
        (3, 8.0, 0.5, [12, 15, 18]),
        (3, 5.0, 0.1, [2, 7, 12]),  # 0.1, 0.3 and 0.5 s lie between frames: the one on screen is taken
        (6, 48.0, 0.25, [6, 6, 7, 7, 8, 8]),  # faster than the source: frames are repeated
    ],
)
def test_videos_give_the_frames_on_screen_at_the_wanted_times(
    container: str,
    frames: int,
    fps: float,
    start: float,
    expected: list[int],
    make_video: Callable[..., bytes],
    read_numbers: Callable[[np.ndarray], list[int]],
) -> None:
    clip = decode_clip(make_video(24, container=container), window(frames, fps, start))
    assert clip.shape == (frames, 16, 16, 3)
    assert clip.dtype == np.uint8
    assert read_numbers(clip) == expected


@pytest.mark.parametrize("rate", [30, 25])
def test_every_frame_of_a_webm_is_found_although_it_rounds_to_milliseconds(
    rate: int, make_video: Callable[..., bytes], read_numbers: Callable[[np.ndarray], list[int]]
) -> None:
    clip = decode_clip(make_video(20, rate=rate, container="webm"), window(20, rate))
    assert read_numbers(clip) == list(range(20))


@pytest.mark.parametrize("container", ["mp4", "webm"])
def test_only_the_window_of_a_video_is_decoded(
    container: str,
    make_video: Callable[..., bytes],
    read_numbers: Callable[[np.ndarray], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoded = []
    timed = decode._timed

    def counting(*args: Any) -> Any:
        for found in timed(*args):
            decoded.append(found[0])
            yield found

    monkeypatch.setattr(decode, "_timed", counting)
    clip = decode_clip(make_video(240, container=container), window(4, 12.0, 5.0))
    assert read_numbers(clip) == [n % 31 for n in (120, 122, 124, 126)]
    assert min(decoded) >= 4  # entered at a key frame near 5 s, not at 0 s
    assert len(decoded) <= 25  # and left right behind the window


@pytest.mark.parametrize("kind", ["webp", "gif", "png"])
def test_loops_wrap_around(
    kind: str, make_loop: Callable[..., bytes], read_numbers: Callable[[np.ndarray], list[int]]
) -> None:
    data = make_loop(6, kind=kind, milliseconds=100)
    assert read_numbers(decode_clip(data, window(8, 10.0))) == [0, 1, 2, 3, 4, 5, 0, 1]
    assert read_numbers(decode_clip(data, window(4, 10.0, start=1.5))) == [3, 4, 5, 0]
    assert read_numbers(decode_clip(data, window(3, 5.0))) == [0, 2, 4]


def test_loops_with_unequal_delays_are_picked_by_time(
    make_loop: Callable[..., bytes], read_numbers: Callable[[np.ndarray], list[int]]
) -> None:
    data = make_loop(4, milliseconds=[500, 100, 100, 300])
    assert read_numbers(decode_clip(data, window(10, 10.0))) == [0, 0, 0, 0, 0, 1, 2, 3, 3, 3]


def test_a_gif_without_delays_is_shown_as_browsers_show_it(
    make_loop: Callable[..., bytes], read_numbers: Callable[[np.ndarray], list[int]]
) -> None:
    assert read_numbers(decode_clip(make_loop(4, kind="gif", milliseconds=0), window(4, 10.0))) == [0, 1, 2, 3]


def test_decoding_of_a_loop_stops_behind_the_window(
    make_loop: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    duration = decode._duration
    monkeypatch.setattr(decode, "_duration", lambda image: seen.append(1) or duration(image))
    decode_clip(make_loop(30, kind="gif", milliseconds=100), window(4, 10.0))
    assert len(seen) == 4


def test_a_still_picture_is_a_loop_of_one_frame(make_loop: Callable[..., bytes]) -> None:
    clip = decode_clip(make_loop(1, kind="png"), window(4))
    assert motion_of(clip) == 0
    assert clip.shape == (4, 16, 16, 3)


def test_the_stand_in_picture_of_an_animated_png_is_left_out(
    make_loop: Callable[..., bytes], read_numbers: Callable[[np.ndarray], list[int]]
) -> None:
    data = make_loop(5, kind="png", default_image=True)
    assert read_numbers(decode_clip(data, window(4, 10.0))) == [1, 2, 3, 4]


def test_a_video_that_is_too_short_is_refused_by_name(make_video: Callable[..., bytes]) -> None:
    with pytest.raises(Rejected, match=r"^too short: 1\.00 s, the window's last frame is at 1\.75 s$"):
        decode_clip(make_video(24), window(8, 4.0))
    assert len(decode_clip(make_video(43), window(8, 4.0))) == 8  # frame 42 starts at 1.75 s


@pytest.mark.parametrize("kind", ["webp", "gif", "png", "mp4", "mov", "webm"])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.97])
def test_truncated_files_are_refused(
    kind: str, share: float, make_video: Callable[..., bytes], make_loop: Callable[..., bytes]
) -> None:
    data = make_loop(6, kind=kind) if kind in ("webp", "gif", "png") else make_video(24, container=kind)
    check_whole(data, kind_of(data))
    with pytest.raises(Rejected, match=r"^truncated: "):
        decode_clip(data[: int(len(data) * share)], window())


def test_bytes_that_are_no_clip_are_refused_before_a_decoder_sees_them() -> None:
    with pytest.raises(Rejected, match=r"^no frames: the file is empty$"):
        decode_clip(b"", window())
    scripts = [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"%PDF-1.4 and so on",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ]
    for data in scripts:
        with pytest.raises(Rejected, match=r"^not a clip"):
            decode_clip(data, window())


@pytest.mark.parametrize("kind", ["webp", "gif", "png", "mp4", "webm"])
def test_damaged_bytes_give_a_clip_or_a_reason_and_the_reason_is_always_the_same(
    kind: str, make_video: Callable[..., bytes], make_loop: Callable[..., bytes]
) -> None:
    whole = make_loop(4, kind=kind) if kind in ("webp", "gif", "png") else make_video(12, container=kind)
    rng = np.random.Generator(np.random.PCG64(7))
    for _ in range(12):
        data = bytearray(whole)
        for place in rng.integers(12, len(data), 6):
            data[place] = int(rng.integers(256))
        outcomes = []
        for _ in range(2):
            try:
                outcomes.append(decode_clip(bytes(data), window(2)).shape)
            except Rejected as rejection:
                outcomes.append(rejection.reason)
        assert outcomes[0] == outcomes[1]
        assert outcomes[0] == (2, 16, 16, 3) or "0x" not in outcomes[0]


def test_a_picture_that_claims_to_be_huge_is_refused_without_decoding_it(make_loop: Callable[..., bytes]) -> None:
    data = bytearray(make_loop(2, kind="gif"))
    data[6:10] = b"\xff\xff\xff\xff"  # 65535 x 65535
    with pytest.raises(Rejected, match=r"^too large: "):
        decode_clip(bytes(data), window())
    data[6:10] = b"\x28\x23\x28\x23"  # 9000 x 9000
    with pytest.raises(Rejected, match=r"^too large: frames of 9000x9000 pixels$"):
        decode_clip(bytes(data), window())


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_videos_are_turned_as_the_phone_was_held(turns: int) -> None:
    import av

    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:12, :12] = 255  # a mark in the top left corner
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as out:
        stream: Any = out.add_stream("libx264", rate=8, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.set_display_rotation(90 * turns - (360 if turns == 3 else 0))
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 8)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    clip = decode_clip(target.getvalue(), window(2, 8.0, size=32))
    np.testing.assert_allclose(clip[0].astype(int), np.rot90(picture, turns).astype(int), atol=24)


def test_transparency_shows_the_background() -> None:
    pictures = [Image.new("RGBA", (20, 20), (255, 0, 0, alpha)) for alpha in (0, 128, 255)]
    target = io.BytesIO()
    pictures[0].save(target, "WEBP", save_all=True, append_images=pictures[1:], duration=100, lossless=True, exact=True)
    blue = Window(3, 10.0, 0.0, 8, "center", (0, 0, 200))
    clip = decode_clip(target.getvalue(), blue)
    np.testing.assert_allclose(clip[0, 4, 4], [0, 0, 200], atol=1)
    np.testing.assert_allclose(clip[1, 4, 4], [128, 0, 100], atol=1)
    np.testing.assert_allclose(clip[2, 4, 4], [255, 0, 0], atol=1)


def test_crops() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200  # the middle third
    image = Image.fromarray(wide)
    assert to_square(image, window(crop="center", size=10)).min() == 200
    stretched = to_square(image, window(crop="stretch", size=30))
    assert stretched[:, :8].max() == 0 and stretched[:, 12:18].min() == 200
    padded = to_square(image, window(crop="pad", size=30))
    assert padded[:10].min() == 255 and padded[20:].min() == 255  # bands of background
    assert padded[15, 15].tolist() == [200] * 3 and padded[15, 2].tolist() == [0] * 3


def test_pixels_that_are_not_square_are_made_so() -> None:
    image = Image.fromarray(np.zeros((20, 20, 3), np.uint8))  # shown twice as wide as it is high
    padded = to_square(image, window(crop="pad", size=20), aspect=Fraction(2))
    assert padded[:5].min() == 255 and padded[15:].min() == 255 and padded[6:14].max() == 0


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = to_square(Image.fromarray(stripes), window(size=8))
    np.testing.assert_allclose(small, 127.5, atol=6)


def test_motion_is_the_mean_absolute_difference_of_neighbours() -> None:
    clip = np.zeros((3, 2, 2, 3), np.uint8)
    clip[1] = 255
    assert motion_of(clip) == 1.0
    clip[1] = 51
    assert motion_of(clip) == pytest.approx(0.2)
    assert motion_of(clip[:1]) == 0.0


def test_times_are_exact() -> None:
    assert window(4, 30.0, 0.1).times() == [Fraction(1, 10) + Fraction(i, 30) for i in range(4)]
    assert Window(2, 29.97, 0.0, 8, "pad", (0, 0, 0)).times()[1] == Fraction(100, 2997)


@pytest.mark.parametrize("container", ["mp4", "webm"])
def test_the_length_of_a_video_is_known_without_decoding(make_video: Callable[..., bytes], container: str) -> None:
    length = video_length(make_video(12, rate=8, container=container))
    assert length is not None and float(length) == pytest.approx(1.5, abs=0.002)


def test_loops_have_no_length_and_other_bytes_are_refused(make_loop: Callable[..., bytes]) -> None:
    assert video_length(make_loop()) is None
    with pytest.raises(Rejected, match="not a clip"):
        video_length(b"<html>")
