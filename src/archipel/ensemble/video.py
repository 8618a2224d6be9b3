"""Clips as files: MP4 (H.264), animated WebP and GIF, or a folder of PNG frames. Same clip, same build, same bytes."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from archipel import store
from archipel.ensemble import provenance
from archipel.ensemble.provenance import Note
from archipel.errors import ArchipelError

Resample = Literal["nearest", "bicubic"]
MAX_SIDE = 8192


def check(clip: np.ndarray, fps: float) -> None:
    """Raise ArchipelError where ``clip`` is not uint8 (F, H, W, 3) with at least one frame, or fps is not above 0."""
    if clip.ndim != 4 or clip.shape[3] != 3 or clip.dtype != np.uint8 or min(clip.shape) < 1:
        raise ArchipelError(f"a clip is uint8 (frames, height, width, 3), not {clip.dtype} {clip.shape}")
    if not 0 < fps <= 1000:
        raise ArchipelError(f"fps = {fps} cannot be written: give a number above 0, at most 1000")


def enlarge(clip: np.ndarray, scale: int, resample: Resample = "nearest") -> np.ndarray:
    """Enlarge uint8 (F, H, W, 3) by a whole number, so that small clips can be seen. ``nearest`` keeps the pixels.

    Raises ArchipelError for a scale below 1, sides above 8192, or an unknown way to resample.
    """
    if resample not in ("nearest", "bicubic"):
        raise ArchipelError(f"resample = {resample!r} is not known: nearest or bicubic")
    if scale < 1 or scale != int(scale):
        raise ArchipelError(f"scale = {scale} must be a whole number of 1 or more")
    height, width = clip.shape[1] * scale, clip.shape[2] * scale
    if max(height, width) > MAX_SIDE:
        raise ArchipelError(f"scale = {scale} makes frames of {width}x{height}; the largest side is {MAX_SIDE}")
    if scale == 1:
        return clip
    if resample == "nearest":
        return clip.repeat(scale, axis=1).repeat(scale, axis=2)
    from PIL import Image

    wanted = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height), wanted)) for frame in clip])


def _even(clip: np.ndarray) -> np.ndarray:
    """Repeat the last row or column where a side is odd: H.264 with 4:2:0 colour needs even sides."""
    return np.pad(clip, ((0, 0), (0, clip.shape[1] % 2), (0, clip.shape[2] % 2), (0, 0)), mode="edge")


def _mp4(path: Path, clip: np.ndarray, fps: float, note: Note | None = None) -> None:
    import av

    if "libx264" not in av.codecs_available:
        raise ArchipelError("this build of PyAV has no H.264 encoder: write .webp or .gif, or install PyAV's own wheel")
    frames = _even(clip)
    rate = Fraction(fps).limit_denominator(1001)
    flags = {"fflags": "+bitexact", "movflags": "+faststart"}  # bitexact: no version or date in the file
    with av.open(str(path), "w", format="mp4", container_options=flags) as container:
        if note is not None:
            container.metadata["comment"] = provenance.text(note)
        stream: Any = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.options = {"crf": "12", "preset": "medium", "threads": "1", "flags": "+bitexact"}
        stream.codec_context.thread_count = 1  # slices over threads would make bytes depend on the machine's cores
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())


def _pillow(path: Path, clip: np.ndarray, fps: float, kind: str, **options: Any) -> None:
    from PIL import Image

    frames = [Image.fromarray(frame) for frame in clip]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        kind,
        save_all=True,
        append_images=frames[1:],
        duration=_durations(len(frames), fps, kind),
        loop=0,
        **options,
    )
    path.write_bytes(buffer.getvalue())


def _durations(frames: int, fps: float, kind: str) -> list[int]:
    """Milliseconds per frame, rounded so that errors do not add up; GIF counts in hundredths of a second, from 2."""
    unit = 10 if kind == "GIF" else 1
    edges = [round(i * 1000 / fps / unit) for i in range(frames + 1)]
    return [max(after - before, 2 if kind == "GIF" else 1) * unit for before, after in itertools.pairwise(edges)]


def _webp(path: Path, clip: np.ndarray, fps: float, note: Note | None = None, lossless: bool = True) -> None:
    # A frame that equals the one before it is stored by libwebp as a longer frame: it looks the same when played.
    more = {} if note is None else {"xmp": provenance.xmp(note)}
    options = {"quality": 80, "method": 4, "minimize_size": False, "allow_mixed": False}
    _pillow(path, clip, fps, "WEBP", lossless=lossless, **options, **more)


def _gif(path: Path, clip: np.ndarray, fps: float, note: Note | None = None) -> None:
    from PIL import Image

    # One palette for all frames (colours would flicker otherwise), from all frames side by side.
    strip = Image.fromarray(np.concatenate(list(clip), axis=1))
    palette = strip.quantize(256, method=Image.Quantize.MEDIANCUT)
    frames = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in clip]
    frames[0].save(
        path,
        "GIF",
        save_all=True,
        append_images=frames[1:],
        duration=_durations(len(frames), fps, "GIF"),
        loop=0,
        optimize=False,
        disposal=1,
        **({} if note is None else {"comment": provenance.text(note).encode("ascii")}),
    )


_WRITERS: dict[str, Callable[[Path, np.ndarray, float, Note | None], None]] = {
    ".mp4": _mp4,
    ".webp": _webp,
    ".gif": _gif,
}


def frame_name(number: int) -> str:
    return f"frame-{number:04d}.png"


def _frames(folder: Path, clip: np.ndarray, note: Note | None = None) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if folder.is_file():
        raise ArchipelError(f"{folder} is a file: frames go into a folder; choose another name")
    others = [p.name for p in folder.iterdir() if not p.match("frame-*.png")] if folder.exists() else []
    if others:
        raise ArchipelError(f"{folder} holds other files ({others[0]}): frames go into a folder of their own")
    names = [frame_name(number) for number in range(len(clip))]
    about = PngInfo()
    if note is not None:
        about.add_text("Comment", provenance.text(note))
    for name, frame in zip(names, clip, strict=True):
        with store.aside(folder / name) as temporary:
            Image.fromarray(frame).save(temporary, "PNG", pnginfo=about)
    for left in set(folder.glob("frame-*.png")) - {folder / name for name in names}:
        left.unlink()  # of a longer clip written here before


def check_name(path: Path) -> None:
    """Raise ArchipelError where no file of this name can be written; to be asked before any work is done."""
    if path.suffix.lower() not in _WRITERS and path.suffix:
        raise ArchipelError(
            f"{path}: clips are written as {', '.join(_WRITERS)}, or as PNG frames into a folder (a name without a suffix); "
            f"not as {path.suffix}"
        )
    if path.suffix and path.is_dir():
        raise ArchipelError(f"{path} is a folder: give the name of a file")


def write(
    path: Path | str,
    clip: np.ndarray,
    fps: float,
    *,
    scale: int = 1,
    resample: Resample = "nearest",
    lossless: bool = True,
    note: Note | None = None,
) -> Path:
    """Write uint8 (F, H, W, 3) as the suffix says: .mp4, .webp, .gif; without a suffix a folder of PNG frames.

    Written aside and renamed, so a reader never sees half a file, and what was there is kept when writing fails.
    ``lossless`` is for WebP. ``note``: what the file's metadata say (see ``provenance``).
    MP4 is H.264 in yuv420p; an odd side gets its last row or column twice.
    Raises ArchipelError for an unknown suffix (naming those that work), an unusable clip, or a place that cannot be
    written to.
    """
    path = Path(path)
    check_name(path)
    check(clip, fps)
    large = enlarge(clip, scale, resample)
    try:
        if not path.suffix:
            _frames(path, large, note)
        else:
            with store.aside(path) as temporary:
                if path.suffix.lower() == ".webp":
                    _webp(temporary, large, fps, note, lossless)
                else:
                    _WRITERS[path.suffix.lower()](temporary, large, fps, note)
    except OSError as error:
        raise ArchipelError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def names_of(path: Path | str, count: int) -> list[Path]:
    """Where ``count`` clips go: ``path`` itself for one; ``clip-000.mp4``, ``clip-001.mp4``, ... for several."""
    path = Path(path)
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number:03d}{path.suffix}") for number in range(count)]


def write_clips(
    path: Path | str,
    clips: np.ndarray,
    fps: float,
    *,
    scale: int = 1,
    notes: Sequence[Note] | None = None,
    skip: Collection[int] = (),
) -> list[Path]:
    """Write clips uint8 (N, F, H, W, 3) under the names of ``names_of``, with a note each, and return those.

    ``skip``: rows that are left out. Errors as ``write``.
    """
    names = names_of(path, len(clips))
    told = [None] * len(names) if notes is None else notes
    whole = [one for row, one in enumerate(zip(names, clips, told, strict=True)) if row not in skip]
    return [write(name, clip, fps, scale=scale, note=note) for name, clip, note in whole]


def grid(clips: np.ndarray, gap: int = 1) -> np.ndarray:
    """One clip uint8 (F, H', W', 3) of clips (N, F, H, W, 3) side by side, row by row, as near to a square as N allows.

    ``gap``: pixels between them, in black, as are the places that stay empty. Raises ArchipelError where it gets too large.
    """
    if clips.ndim != 5 or len(clips) < 1:
        raise ArchipelError(f"a grid is made of clips uint8 (N, frames, height, width, 3), not of {clips.shape}")
    columns = math.ceil(math.sqrt(len(clips)))
    rows = math.ceil(len(clips) / columns)
    F, H, W = clips.shape[1:4]
    height, width = rows * (H + gap) - gap, columns * (W + gap) - gap
    if max(height, width) > MAX_SIDE:
        raise ArchipelError(f"a grid of {len(clips)} clips has {width}x{height} pixels; the largest side is {MAX_SIDE}")
    made = np.zeros((F, height, width, 3), np.uint8)
    for number, clip in enumerate(clips):
        y, x = (number // columns) * (H + gap), (number % columns) * (W + gap)
        made[:, y : y + H, x : x + W] = clip
    return made
