"""clips.phases: further windows of a loop, shifted evenly, for training only."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
from PIL import Image

from archipel.config import Clips
from archipel.data.base import Window
from archipel.data.decode import decode_clip
from archipel.data.shapes import draw, recipes

WINDOW = Window.from_config(Clips(frames=2, fps=10, size=8))


def loop(levels: list[int]) -> bytes:
    """An animated WebP of 0.1 s a frame, frame i all of grey level ``levels[i]``."""
    frames = [Image.new("RGB", (8, 8), (level,) * 3) for level in levels]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=100, lossless=True, loop=0)
    return file.getvalue()


def test_windows_are_shifted_by_equal_parts_of_the_loop() -> None:
    data = loop([0, 40, 80, 120, 160, 200])
    made = decode_clip(data, replace(WINDOW, phases=3)).reshape(3, 2, 8, 8, 3)[:, :, 0, 0, 0]
    np.testing.assert_allclose(made, [[0, 40], [80, 120], [160, 200]], atol=1)


def test_windows_wrap_around() -> None:
    data = loop([0, 50, 100])
    made = decode_clip(data, replace(WINDOW, frames=3, phases=3)).reshape(3, 3, 8, 8, 3)[:, :, 0, 0, 0]
    np.testing.assert_allclose(made, [[0, 50, 100], [50, 100, 0], [100, 0, 50]], atol=1)


def test_the_first_window_is_the_one_without_phases() -> None:
    data = loop([10, 60, 110, 160])
    np.testing.assert_array_equal(decode_clip(data, replace(WINDOW, phases=4))[:2], decode_clip(data, WINDOW))
    recipe = recipes(4, 0)[2]
    drawn = draw(recipe, replace(WINDOW, phases=2))
    assert drawn.shape == (4, 8, 8, 3)
    np.testing.assert_array_equal(drawn[:2], draw(recipe, WINDOW))
