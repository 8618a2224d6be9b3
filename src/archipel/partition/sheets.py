"""Contact sheets: what a cluster is about, at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from archipel import store
from archipel.manifest import Clip

CLIPS = 12
CAPTIONS = 20
_COLUMNS = 4
_CELL = 96  # least side of a frame on the sheet, in pixels
_GAP = 6


def closest(clips: Sequence[Clip], cluster: np.ndarray, distance: np.ndarray, which: int, count: int) -> list[int]:
    """Rows of a cluster's training clips by distance to its centroid, one per content group, at most ``count``."""
    rows = np.flatnonzero(np.asarray(cluster) == which)
    chosen: dict[str, int] = {}
    for row in rows[np.lexsort((rows, np.asarray(distance)[rows]))].tolist():
        if clips[row].split == "train":
            chosen.setdefault(clips[row].group, row)
        if len(chosen) == count:
            break
    return list(chosen.values())


def draw(frames: np.ndarray, path: Path) -> None:
    """A PNG of clips' first and middle frames side by side: frames uint8 (N, 2, H, W, 3)."""
    from PIL import Image

    count, _, height, width = frames.shape[:4]
    factor = max(1, -(-_CELL // height))
    tall, wide = height * factor, width * factor
    columns = min(_COLUMNS, count)
    across, down = columns * (2 * wide + _GAP) + _GAP, -(-count // columns) * (tall + _GAP) + _GAP
    sheet = Image.new("RGB", (across, down), "#d8d8d8")
    for place, pair in enumerate(frames):
        left, top = _GAP + place % columns * (2 * wide + _GAP), _GAP + place // columns * (tall + _GAP)
        for side, frame in enumerate(pair):
            # Nearest by a whole factor: shows the pixels that there are, and is the same everywhere.
            picture = Image.fromarray(np.ascontiguousarray(frame)).resize((wide, tall), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + side * wide, top))
    with store.aside(path) as temporary:
        sheet.save(temporary, format="PNG")


def write_sheets(
    folder: Path, pixels: Any, clips: Sequence[Clip], cluster: np.ndarray, distance: np.ndarray, k: int
) -> list[str]:
    """``sheet-<k>.png`` and ``captions.json``; returns their names. pixels: rows of uint8 (F, H, W, 3).

    captions.json: {"0": [{"caption", "id", "distance"}, ...], ...}, nearest first, one per content group.
    """
    captions, names = {}, []
    for which in range(k):
        rows = closest(clips, cluster, distance, which, CAPTIONS)
        captions[str(which)] = [
            {"caption": clips[row].caption, "id": clips[row].id, "distance": round(float(distance[row]), 6)}
            for row in rows
        ]
        chosen = np.stack([np.asarray(pixels[row]) for row in rows[:CLIPS]])
        names.append(f"sheet-{which}.png")
        draw(chosen[:, [0, chosen.shape[1] // 2]], folder / names[-1])
    store.write_json(folder / "captions.json", captions)
    return [*names, "captions.json"]
