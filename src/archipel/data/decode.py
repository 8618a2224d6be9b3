"""Bytes of a clip -> the wanted window as uint8 (F, H, W, 3). Pillow reads WebP, GIF and PNG, PyAV the rest.

Source frames are picked by time: at time t the frame is the last one that started at or before t. Decoding stops at
the window's last frame; videos are entered at the key frame before its first, and of loops only those frames are decoded
that a wanted one shows a part of (``loops``). WebP, GIF and animated PNG are loops
and wrap around; a video that is too short is rejected.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import itertools
import math
import warnings
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from archipel.data import loops
from archipel.data.base import Rejected, Window
from archipel.data.sniff import AV_FORMATS, PILLOW_KINDS, check_whole, kind_of

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 1 << 26  # of one source frame; 8K video has half of it
# WebM stores whole milliseconds, so a frame of 2/30 s starts at 0.067 s: a little later than asked for is on time.
_SLACK = Fraction(1, 1000)
# A frame delay of 10 ms or less means "unset" in the wild; browsers show such frames for 100 ms.
_SHORTEST, _UNSET = Fraction(10, 1000), Fraction(100, 1000)


def decode_clip(data: bytes, window: Window) -> np.ndarray:
    """uint8 (P * F, H, W, 3). Raises Rejected with a reason that depends on bytes and window only."""
    kind = kind_of(data)
    check_whole(data, kind)
    try:
        if kind in PILLOW_KINDS:
            frames = _decode_loop(data, window) if window.phases == 1 else _decode_phases(data, window)
        else:
            frames = _decode_video(data, AV_FORMATS[kind], window) * window.phases
    except Rejected:
        raise
    except Exception as error:  # decoders raise anything at all on hostile bytes; messages hold addresses, so: the name
        if type(error).__name__ == "DecompressionBombError":  # Pillow's own bound, above ours
            raise Rejected("too large: the picture claims more pixels than can be meant") from error
        raise Rejected(f"undecodable: {kind} data that its decoder refuses ({type(error).__name__})") from error
    return np.stack(frames)


def motion_of(clip: np.ndarray) -> float:
    """Mean absolute difference of consecutive frames, in [0, 1]; clip uint8 (F, H, W, 3)."""
    if len(clip) < 2:
        return 0.0
    return float(np.abs(np.diff(clip.astype(np.int16), axis=0)).mean(dtype=np.float64) / 255)


# --- one frame -------------------------------------------------------------------------------------------------------


def to_square(image: Image.Image, window: Window, aspect: Fraction = Fraction(1)) -> np.ndarray:
    """Composite on the background, make square, resize with antialiasing: uint8 (H, W, 3).

    ``aspect`` is the source's pixel width over its height.
    """
    from PIL import Image

    if image.mode != "RGB":
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", rgba.size, window.background)
        image.paste(rgba, (0, 0), rgba)  # on opaque ground the numbers of alpha_composite, in half its time
    width, height, size = image.width * float(aspect), float(image.height), window.size
    if window.crop == "stretch" or width == height:
        resized = image.resize((size, size), Image.Resampling.BICUBIC)
    elif window.crop == "center":
        side = min(width, height)
        left, top = (width - side) / 2 / float(aspect), (height - side) / 2
        box = (left, top, image.width - left, height - top)
        resized = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    else:
        scale = size / max(width, height)
        small = max(1, round(width * scale)), max(1, round(height * scale))
        resized = Image.new("RGB", (size, size), window.background)
        resized.paste(image.resize(small, Image.Resampling.BICUBIC), ((size - small[0]) // 2, (size - small[1]) // 2))
    return np.asarray(resized, np.uint8)


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise Rejected("no frames: the picture is empty")
    if width * height > MAX_PIXELS:
        raise Rejected(f"too large: frames of {width}x{height} pixels")


# --- loops: WebP, GIF, animated PNG ----------------------------------------------------------------------------------


def _decode_loop(data: bytes, window: Window) -> list[np.ndarray]:
    """The one window. Its wanted times count from the first frame and wrap around at the last."""
    times = [t + _SLACK for t in window.times()]
    with _opened(data) as image:
        apart = loops.read(data, image)
        if apart is not None:
            return _compose(apart, times, window)
    # Frames as they come, until the window is full. Where the loop ends first, its length is then known and a second
    # pass takes the times that wrap around.
    wanted = dict(enumerate(times))
    found, length = _take(data, wanted, window)
    if len(found) < len(wanted):
        found |= _take(data, {i: t % length for i, t in wanted.items() if i not in found}, window)[0]
    return [found[i] for i in sorted(found)]


def _decode_phases(data: bytes, window: Window) -> list[np.ndarray]:
    """P windows of F frames, shifted by P-ths of the loop. The loop's length is known only after its last frame."""
    with _opened(data) as image:
        apart = loops.read(data, image)
    length = _length(data) if apart is None else _ends(apart)[-1]
    shifts = [Fraction(phase, window.phases) * length for phase in range(window.phases)]
    times = [(t + shift + _SLACK) % length for shift in shifts for t in window.times()]
    if apart is not None:
        return _compose(apart, times, window)
    found, _ = _take(data, dict(enumerate(times)), window)
    return [found[i] for i in sorted(found)]


def _compose(apart: loops.Loop, times: list[Fraction], window: Window) -> list[np.ndarray]:
    """The frames on screen at ``times``, which wrap around."""
    ends = _ends(apart)
    numbers = [bisect.bisect_right(ends, t % ends[-1]) for t in times]
    squares = {number: to_square(frame, window) for number, frame in apart.frames(sorted(set(numbers)))}
    return [squares[number] for number in numbers]


def _ends(apart: loops.Loop) -> list[Fraction]:
    """When each frame of a loop ends, in seconds."""
    return list(itertools.accumulate(_seconds(piece.milliseconds) for piece in apart.pieces))


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _check_size is stricter
        with Image.open(io.BytesIO(data), formats=["WEBP", "GIF", "PNG"]) as image:
            _check_size(*image.size)
            yield image


def _length(data: bytes) -> Fraction:
    """How long a loop is, in seconds."""
    length = Fraction(0)
    with _opened(data) as image:
        for number in _frame_numbers(image):
            image.seek(number)
            image.load()
            length += _duration(image)
    if length == 0:
        raise Rejected("no frames: the animation is empty")
    return length


def _take(data: bytes, wanted: dict[int, Fraction], window: Window) -> tuple[dict[int, np.ndarray], Fraction]:
    """The frames on screen at those of the wanted times that lie in the loop, and the time that was reached."""
    found: dict[int, np.ndarray] = {}
    now = Fraction(0)
    ahead = deque(sorted(wanted.items(), key=lambda one: one[1]))
    with _opened(data) as image:
        for number in _frame_numbers(image):
            image.seek(number)
            image.load()
            now += _duration(image)
            square: np.ndarray | None = None
            while ahead and ahead[0][1] < now:
                square = to_square(image, window) if square is None else square
                found[ahead.popleft()[0]] = square
            if not ahead:
                break
    if now == 0:
        raise Rejected("no frames: the animation is empty")
    return found, now


def _frame_numbers(image: Image.Image) -> range:
    # The first picture of an animated PNG may be a stand-in for old viewers that is no part of the animation.
    first = 1 if image.info.get("default_image") and getattr(image, "n_frames", 1) > 1 else 0
    return range(first, int(getattr(image, "n_frames", 1)))


def _duration(image: Image.Image) -> Fraction:
    return _seconds(float(image.info.get("duration", 0) or 0))


def _seconds(milliseconds: float) -> Fraction:
    seconds = Fraction(milliseconds).limit_denominator(1000) / 1000 if math.isfinite(milliseconds) else _UNSET
    return _UNSET if seconds <= _SHORTEST else seconds


# --- videos ----------------------------------------------------------------------------------------------------------


def _decode_video(data: bytes, container_format: str, window: Window) -> list[np.ndarray]:
    times = window.times()
    frames = None
    if times[0] > 0:
        frames = _pick(data, container_format, times, window, seek=True)
    if frames is None:  # from the beginning, also where the index led to behind the wanted time
        frames = _pick(data, container_format, times, window, seek=False)
    assert frames is not None
    return frames


def video_length(data: bytes) -> Fraction | None:
    """How long a video is, in seconds, by its packets: nothing is decoded. None for loops, which have no end.

    Raises Rejected where the bytes are no clip, cut off, or hold no video.
    """
    kind = kind_of(data)
    check_whole(data, kind)
    if kind in PILLOW_KINDS:
        return None
    import av

    try:
        opened: Any = av.open(io.BytesIO(data), format=AV_FORMATS[kind], metadata_errors="replace")
        with opened as container:
            if not container.streams.video:
                raise Rejected("no frames: there is no video stream")
            stream = container.streams.video[0]
            base = Fraction(stream.time_base or 1)
            step = 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)
            ends = [
                Fraction(packet.pts) * base + (Fraction(packet.duration) * base if packet.duration else step)
                for packet in container.demux(stream)
                if packet.pts is not None
            ]
            return max(ends, default=Fraction(0)) - Fraction(stream.start_time or 0) * base
    except av.error.FFmpegError as error:
        raise Rejected(f"undecodable: no readable {AV_FORMATS[kind]} container") from error


def _pick(
    data: bytes, container_format: str, times: list[Fraction], window: Window, seek: bool
) -> list[np.ndarray] | None:
    """The frames on screen at ``times``; None where seeking did not lead to a moment before them."""
    import av

    try:
        container = av.open(io.BytesIO(data), format=container_format, metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise Rejected(f"undecodable: no readable {container_format} container") from error
    with container:
        if not container.streams.video:
            raise Rejected("no frames: there is no video stream")
        stream = container.streams.video[0]
        _check_size(stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.thread_count = 1  # clips are decoded side by side, one thread each
        picked: list[np.ndarray] = []
        before: Any = None  # the newest frame, not yet known to be the last one before a wanted time
        end = Fraction(0)
        for start, end, frame in _timed(container, stream, times[0] if seek else None):  # noqa: B007 - read below
            if before is None and seek and start > times[0] + _SLACK:
                return None
            # A stream that begins late shows its first frame until then, hence ``before is not None``.
            while before is not None and len(picked) < len(times) and start > times[len(picked)] + _SLACK:
                picked.append(_square_frame(before, stream, window))
            if len(picked) == len(times):
                return picked
            before = frame
        if before is None and seek:
            return None
        if before is None:
            raise Rejected("no frames: nothing could be decoded")
        if end <= times[-1] + _SLACK:
            _too_short(stream, end, times[-1])
        return picked + [_square_frame(before, stream, window)] * (len(times) - len(picked))


def _too_short(stream: Any, end: Fraction, last: Fraction) -> None:
    stated = Fraction(stream.duration) * stream.time_base if stream.duration else Fraction(0)
    if stated > end + Fraction(1, 2):
        raise Rejected(f"truncated: {float(stated):.2f} s long by its header, {float(end):.2f} s can be decoded")
    raise Rejected(f"too short: {float(end):.2f} s, the window's last frame is at {float(last):.2f} s")


def _timed(container: Any, stream: Any, seek_to: Fraction | None) -> Iterator[tuple[Fraction, Fraction, Any]]:
    """(start, end, frame) in seconds from the stream's first moment, from the key frame before ``seek_to`` on."""
    import av

    base = Fraction(stream.time_base)
    origin = Fraction(stream.start_time or 0) * base
    rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
    now = Fraction(0)
    try:
        if seek_to is not None:
            container.seek(int((seek_to + origin) / base), stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.pts is not None:
                now = Fraction(frame.pts) * base - origin
            length = Fraction(frame.duration) * base if frame.duration else 1 / rate
            yield now, now + length, frame
            now += length
    except av.error.FFmpegError as error:
        if seek_to is None:
            raise Rejected(f"truncated: the stream breaks off at {float(now):.2f} s") from error
        # An index that cannot be used is no reason to give up: the caller reads from the beginning.


def _square_frame(frame: Any, stream: Any, window: Window) -> np.ndarray:
    from PIL import Image

    _check_size(frame.width, frame.height)
    if frame.is_corrupt:
        raise Rejected("undecodable: a frame of the window is damaged")
    picture = frame.to_ndarray(format="rgb24")
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    turns = round(getattr(frame, "rotation", 0) / 90) % 4  # how a phone was held; counter-clockwise
    if turns % 2:
        aspect = 1 / aspect
    return to_square(Image.fromarray(np.ascontiguousarray(np.rot90(picture, turns))), window, aspect)
