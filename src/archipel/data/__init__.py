"""Clips from where people have them: sources, decoding, captions, splits, and the stage that reads them in."""

from __future__ import annotations

import numpy as np

from archipel.config import Clips
from archipel.data.base import Item, Rejected, Source, Window
from archipel.progress import StopFlag

__all__ = ["Item", "Rejected", "Source", "Window", "count_items", "decode_bytes", "open_source"]


def open_source(clips: Clips, seed: int, stop: StopFlag | None = None) -> Source:
    """The source that ``run.toml`` names. Paths are looked at now, downloads begin with ``items()``.

    Raises ArchipelError where the path is not there, is an address or a command, or a needed package is missing.
    """
    if clips.source == "shapes":
        from archipel.data.shapes import Shapes

        return Shapes(clips.count, seed)
    if clips.source == "fluent-emoji":
        from archipel.data.fluent_emoji import FluentEmoji

        return FluentEmoji(clips, stop)
    if clips.source == "folder":
        from archipel.data.folder import Folder

        return Folder(clips.path, clips.license)
    if clips.source == "webdataset":
        from archipel.data.webdataset import WebDataset

        return WebDataset(clips.path, clips.license)
    from archipel.data.huggingface import HuggingFace

    return HuggingFace(clips)


def count_items(clips: Clips) -> int | None:
    """How many clips the source can give at most, where that is cheap to know; nothing is fetched.

    Also the moment to refuse a path that is not there: raises what ``open_source`` raises.
    """
    if clips.source == "shapes":
        from archipel.data.shapes import DEFAULT_COUNT

        return clips.count or DEFAULT_COUNT
    if clips.source == "fluent-emoji":
        from archipel.data.fluent_emoji import known_count

        count: int | None = known_count(clips)
    else:
        source = open_source(clips, 0)
        counter = getattr(source, "count", None)
        count = counter() if counter is not None else None
    if count is not None and clips.count:
        return min(count, clips.count)
    return count


def decode_bytes(source: str, data: bytes, window: Window) -> np.ndarray:
    """What the source of that name makes of a clip's bytes, without the source: uint8 (P * F, H, W, 3). Raises Rejected."""
    if source == "shapes":
        from archipel.data.shapes import draw_bytes

        return draw_bytes(data, window)
    from archipel.data.decode import decode_clip

    return decode_clip(data, window)
