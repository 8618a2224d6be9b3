"""A window of 16 frames of 64x64 out of a clip: ours against plain loops over the whole file with PyAV or Pillow.

    python -m bench.clip_decoding [--small] [--out FILE]

The plain loop is what one writes first: decode every frame, make each a square of 64x64, then pick the 16 that are on screen
at the wanted times. A thriftier one decodes every frame too, and converts only those 16. Both use the same libraries, one
thread, and the same cutting and scaling as ours, and give the same bytes, which is shown first.

Sources: MP4 of 10 s, 24 frames a second, with x264's own key frames (one in 10 s) and one every 2 s; emoji-like loops of 72
frames of 256x256 with transparency, as WebP, PNG and GIF; and what real emoji are in the user's cache. Windows are 2 s long
(8 frames a second) at the start, and from 40 % of the clip on.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

from archipel.data.base import Window
from archipel.data.decode import decode_clip
from archipel.data.fetch import downloads
from bench import common

WHAT = "16 frames of 64x64 out of a clip"
AIM = 1 / 3
SIDE, FRAMES, SPEED = 64, 16, 8.0
SLACK = Fraction(1, 1000)  # a frame that starts a millisecond late is on time
EMOJI = 4  # real emoji that are taken, where there are any

Frames = list[tuple[Fraction, Any]]  # when a frame begins, and the frame


# --- sources ---------------------------------------------------------------------------------------------------------


def film(width: int, height: int, seconds: int, keys: int) -> bytes:
    """A soft picture that slides by; a key frame every ``keys`` frames at most (0: as x264 likes)."""
    draw = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (height // 16, width // 8, 3), dtype=np.uint8)
    ground = np.asarray(Image.fromarray(draw).resize((2 * width, height + 64), Image.Resampling.BICUBIC))
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as out:
        stream: Any = out.add_stream("libx264", rate=24, options={"crf": "23", **({"g": str(keys)} if keys else {})})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for i in range(seconds * 24):
            x, y = i % width, i % 64
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(ground[y : y + height, x : x + width]), "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 24)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return target.getvalue()


def face(count: int, side: int) -> list[Image.Image]:
    """A shaded ball with eyes that sways and blinks on a transparent ground."""
    made = []
    for i in range(count):
        turn = 2 * np.pi * i / count
        image = Image.new("RGBA", (512, 512))
        pen = ImageDraw.Draw(image)
        x, y, r = 256 + 40 * np.sin(turn), 256 + 30 * np.cos(2 * turn), 180 + 20 * np.sin(3 * turn)
        for shade in range(30):
            q = r * (1 - shade / 40)
            pen.ellipse((x - q, y - q + shade, x + q, y + q + shade), fill=(255, 200 - 3 * shade, 40 + 2 * shade, 255))
        for eye in (x - 70, x + 70):
            half = 25 + 15 * np.sin(5 * turn)
            pen.ellipse((eye - 22, y - 40 - half, eye + 22, y - 40 + half), fill=(90, 50, 20, 255))
        made.append(image.resize((side, side), Image.Resampling.LANCZOS))
    return made


def loop(kind: str, count: int, side: int) -> bytes:
    frames, target = face(count, side), io.BytesIO()
    frames[0].save(target, kind, save_all=True, append_images=frames[1:], duration=42, loop=0)
    return target.getvalue()


def emoji(count: int) -> Iterator[tuple[str, bytes]]:
    """The first animated ones of a package in the user's cache; none where there is no package."""
    for path, _ in downloads():
        if "fluent-emoji-anim" not in path.name:
            continue
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".webp") else None
                data = file.read() if file is not None else b""
                if data[12:16] == b"VP8X" and data[20] & 2:
                    yield member.name.rpartition("/")[2].removesuffix(".webp"), data
                    count -= 1
                if count == 0:
                    return


# --- the loops that one writes -----------------------------------------------------------------------------------------


def every_av(data: bytes) -> Frames:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return [(Fraction(frame.pts) * stream.time_base, frame) for frame in container.decode(stream)]


def every_pillow(data: bytes) -> Frames:
    frames, now = [], Fraction(0)
    with Image.open(io.BytesIO(data)) as image:
        for number in range(image.n_frames):
            image.seek(number)
            frames.append((now, image.copy()))
            now += Fraction(round(image.info["duration"]), 1000)
    return [*frames, (now, None)]


def square(frame: Any) -> np.ndarray:
    """uint8 (64, 64, 3): on white, the middle square, scaled down."""
    if isinstance(frame, av.VideoFrame):
        image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    else:
        ground = Image.new("RGBA", frame.size, (255, 255, 255, 255))
        ground.alpha_composite(frame.convert("RGBA"))
        image = ground.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, image.width - left, image.height - top)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))


def plain(every: Callable[[bytes], Frames], data: bytes, window: Window, thrifty: bool) -> np.ndarray:
    """uint8 (16, 64, 64, 3)."""
    frames = every(data)
    length = frames.pop()[0] if frames[-1][1] is None else None
    wanted = [t + SLACK if length is None else (t + SLACK) % length for t in window.times()]
    places = [max(i for i, (begins, _) in enumerate(frames) if begins <= t) for t in wanted]
    if thrifty:
        return np.stack([square(frames[i][1]) for i in places])
    made = [square(frame) for _, frame in frames]
    return np.stack([made[i] for i in places])


def sources(small: bool) -> Iterator[tuple[str, Callable[[bytes], Frames], bytes, float]]:
    """(name, the library's loop, bytes, seconds)."""
    seconds, width, height = (4, 96, 64) if small else (10, 320, 240)
    yield "MP4, x264's key frames", every_av, film(width, height, seconds, 0), seconds
    yield "MP4, a key frame every 2 s", every_av, film(width, height, seconds, 48), seconds
    for kind in ("WebP", "PNG", "GIF"):
        yield f"{kind} like an emoji", every_pillow, loop(kind, 72, 32 if small else 256), 3.0
    if not small:
        yield from ((f"emoji {name}", every_pillow, data, 3.0) for name, data in emoji(EMOJI))


def run(small: bool = False) -> dict[str, Any]:
    rounds = 1 if small else 7
    with common.Benchmark("clip_decoding", WHAT, ("av", "pillow")) as b:
        for name, every, data, seconds in sources(small):
            b.facts[f"kilobytes, {name}"] = round(len(data) / 1000)
            for start in (0.0, 0.4 * seconds):
                window = Window(FRAMES, SPEED, start, SIDE, "center", (255, 255, 255))
                calls: dict[str, Callable[[], np.ndarray]] = {
                    "ours": partial(decode_clip, data, window),
                    "plain": partial(plain, every, data, window, False),
                    "thrifty": partial(plain, every, data, window, True),
                }
                wanted = calls["ours"]()
                for contender in ("plain", "thrifty"):
                    if not np.array_equal(wanted, calls[contender]()):
                        raise common.DifferentError(f"{name}: the {contender} loop gives other frames")
                taken = common.interleave(calls, rounds)
                case, library = f"{name}, from {start:g} s", "PyAV" if every is every_av else "Pillow"
                ours = taken["ours"]
                b.rows.append(common.versus(case, f"{library}, every frame made a square", ours, taken["plain"], AIM))
                b.rows.append(common.versus(case, f"{library}, the 16 made squares", ours, taken["thrifty"]))
        if not small and not any(key.startswith("kilobytes, emoji") for key in b.facts):
            b.facts["real emoji"] = "not in the user's cache (archipel demo fetches them): left out"
    return b.record


if __name__ == "__main__":
    common.main(__doc__, run)
