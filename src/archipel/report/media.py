"""Pictures of the report as data URIs: animated WebP for clips, still WebP for frames and contact sheets."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np


def _uri(data: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(data).decode("ascii")


def _shrunk(image: Any, longest: int) -> Any:
    from PIL import Image

    scale = longest / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _frames(clip: np.ndarray, longest: int) -> list[Any]:
    from PIL import Image

    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.shape[0] < 1 or clip.dtype != np.uint8:
        raise ValueError(f"a clip is uint8 (F, H, W, 3), not {clip.dtype} {clip.shape}")
    return [_shrunk(Image.fromarray(np.ascontiguousarray(frame)), longest) for frame in clip]


def clip_uri(clip: np.ndarray, fps: float, *, longest: int = 160, quality: int = 82) -> str:
    """An endlessly looping animated WebP of ``clip``, uint8 (F, H, W, 3), at most ``longest`` pixels a side.

    Raises ValueError where it is not such an array.
    """
    frames = _frames(clip, longest)
    out = io.BytesIO()
    frames[0].save(
        out,
        "WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=max(20, round(1000 / fps)) if fps > 0 else 250,
        loop=0,
        quality=quality,
        method=4,
    )
    return _uri(out.getvalue())


def still_uri(clip: np.ndarray, *, longest: int = 160, quality: int = 82) -> str:
    """The clip's middle frame, for people who want no motion."""
    frames = _frames(clip[clip.shape[0] // 2 : clip.shape[0] // 2 + 1], longest)
    out = io.BytesIO()
    frames[0].save(out, "WEBP", quality=quality, method=4)
    return _uri(out.getvalue())


def sheet_uri(path: Path, *, longest: int = 640, quality: int = 80) -> tuple[str, int, int]:
    """A picture file as a WebP data URI, with its width and height. Raises OSError where it is no picture."""
    from PIL import Image

    with Image.open(path) as opened:
        image = _shrunk(opened.convert("RGB"), longest)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=quality, method=4)
    return _uri(out.getvalue()), image.width, image.height
