"""Any two folders of clips: distances between them, without a run, captions or content groups.

Files are decoded and measured a few at a time; what is kept of a clip is its features, never its frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from archipel import store
from archipel.data.base import (
    VIDEO_SUFFIXES,
    Item,
    Rejected,
    Window,
    existing_folder,
    printable,
)
from archipel.data.decode import decode_clip, motion_of, video_length
from archipel.data.folder import find_videos, read_clip
from archipel.errors import ArchipelError, Stopped
from archipel.evaluation import distances, intervals, pairs
from archipel.evaluation.intervals import FEW_GROUPS, Interval
from archipel.evaluation.protocol import Protocol
from archipel.progress import Progress, StopFlag

if TYPE_CHECKING:
    from archipel.evaluation.extractors import Judges

SUFFIXES = (*VIDEO_SUFFIXES, ".avi", ".m4v", ".mkv")
MOST_FRAMES = 16
HALVINGS = 8
MAX_REJECTED = 0.1
_CLIPS, _BYTES = (
    16,
    64 << 20,
)  # measured at a time: at most so many clips, and not much more than so many bytes of frames
_NAMED = 5  # unreadable files that an error or a note names

Measure = Callable[[np.ndarray, Sequence[str]], Mapping[str, np.ndarray]]


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipSet:
    """What is kept of a folder: clip for clip the item, sha256 of the file, features (N, D) by extractor, motion (N,).

    ``rejected``: (file, reason) of what could not be used.
    """

    label: str
    root: Path
    items: list[Item]
    sha256: list[str]
    features: dict[str, np.ndarray]
    motion: np.ndarray
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def identity(self, window: Window) -> str:
        """sha256 of the clips' bytes and of how frames were cut out of them; names of files play no part."""
        return store.sha256_json({"clips": sorted(self.sha256), "window": window.spec()})

    def facts(self, window: Window) -> dict[str, Any]:
        unreadable = [{"file": name, "reason": reason} for name, reason in self.rejected]
        facts = {"folder": self.root.name, "clips": len(self), "sha256": self.identity(window)}
        return {**facts, "motion": float(self.motion.mean()), "unreadable": unreadable}


def folder_of_clips(path: Path, label: str) -> Path:
    """The folder, resolved. Raises ArchipelError where it is not there, no folder, or holds no clips by name."""
    root = existing_folder(str(path), label).resolve()
    if not find_videos(root, SUFFIXES):
        raise ArchipelError(
            f"{label} = '{path}' holds no clips: files ending in {', '.join(sorted(SUFFIXES))} are read"
        )
    return root


def two_folders(first: Path, second: Path) -> tuple[Path, Path]:
    """Both folders, resolved. Raises ArchipelError as ``folder_of_clips``, and where they are one or within each other."""
    a, b = folder_of_clips(first, "FOLDER_A"), folder_of_clips(second, "FOLDER_B")
    if a == b:
        raise ArchipelError(f"FOLDER_A and FOLDER_B are the same folder, {a}: give two")
    for inner, outer in ((a, b), (b, a)):
        if inner.is_relative_to(outer):
            raise ArchipelError(f"{inner} lies within {outer}, whose clips would include its own: give two apart")
    return a, b


def read_folder(
    root: Path,
    label: str,
    items: Sequence[Item],
    window: Window,
    measure: Measure,
    *,
    max_rejected: float = MAX_REJECTED,
    stop: StopFlag | None = None,
) -> ClipSet:
    """Decode and measure the items' files, a few at a time. ``key`` of an item is its path below ``root``.

    Raises ArchipelError where more than ``max_rejected`` of them cannot be used, or features are not finite; Stopped.
    """
    kept: list[Item] = []
    hashes: list[str] = []
    rejected: list[tuple[str, str]] = []
    motion: list[float] = []
    parts: dict[str, list[np.ndarray]] = {}
    clips: list[np.ndarray] = []
    most = max(1, min(_CLIPS, _BYTES // (window.frames * window.size**2 * 3)))

    def flush() -> None:
        captions = [item.caption or "" for item in kept[len(kept) - len(clips) :]]
        for name, rows in measure(np.stack(clips), captions).items():
            parts.setdefault(name, []).append(np.asarray(rows, np.float32))
        clips.clear()

    with Progress(f"{label}: features", len(items)) as bar:
        for item in items:
            if stop:
                raise Stopped(
                    f"measuring {root.name} was interrupted; nothing was written", interrupted=bool(stop.signal)
                )
            try:
                if item.error is not None:
                    raise Rejected(item.error)
                data = read_clip(root, Path(item.key))
                clips.append(decode_clip(data, window))
            except Rejected as rejection:
                rejected.append((item.key, rejection.reason))
            else:
                kept.append(item)
                hashes.append(store.sha256_bytes(data))
                motion.append(motion_of(clips[-1]))
                if len(clips) == most:
                    flush()
            bar.advance()
        if clips:
            flush()
    _check_rejected(root, label, len(items), rejected, max_rejected)
    features = {name: np.concatenate(rows) for name, rows in parts.items()}
    for name, table in features.items():
        bad = np.flatnonzero(~np.isfinite(table).all(1))
        if len(bad):
            raise ArchipelError(
                f"{root / kept[bad[0]].key}: {name} gives numbers that are not finite; remove this clip"
            )
    return ClipSet(label, root, kept, hashes, features, np.asarray(motion), rejected)


def _check_rejected(root: Path, label: str, count: int, rejected: list[tuple[str, str]], limit: float) -> None:
    if not rejected or (len(rejected) <= limit * count and len(rejected) < count):
        return
    raise ArchipelError(
        f"{len(rejected)} of {count} clips of {label} ({root}) cannot be used, more than the share of {limit:g} that "
        f"is allowed: {naming(rejected)}. Repair or remove them, or allow more with --max-rejected"
    )


def naming(rejected: Sequence[tuple[str, str]]) -> str:
    """The first few of (file, reason), and how many more there are."""
    named = "; ".join(f"{name} ({reason})" for name, reason in rejected[:_NAMED])
    more = len(rejected) - _NAMED
    return named + (f"; and {more} more" if more > 0 else "")


def items_of(root: Path) -> list[Item]:
    """Every clip below ``root``, without captions, each a content group of its own."""
    keys = (path.as_posix() for path in find_videos(root, SUFFIXES))
    return [Item(key, None, printable(key)) for key in keys]


def common_frames(folders: Sequence[tuple[Path, Sequence[Item]]], fps: float, max_rejected: float) -> int:
    """The most frames, up to 16, that nearly every video of each folder is long enough for at ``fps``.

    Loops (WebP, GIF, animated PNG) have any number. A few short videos (half the share that may be rejected) do not
    shorten the window of all others.
    """
    frames = MOST_FRAMES
    for root, items in folders:
        held = sorted(_frames_held(root, item, fps) for item in items)
        frames = min(frames, held[int(len(held) * max_rejected / 2)])
    return max(frames, 1)


def _frames_held(root: Path, item: Item, fps: float) -> int:
    try:
        length = video_length(read_clip(root, Path(item.key)))
    except Rejected:
        return MOST_FRAMES  # told when it is decoded
    if length is None:
        return MOST_FRAMES
    # A millisecond less: so much may timestamps be off, and the decoder wants the last frame to end behind its time.
    return max(1, math.ceil((length - Fraction(1, 1000)) * Fraction(fps).limit_denominator(10**6)))


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One score of two folders: ``b`` held against ``a``."""

    arm: str
    metric: str
    interval: Interval
    protocol: Protocol

    def as_dict(self) -> dict[str, Any]:
        """As the rows of ``scores/<split>.json``; bounds that could not be computed are null."""
        values = {key: value if np.isfinite(value) else None for key, value in self.interval.as_dict().items()}
        count = {"n": self.protocol.n, "groups": self.protocol.groups}
        return {"arm": self.arm, "metric": self.metric, **values, **count, "protocol": self.protocol.as_dict()}


BOTH, HALF, FLOOR = "B against A", "half of B against half of A", "half of A against half of A"


def score(
    a: ClipSet, b: ClipSet, window: Window, identity: Mapping[str, Mapping[str, Any]], seed: int = 0
) -> list[Row]:
    """FD and unbiased KID of ``b`` against ``a`` for every extractor, and FD at the N of a's real floor beside it.

    identity: of the extractors to score, as ``Judges.identity``; FD bears the name that it allows.
    """
    return [row for name in identity for row in _scores(name, a, b, window, identity[name], seed)]


def _scores(name: str, a: ClipSet, b: ClipSet, window: Window, identity: Mapping[str, Any], seed: int) -> Iterator[Row]:
    one, two = a.features[name], b.features[name]

    def protocol(estimator: str, n: int, reference: int) -> Protocol:
        return Protocol(
            estimator=estimator,
            extractor=name,
            weights=str(identity["weights"]),
            layer=str(identity["layer"]),
            resize=int(identity["resize"]),
            frames=min(int(identity["frames"]) or window.frames, window.frames),
            n=n,
            clips=a.identity(window),
            reference=reference,
            groups=n,
            divisor=distances.DIVISOR if estimator.startswith("frechet") else "",
            split="",
            prompts="",
        )

    bounds = intervals.jackknife(pairs.frechet_left_out(one, two, seed=seed))
    bounds = Interval(bounds.value, max(bounds.low, 0.0) if np.isfinite(bounds.low) else bounds.low, bounds.high)
    yield Row(BOTH, str(identity["metric"]), bounds, protocol("frechet, all features, all clips", len(b), len(a)))
    if min(len(a) // 2, len(b)) >= 2:
        floor, same, h = pairs.frechet_halves(one, two, HALVINGS, seed)
        said = f"frechet, all features, mean and spread of {HALVINGS} draws of halves"
        for arm, values in ((HALF, same), (FLOOR, floor)):
            spread = Interval(float(values.mean()), float(values.min()), float(values.max()))
            yield Row(arm, str(identity["metric"]), spread, protocol(said, h, h))
    kid = intervals.jackknife(pairs.kid_left_out(one, two))
    yield Row(BOTH, f"KID-{name}", kid, protocol("kid, unbiased, all pairs of clips", len(b), len(a)))


def notes(a: ClipSet, b: ClipSet, rows: Sequence[Row]) -> list[str]:
    """Sentences that belong under the table."""
    said = [
        "no content groups are known for folders: every clip counts as its own, so that intervals are too narrow where "
        "clips of a folder depend on each other",
        f"covariances are divided by {distances.DIVISOR}; FD grows as clips get fewer: only values of one N compare, and the "
        "floor (A against A) goes with the value of as many clips beside it; KID has no such bias, its floor is 0",
    ]
    if min(len(a), len(b)) < FEW_GROUPS:
        said.insert(
            0, f"too few clips to conclude: {len(a)} and {len(b)}, at least {FEW_GROUPS} are needed on either side"
        )
    shared = len(set(a.sha256) & set(b.sha256))
    if shared:
        said.append(f"{shared} clips are in both folders, byte for byte: the sets are not independent")
    for one in (a, b):
        again = len(one) - len(set(one.sha256))
        if again:
            said.append(f"{one.label} holds {again} clips more than once, byte for byte")
        still = int((one.motion == 0).sum())
        if still:
            said.append(f"{still} of {len(one)} clips of {one.label} do not move at all")
        if one.rejected:
            said.append(f"{len(one.rejected)} clips of {one.label} could not be used: {naming(one.rejected)}")
    if not any(row.arm == FLOOR for row in rows):
        said.append("no real floor: it needs 4 clips in A and 2 in B")
    return said


def compare(
    first: Path,
    second: Path,
    judges: Judges,
    *,
    frames: int = 0,
    fps: float = 8.0,
    size: int = 224,
    crop: str = "center",
    background: tuple[int, int, int] = (255, 255, 255),
    max_rejected: float = MAX_REJECTED,
    stop: StopFlag | None = None,
) -> dict[str, Any]:
    """Two folders -> {"a", "b", "window", "divisor", "scores", "notes"}, ready for JSON.

    ``frames`` 0: what nearly all clips are long enough for, up to 16. Raises ArchipelError for folders that are missing,
    empty, the same or within each other, for too many clips that cannot be used, fewer than two clips, and clips that are
    too short for a judge.
    """
    roots = two_folders(first, second)
    found = [(root, items_of(root)) for root in roots]
    taken = frames or common_frames(found, fps, max_rejected)
    judges.require_frames(taken)
    identity = {name: judges.identity[name] for name in judges.features}
    window = Window(taken, fps, 0.0, size, crop, background)

    def measure(clips: np.ndarray, captions: Sequence[str]) -> Mapping[str, np.ndarray]:
        return judges.measure(clips, captions).features

    sets = []
    for label, (root, items) in zip("AB", found, strict=True):
        done = read_folder(root, label, items, window, measure, max_rejected=max_rejected, stop=stop)
        if len(done) < 2:
            raise ArchipelError(
                f"{root} gives {len(done)} clip: a distance between sets needs at least 2 on either side"
            )
        sets.append(done)
    rows = score(sets[0], sets[1], window, identity)
    return {
        "a": sets[0].facts(window),
        "b": sets[1].facts(window),
        "window": window.spec(),
        "divisor": distances.DIVISOR,
        "extractors": {name: dict(facts) for name, facts in identity.items()},
        "scores": [row.as_dict() for row in rows],
        "notes": notes(sets[0], sets[1], rows),
    }
