"""Sheets of generated clips with their captions: a still one, and a moving one of archipelago beside monolith.

Which captions are shown is a rule that was fixed before any clip was seen: see ``examples``. Same clips, same build: same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from archipel import store
from archipel.errors import ArchipelError
from archipel.manifest import read_manifest
from archipel.run import Run

RULE = "the first {count} training captions in the order of the sha256 of the caption's UTF-8 bytes"
_GAP, _LINE, _FONT = 8, 15, 12  # pixels: between cells, height of a line of text, size of its letters
_TRIES = ((96, 90), (96, 80), (96, 70), (96, 55), (96, 40), (64, 80), (64, 60), (64, 40), (64, 20))  # side, quality


def examples(run: Run, count: int = 20) -> list[str]:
    """The captions of the sheets. Nobody chose them: see ``RULE``."""
    captions = {clip.caption for clip in read_manifest(run.manifest) if clip.split == "train"}
    return sorted(captions, key=lambda caption: store.sha256_bytes(caption.encode()))[:count]


def still(clips: np.ndarray, captions: Sequence[str], path: Path, most: int) -> None:
    """Two frames of every clip uint8 (N, F, H, W, 3), the first and the one at half time, above the caption: a WebP picture of at
    most ``most`` bytes. Raises ArchipelError where none is small enough."""
    half = clips.shape[1] // 2

    def save(file: io.BytesIO, side: int, quality: int) -> None:
        cells = [_pair(clip[0], clip[half], side) for clip in clips]
        _image(_page(cells, captions, columns=4)).save(file, "WEBP", quality=quality, method=6)

    _smallest(path, most, save)


def moving(
    left: np.ndarray,
    right: np.ndarray,
    captions: Sequence[str],
    heads: tuple[str, str],
    fps: float,
    path: Path,
    most: int,
) -> None:
    """Clips uint8 (N, F, H, W, 3) of two models side by side above their caption, ``heads`` over the pairs: an animated WebP of at
    most ``most`` bytes. Raises ArchipelError where none is small enough."""

    def save(file: io.BytesIO, side: int, quality: int) -> None:
        pages = []
        for frame in range(left.shape[1]):
            cells = [_pair(a, b, side) for a, b in zip(left[:, frame], right[:, frame], strict=True)]
            pages.append(_image(_page(cells, captions, columns=4, heads=heads)))
        more = {"save_all": True, "append_images": pages[1:], "duration": round(1000 / fps), "loop": 0}
        pages[0].save(file, "WEBP", quality=quality, method=4, **more)

    _smallest(path, most, save)


def _smallest(path: Path, most: int, save: Callable[[io.BytesIO, int, int], None]) -> None:
    """The first of ``_TRIES`` that is small enough: the largest and best."""
    for side, quality in _TRIES:
        buffer = io.BytesIO()
        save(buffer, side, quality)
        if len(buffer.getvalue()) <= most:
            return store.write_bytes(path, buffer.getvalue())
    raise ArchipelError(f"{path.name} takes {len(buffer.getvalue())} bytes at the lowest quality, {most} are allowed")


def _pair(left: np.ndarray, right: np.ndarray, side: int) -> np.ndarray:
    """Two frames uint8 (H, W, 3) beside each other, each of ``side`` pixels."""
    return np.concatenate([_large(left, side), _white(side, 2), _large(right, side)], axis=1)


def _page(
    cells: Sequence[np.ndarray], captions: Sequence[str], columns: int, heads: tuple[str, str] | None = None
) -> np.ndarray:
    """Cells uint8 (h, w, 3) in rows of ``columns``, each above its caption in at most two lines: uint8 (H, W, 3) on white."""
    height, width = cells[0].shape[:2]
    columns = min(columns, len(cells))
    top, tall = (_LINE + 2 if heads else 0), height + 2 * _LINE + 2
    rows = math.ceil(len(cells) / columns)
    page = _white(top + rows * (tall + _GAP) - _GAP, columns * (width + _GAP) - _GAP)
    for number, cell in enumerate(cells):
        y, x = top + (number // columns) * (tall + _GAP), (number % columns) * (width + _GAP)
        page[y : y + height, x : x + width] = cell
    image = _image(page)
    draw, font = _pen(image)
    for number, caption in enumerate(captions):
        y, x = top + (number // columns) * (tall + _GAP) + height + 1, (number % columns) * (width + _GAP)
        for line in _lines(caption, width, font):
            draw.text((x + (width - font.getlength(line)) // 2, y), line, fill=(34, 34, 34), font=font)
            y += _LINE
    for column in range(columns if heads else 0):
        for half, head in enumerate(heads or ()):
            x = column * (width + _GAP) + half * (width // 2 + 1)
            draw.text((x + (width // 2 - font.getlength(head)) // 2, 0), head, fill=(110, 110, 110), font=font)
    return np.asarray(image)


def _lines(caption: str, width: int, font: Any) -> list[str]:
    """At most two lines of at most ``width`` pixels; what does not fit ends in an ellipsis."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > 2:
        lines = [lines[0], lines[1] + "…"]
    for number, line in enumerate(lines):
        short = line
        while font.getlength(short) > width and len(short) > 2:
            short = short.removesuffix("…")[:-1] + "…"
        lines[number] = short
    return lines


def _pen(image: Any) -> tuple[Any, Any]:
    from PIL import ImageDraw, ImageFont

    return ImageDraw.Draw(image), ImageFont.load_default(size=_FONT)


def _large(frame: np.ndarray, side: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(_image(frame).resize((side, side), Image.Resampling.BICUBIC))


def _white(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 255, np.uint8)


def _image(array: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(array))
