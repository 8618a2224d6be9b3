"""Animations that are taken apart give what Pillow gives for the whole, and decode only what is seen."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from archipel.data import decode, loops
from archipel.data.base import Rejected, Window
from archipel.data.decode import decode_clip

WINDOW = Window(8, 9.0, 0.15, 16, "center", (0, 90, 200))
WEBP = {"lossless": {"lossless": True}, "lossy": {"quality": 60}, "sparse": {"quality": 60, "kmin": 1000, "kmax": 1001}}
PNG = {
    "laid": {"blend": 0},
    "cleared": {"blend": 0, "disposal": 1},
    "blended": {"blend": 1},
    "restored": {"blend": 0, "disposal": 2},
    "stand-in": {"default_image": True},
}
CASES = [("WEBP", name) for name in WEBP] + [("PNG", name) for name in PNG] + [("GIF", "")]


def animation(kind: str, seed: int, mode: str = "RGBA", **options: Any) -> bytes:
    """Rectangles of all colours that come, go and stay, with uneven delays."""
    rng = np.random.default_rng(seed)
    width, height, count = (int(n) for n in rng.integers((20, 20, 3), (60, 60, 16)))
    base, frames = Image.new(mode, (width, height)), []
    for _ in range(count):
        frame = base.copy() if rng.random() < 0.7 else Image.new(mode, (width, height))
        for _ in range(2):
            (left, right), (top, bottom) = np.sort(rng.integers(0, (width, height), (2, 2)), 0).T.tolist()
            colour = tuple(rng.integers(0, 256, len(mode)).tolist())
            ImageDraw.Draw(frame).rectangle((left, top, right, bottom), fill=colour)
        frames.append(frame)
        base = frame if rng.random() < 0.3 else base
    target = io.BytesIO()
    delays = rng.integers(5, 200, count).tolist()
    frames[0].save(target, kind, save_all=True, append_images=frames[1:], duration=delays, loop=0, **options)
    return target.getvalue()


def apart(data: bytes) -> loops.Loop | None:
    with Image.open(io.BytesIO(data)) as image:
        return loops.read(data, image)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_window_is_what_the_whole_animation_gives(
    kind: str, name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (WEBP | PNG | {"": {}})[name]
    made = [animation(kind, seed, mode, **options) for seed in range(6)]
    windows = [WINDOW, replace(WINDOW, frames=3, start=1.7, crop="pad"), replace(WINDOW, frames=2, phases=3)]
    found = [[decode_clip(data, window) for window in windows] for data in made]
    parted = [apart(data) for data in made]
    left_to_pillow = {("PNG", "restored"), ("PNG", "stand-in"), ("PNG", "blended"), ("GIF", ""), ("WEBP", "lossless")}
    assert any(parted) or (kind, name) in left_to_pillow
    monkeypatch.setattr(loops, "read", lambda *_: None)
    for data, clips in zip(made, found, strict=True):
        for window, clip in zip(windows, clips, strict=True):
            np.testing.assert_array_equal(clip, decode_clip(data, window))


def piece(box: loops.Box, clear: bool = False) -> loops.Piece:
    return loops.Piece(box, clear, 100.0, bytes)


def test_only_frames_that_leave_a_trace_are_drawn() -> None:
    whole, left, right = (0, 0, 8, 8), (0, 0, 4, 8), (4, 0, 8, 8)
    assert loops.traces([piece(whole)] * 5) == [4]
    assert loops.traces([piece(whole), piece(left), piece(left)]) == [0, 2]
    assert loops.traces([piece(whole), piece(left), piece(right)]) == [1, 2]  # covered by two together
    assert loops.traces([piece(whole), piece((0, 0, 4, 7)), piece(right)]) == [0, 1, 2]
    assert loops.traces([piece(whole), piece((2, 2, 6, 6)), piece((1, 1, 7, 5)), piece((1, 4, 7, 7))]) == [0, 2, 3]
    assert loops.traces([piece(whole), piece(whole, clear=True), piece(left)]) == [2]
    assert loops.traces([piece(left), piece(right, clear=True), piece(right, clear=True)]) == [0, 2]


def test_a_loop_of_independent_frames_decodes_the_wanted_ones_only(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.effect_noise((24, 24), 200).convert("RGB") for _ in range(20)]
    target = io.BytesIO()
    frames[0].save(target, "WEBP", save_all=True, append_images=frames[1:], duration=50, lossless=True, kmax=1)
    seen = []
    picture = loops._picture
    monkeypatch.setattr(loops, "_picture", lambda one: seen.append(1) or picture(one))
    decode_clip(target.getvalue(), replace(WINDOW, frames=4, fps=5.0, phases=2))
    assert len(seen) == 8


def test_a_wanted_frame_that_is_damaged_is_refused() -> None:
    data = animation("PNG", 3, blend=0)
    place = data.index(b"fdAT") + 12
    broken = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    with pytest.raises(Rejected, match=r"^undecodable: png data"):
        decode_clip(broken, replace(WINDOW, frames=16, fps=20.0, start=0.0))


def test_laying_on_the_background_is_alpha_compositing() -> None:
    levels = np.arange(256, dtype=np.uint8)
    image = Image.fromarray(np.stack(np.broadcast_arrays(levels[:, None], 255, 3, levels), -1).astype(np.uint8), "RGBA")
    ground = Image.new("RGBA", image.size, (*WINDOW.background, 255))
    ground.alpha_composite(image)
    wanted = np.asarray(ground.convert("RGB").resize((256, 256), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(decode.to_square(image, replace(WINDOW, size=256)), wanted)
