"""Sample sheets as one animated WebP: captions down, arms across, with their names, within a number of bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

LEFT, TOP, GAP = 150, 46, 4
LARGEST = 1_000_000  # bytes of one sheet


def _font(size: int) -> Any:
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size)
    except (TypeError, OSError):  # a Pillow without FreeType knows one size
        return ImageFont.load_default()


def _wrapped(draw: Any, text: str, font: Any, width: float, most: int) -> list[str]:
    """``text`` in at most ``most`` lines of ``width`` pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and draw.textlength(longer, font=font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " …"]
    for place, line in enumerate(lines):
        while len(line) > 2 and draw.textlength(line, font=font) > width:
            line = line[:-2] + "…"
        lines[place] = line
    return lines


def _words(captions: Sequence[str], names: Sequence[str], side: int) -> Any:
    """The sheet without clips: names on top, captions on the left."""
    from PIL import Image, ImageDraw

    step = side + GAP
    sheet = Image.new("RGB", (LEFT + step * len(names), TOP + step * len(captions)), "white")
    draw = ImageDraw.Draw(sheet)
    small, font = _font(11), _font(12)
    for place, name in enumerate(names):
        for line, text in enumerate(_wrapped(draw, name, small, side, 3)):
            draw.text((LEFT + step * place, 4 + 13 * line), text, fill="#14242b", font=small)
    for place, caption in enumerate(captions):
        for line, text in enumerate(_wrapped(draw, caption, font, LEFT - 12, max(1, side // 15))):
            draw.text((6, TOP + step * place + 4 + 14 * line), text, fill="#14242b", font=font)
    return sheet


def _composed(words: Any, clips: Sequence[np.ndarray], rows: int, side: int) -> list[Any]:
    """One picture per frame."""
    from PIL import Image

    frames = []
    for frame in range(max(clip.shape[1] for clip in clips)):
        sheet = words.copy()
        for column, clip in enumerate(clips):
            for row in range(min(rows, len(clip))):
                picture = Image.fromarray(np.ascontiguousarray(clip[row, frame % clip.shape[1]]))
                resample = Image.Resampling.NEAREST if picture.width <= side else Image.Resampling.LANCZOS
                place = (LEFT + (side + GAP) * column, TOP + (side + GAP) * row)
                sheet.paste(picture.resize((side, side), resample), place)
        frames.append(sheet)
    return frames


def sheet(captions: Sequence[str], names: Sequence[str], clips: Sequence[np.ndarray], fps: float) -> bytes:
    """An endlessly looping WebP of at most LARGEST bytes: clips uint8 (M, F, H, W, 3), one array per name.

    Small clips are shown with whole pixels, twice or more their size. Quality, then size, then captions (from the
    last one) give way until it is small enough. Raises ValueError where there is nothing to show.
    """
    if not captions or not clips:
        raise ValueError("there are no clips to show")
    own = int(clips[0].shape[2])
    rows, size = len(captions), max(1, round(96 / own)) * own if own < 96 else min(own, 128)
    while True:
        frames = _composed(_words(captions[:rows], names, size), clips, rows, size)
        for quality in (82, 70, 55, 40):
            out = io.BytesIO()
            settings = {"duration": max(20, round(1000 / fps)) if fps > 0 else 125, "loop": 0, "quality": quality}
            frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], method=4, **settings)
            if out.tell() <= LARGEST:
                return out.getvalue()
        if size > 64:
            size = max(64, size // 2)
        elif rows > 1:
            rows -= 1
        else:
            return out.getvalue()
