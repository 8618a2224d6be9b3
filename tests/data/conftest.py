"""Small real clips whose frame number is their colour, so that a test can read off which frames were picked."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

STEP = 8  # frame i is the grey STEP * i + 4: far enough apart to survive lossy codecs, room for 31 frames


def _greys(numbers: Sequence[int], width: int, height: int) -> list[np.ndarray]:
    return [np.full((height, width, 3), STEP * (n % 31) + 4, np.uint8) for n in numbers]


def video_bytes(
    frames: int | Sequence[np.ndarray] = 24,
    *,
    rate: int = 24,
    container: str = "mp4",
    width: int = 48,
    height: int = 32,
) -> bytes:
    """A video with a key frame every 12 frames."""
    import av

    pictures = _greys(range(frames), width, height) if isinstance(frames, int) else list(frames)
    codec = "libvpx" if container == "webm" else "libx264"
    target = io.BytesIO()
    with av.open(target, "w", format=container) as out:
        stream: Any = out.add_stream(codec, rate=rate, options={"crf": "10", "b": "2M", "g": "12"})
        stream.width, stream.height = pictures[0].shape[1], pictures[0].shape[0]
        stream.pix_fmt, stream.gop_size = "yuv420p", 12
        stream.codec_context.thread_count = 1
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return target.getvalue()


def loop_bytes(
    frames: int | Sequence[Any] = 6, *, kind: str = "webp", milliseconds: int | list[int] = 100, **options: Any
) -> bytes:
    """An animated WebP, GIF or PNG."""
    from PIL import Image

    pictures = [Image.fromarray(p) for p in _greys(range(frames), 48, 32)] if isinstance(frames, int) else list(frames)
    target = io.BytesIO()
    if kind == "webp":
        options = {"lossless": True, **options}
    pictures[0].save(
        target, kind.upper(), save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0, **options
    )
    return target.getvalue()


def numbers_of(clip: np.ndarray) -> list[int]:
    """The frame numbers that a decoded clip's colours spell."""
    return [round((float(frame.mean()) - 4) / STEP) for frame in clip]


@pytest.fixture
def make_video() -> Callable[..., bytes]:
    return video_bytes


@pytest.fixture
def make_loop() -> Callable[..., bytes]:
    return loop_bytes


@pytest.fixture
def read_numbers() -> Callable[[np.ndarray], list[int]]:
    return numbers_of
