"""Reading clips in: every candidate is hashed, decoded to its window, and kept or rejected with a reason.

Two passes. The first reads bytes and finds what can be refused without decoding; its hashes are the address of the
second, which decodes into the cache and continues where it was interrupted.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import logging
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from archipel import cache, store
from archipel.config import check_count
from archipel.data import decode_bytes, open_source
from archipel.data.base import Item, Rejected, Source, Window, category, require
from archipel.data.decode import motion_of
from archipel.data.splits import assign_splits
from archipel.errors import ArchipelError, MissingStageError
from archipel.manifest import SPLITS, Clip, Split, write_manifest
from archipel.progress import Progress, StopFlag
from archipel.run import Run
from archipel.spread import Arrays, Spread, over_ranges, pack_json, unpack_json

logger = logging.getLogger("archipel")

CODE_VERSION = 1  # of everything between bytes and frames: another number is another cache entry
_PER_SHARD = 32
_REASONS = "rejected.jsonl"  # reasons found while decoding, kept for the time that the work may be interrupted


@dataclass(frozen=True)
class Candidate:
    """An item whose bytes were read: ``sha256`` of them, in hex."""

    item: Item
    sha256: str


def ingest(run: Run, stop: StopFlag, spread: Spread | None = None) -> None:
    """Write the pixels into the cache, ``clips/manifest.parquet``, ``clips/rejected.csv`` and the card of ``clips/``.

    Does nothing where it is done. With ``spread`` clips are read here and decoded on other machines.
    Raises Stopped; ArchipelError where there are no clips, where more than
    ``clips.max_rejected`` of them cannot be used, or where splits contradict groups; and what the source raises.
    """
    if _finished(run):
        return
    require("pyarrow")
    with store.lock(run.clips / ".lock", f"the clips of {run.root}"):
        source = open_source(run.config.clips, run.config.clips_seed, stop)
        items = _limit(source.items(), run)
        if not items:
            raise ArchipelError(f"clips.source = {source.name!r} gives no clips" + _hint(run))
        candidates, rejected = _scan(run, source, items, stop)
        _hold_to_limit(run, items, rejected)
        _splits(run, candidates)  # a conflict is told before the decoding, not after it
        entry = _decode_all(run, source, candidates, rejected, stop, spread)
        _hold_to_limit(run, items, rejected)
        _write(run, source, items, candidates, rejected, entry)


def _finished(run: Run) -> bool:
    if not run.done(run.clips):
        return False
    try:
        cache.open_kind(run.cache, "pixels")
    except MissingStageError:
        return False
    return True


def _hint(run: Run) -> str:
    if run.config.clips.source == "folder":
        return f": {run.config.clips.path} holds no .mp4, .webm, .mov, .gif, .webp or .png"
    return f" ({run.config.clips.path})" if run.config.clips.path else ""


def _limit(items: Any, run: Run) -> list[Item]:
    """At most clips.count items, chosen by a hash of seed and name, in the source's order. A larger count holds every
    clip of a smaller one."""
    count = run.config.clips.count
    if not count or len(items) <= count or run.config.clips.source == "shapes":
        return list(items)
    seed = run.config.clips_seed
    usable = [item for item in items if not item.tolerated]
    ranked = sorted(usable, key=lambda item: store.sha256_bytes(f"{seed}:{item.key}".encode()))
    chosen = {item.key for item in ranked[:count]}
    return [item for item in items if item.key in chosen]


# --- first pass: bytes -----------------------------------------------------------------------------------------------


def _scan(run: Run, source: Source, items: list[Item], stop: StopFlag) -> tuple[list[Candidate], dict[str, str]]:
    """Candidates in the source's order, and the reasons of all others by key."""
    candidates: list[Candidate] = []
    rejected: dict[str, str] = {}
    seen: dict[str, str] = {}
    with Progress("prepare: reading clips", len(items)) as bar:
        for item in items:
            if stop:
                raise stop.error("prepare")
            bar.advance()
            try:
                if item.error:
                    raise Rejected(item.error)
                if not item.caption:
                    raise Rejected("no caption")
                data = source.read(item)
                if not data:
                    raise Rejected("no frames: the file is empty")
                digest = store.sha256_bytes(data)
                first = seen.setdefault(digest, item.key)
                if first != item.key:
                    raise Rejected(f"duplicate: the same bytes as {first}")
                candidates.append(Candidate(item, digest))
            except Rejected as rejection:
                rejected[item.key] = rejection.reason
    return candidates, rejected


# --- second pass: frames ---------------------------------------------------------------------------------------------


def _decode_all(
    run: Run,
    source: Source,
    candidates: list[Candidate],
    rejected: dict[str, str],
    stop: StopFlag,
    spread: Spread | None,
) -> cache.Entry | None:
    """Fill the cache; reasons found on the way go into ``rejected``. None where there was nothing to decode."""
    if not candidates:
        return None
    clips = run.config.clips
    window = Window.from_config(clips)
    known = {row["sha256"]: row["reason"] for row in store.read_jsonl(run.clips / _REASONS)}

    def keep(begin: int, made: Arrays) -> dict[str, np.ndarray]:
        for row, reason in unpack_json(made["reasons"]):
            digest = candidates[begin + row].sha256
            if known.get(digest) != reason:
                known[digest] = reason
                store.append_jsonl(run.clips / _REASONS, {"sha256": digest, "reason": reason})
        arrays = {name: array for name, array in made.items() if name != "reasons"}
        return {**arrays, "item": arrays["item"] + begin}

    def make(begin: int, end: int) -> dict[str, np.ndarray]:
        return keep(begin, _packed(_outcomes(source, candidates[begin:end], window, clips.min_motion), window))

    def make_all(ranges: Sequence[tuple[int, int]]) -> Generator[dict[str, np.ndarray], None, None]:
        assert spread is not None
        settings = {"source": source.name, "window": window.spec(), "min_motion": clips.min_motion}

        def give(begin: int, end: int) -> Arrays:
            return _bytes_of([_read(source, candidate) for candidate in candidates[begin:end]], settings)

        made = over_ranges(spread, make_clips, give, ranges, run.root, [])
        with contextlib.closing(made):
            for (begin, _), arrays in zip(ranges, made, strict=True):
                yield keep(begin, arrays)

    spec = _spec(candidates, window, clips.min_motion)
    entry = cache.build(
        run.cache, "pixels", spec, len(candidates), make, run_id=run.id, label="prepare: decoding clips", stop=stop,
        per_shard=_PER_SHARD, make_all=make_all if spread is not None else None,
    )  # fmt: skip
    kept = set(entry["item"][:].tolist())
    for row, candidate in enumerate(candidates):
        if row not in kept:
            reason = known.get(candidate.sha256)
            if reason is None:  # killed between the shard and its reasons, or the entry is another run's: ask again
                reason = next(_outcomes(source, [candidate], window, clips.min_motion))[1]
            rejected[candidate.item.key] = str(reason)
    return entry


def _spec(candidates: list[Candidate], window: Window, min_motion: float) -> dict[str, Any]:
    import av
    import PIL

    return {
        "code": CODE_VERSION,
        "clips": store.sha256_json([candidate.sha256 for candidate in candidates]),
        "window": window.spec(),
        "min_motion": min_motion,
        "decoders": {"pillow": PIL.__version__, "av": av.__version__},
    }


Outcome = np.ndarray | str  # a clip, or why there is none


def _read(source: Source, candidate: Candidate) -> bytes | str:
    """The clip's bytes, or why they cannot be had."""
    try:
        data = source.read(candidate.item)
    except Rejected as rejection:
        return rejection.reason
    if store.sha256_bytes(data) != candidate.sha256:
        return "changed: the file was replaced while it was read in"
    return data


def _decode(decode: Callable[[], np.ndarray], window: Window, min_motion: float) -> Outcome:
    try:
        clip = decode()
    except Rejected as rejection:
        return rejection.reason
    motion = motion_of(clip[: window.frames])
    if motion < min_motion:
        return f"static: motion {motion:.4f} is below {min_motion:g}"
    return clip


def _outcomes(
    source: Source, candidates: list[Candidate], window: Window, min_motion: float
) -> Iterator[tuple[int, Outcome]]:
    """(number, clip or reason) in order. Bytes are read one after the other, decoding goes side by side."""

    def decode(candidate: Candidate, data: bytes) -> Outcome:
        return _decode(lambda: source.decode(candidate.item, data, window), window, min_motion)

    pieces = ((_read(source, candidate), functools.partial(decode, candidate)) for candidate in candidates)
    return _side_by_side(pieces)


def _side_by_side(pieces: Iterable[tuple[bytes | str, Callable[[bytes], Outcome]]]) -> Iterator[tuple[int, Outcome]]:
    """(number, outcome) in order, decoded in a few threads; of the bytes at most eight clips' are held at a time."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        waiting: list[tuple[int, Any]] = []
        for number, (data, decode) in enumerate(pieces):
            waiting.append((number, data if isinstance(data, str) else pool.submit(decode, data)))
            if len(waiting) >= 8:
                first, result = waiting.pop(0)
                yield first, result if isinstance(result, str) else result.result()
        for number, result in waiting:
            yield number, result if isinstance(result, str) else result.result()


def _packed(outcomes: Iterator[tuple[int, Outcome]], window: Window) -> dict[str, np.ndarray]:
    """clips uint8 (n, F, H, W, 3), phases where there are any, item int64 (n,) and motion float32 (n,) of those that
    became clips, and as packed JSON the reasons of all others: [row, reason]."""
    kept, rows, motions, reasons = [], [], [], []
    for row, outcome in outcomes:
        if isinstance(outcome, str):
            reasons.append([row, outcome])
            continue
        kept.append(outcome)
        rows.append(row)
        motions.append(motion_of(outcome[: window.frames]))
    shape = (len(kept), window.phases, window.frames, window.size, window.size, 3)
    windows = (np.stack(kept) if kept else np.zeros(shape, np.uint8)).reshape(shape)
    more = {"phases": windows[:, 1:]} if window.phases > 1 else {}
    return {
        "clips": windows[:, 0],
        **more,
        "item": np.array(rows, np.int64),
        "motion": np.array(motions, np.float32),
        "reasons": pack_json(reasons),
    }


# --- the same on another machine: bytes go there, clips come back ----------------------------------------------------


def _bytes_of(clips: list[bytes | str], settings: dict[str, Any]) -> Arrays:
    whole = [clip if isinstance(clip, bytes) else b"" for clip in clips]
    return {
        "data": np.frombuffer(b"".join(whole), np.uint8),
        "ends": np.cumsum([len(clip) for clip in whole], dtype=np.int64),
        "about": pack_json({**settings, "unread": [None if isinstance(clip, bytes) else clip for clip in clips]}),
    }


def make_clips(root: Path, given: Arrays) -> Arrays:
    """Bytes of clips -> what became of them, as ``_packed`` says."""
    about, ends = unpack_json(given["about"]), given["ends"].tolist()
    window = Window(**{**about["window"], "background": tuple(about["window"]["background"])})

    def decode(data: bytes) -> Outcome:
        return _decode(lambda: decode_bytes(about["source"], data, window), window, about["min_motion"])

    def pieces() -> Iterator[tuple[bytes | str, Callable[[bytes], Outcome]]]:
        for begin, end, reason in zip([0, *ends], ends, about["unread"], strict=False):
            yield given["data"][begin:end].tobytes() if reason is None else reason, decode

    return _packed(_side_by_side(pieces()), window)


# --- what is written -------------------------------------------------------------------------------------------------


def _counted(items: list[Item], rejected: dict[str, str]) -> list[str]:
    """The reasons that count against clips.max_rejected, by the number of times they occur."""
    reasons = Counter(category(rejected[i.key]) for i in items if i.key in rejected and not i.tolerated)
    return [f"{reason} {count}" for reason, count in sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))]


def _hold_to_limit(run: Run, items: list[Item], rejected: dict[str, str]) -> None:
    """Raise ArchipelError, after writing rejected.csv, where too many clips cannot be used."""
    counted = [item for item in items if not item.tolerated]
    failed = sum(item.key in rejected for item in counted)
    limit = run.config.clips.max_rejected
    left = len(items) - len(rejected)
    if left and failed <= limit * len(counted):
        return
    _write_rejected(run, items, rejected)
    reasons = ", ".join(_counted(items, rejected)[:5]) or "all are stills, and clips.min_motion asks for motion"
    advice = (
        "repair or remove them" if not left else f"repair them, or allow more with clips.max_rejected (now {limit:g})"
    )
    raise ArchipelError(
        f"{failed} of {len(counted)} clips cannot be used: {reasons}. See {run.clips / 'rejected.csv'}; {advice}"
    )


def _write_rejected(run: Run, items: list[Item], rejected: dict[str, str]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "reason"])
    writer.writerows([item.key, rejected[item.key]] for item in items if item.key in rejected)
    store.write_text(run.clips / "rejected.csv", text.getvalue())


def _splits(run: Run, kept: list[Candidate]) -> list[Split]:
    groups, given = [c.item.group for c in kept], [c.item.split for c in kept]
    return assign_splits(groups, given, run.config.clips.split, run.config.clips_seed)


def _write(
    run: Run,
    source: Source,
    items: list[Item],
    candidates: list[Candidate],
    rejected: dict[str, str],
    entry: cache.Entry | None,
) -> None:
    assert entry is not None  # _hold_to_limit has refused an empty set
    kept = [candidates[row] for row in entry["item"][:].tolist()]
    motion = entry["motion"][:].tolist()
    _write_rejected(run, items, rejected)
    check_count(run.config, len(kept))
    splits = _splits(run, kept)
    rows = [
        Clip(c.sha256[:16], c.sha256, c.item.key, c.item.caption or "", c.item.group, split, round(float(m), 6))
        for c, split, m in zip(kept, splits, motion, strict=True)
    ]
    cache.set_index(run.cache, {"pixels": entry.folder.name})
    write_manifest(run.manifest, rows)
    counts: dict[str, Any] = {
        "candidates": len(items),
        "used": len(rows),
        "groups": len({row.group for row in rows}),
        **{str(split): sum(row.split == split for row in rows) for split in SPLITS},
        "rejected": dict(sorted(Counter(category(reason) for reason in rejected.values()).items())),
    }
    provenance = {"source": source.name, "license": run.config.clips.license or source.license, **source.provenance()}
    store.write_card(
        run.clips,
        "clips",
        run.id,
        ["manifest.parquet", "rejected.csv"],
        provenance=provenance,
        counts=counts,
        pixels=entry.folder.name,
        build={"python": platform.python_version(), **entry.spec["decoders"]},
    )
    (run.clips / _REASONS).unlink(missing_ok=True)
    _say(run, counts)


def _say(run: Run, counts: dict[str, Any]) -> None:
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts["rejected"].items())
    line = (
        f"clips: {counts['used']} of {counts['candidates']} used, {counts['groups']} groups "
        f"(train {counts['train']}, validation {counts['validation']}, test {counts['test']})"
    )
    if reasons:
        line += f"; rejected: {reasons}, see {run.clips / 'rejected.csv'}"
    logger.info("%s %s", line, json.dumps(counts["rejected"]))
    print(line, file=sys.stderr, flush=True)
