"""What each island knows, gathered from a run's folder, a bucket or an export. No gradio, no network but the bucket's.

What is not there is said in words (``missing``), for whoever looks at a run that somebody else trained.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archipel.errors import ArchipelError
from archipel.report.partition import quality_facts
from archipel.report.reading import Reader, finite, floats, mapping
from archipel.report.svg import tone
from archipel.run import MONOLITH, Run

if TYPE_CHECKING:
    from archipel.islands.bucket import Bucket

CAPTIONS = 8
_SPLITS = ("train", "validation", "test")
_CARD = 1 << 20  # bytes of a card in a bucket
_NO_CLIPS = "No sheets here: this studio was started with --no-clips."


@dataclass(frozen=True)
class Expert:
    """A trained network's own numbers, as its card tells; None: not told. ``loss``: on held-out clips of its cluster, of the
    averaged weights; ``state``: in words."""

    state: str
    steps: int | None = None
    loss: float | None = None
    parameters: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, card: Mapping[str, Any], state: str = "trained") -> Expert:
        """From a card, which may be a stranger's."""
        validation = mapping(card.get("validation"))
        loss = next(
            (
                found
                for part in ("ema", "raw")
                if (found := finite(mapping(validation.get(part)).get("loss"))) is not None
            ),
            None,
        )
        return cls(state, _whole(card.get("steps")), loss, _whole(card.get("parameters")), finite(card.get("seconds")))


@dataclass(frozen=True)
class Cluster:
    """One island's clips. ``clips``: by split; ``share``: of all training clips, in [0, 1]; ``sheet``: a data URI with its
    ``size`` in pixels, or ''."""

    name: str
    tone: str
    expert: Expert
    clips: dict[str, int] = field(default_factory=dict)
    share: float | None = None
    captions: tuple[str, ...] = ()
    sheet: str = ""
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Partition:
    """All of a run's clusters. ``facts``: (what, value) of the split as a whole; ``missing``: sentences."""

    clusters: tuple[Cluster, ...]
    method: str
    features: str
    facts: tuple[tuple[str, str], ...] = ()
    monolith: Expert | None = None
    missing: tuple[str, ...] = ()


def of_run(run: Run, *, clips: bool = True) -> Partition:
    """From a run's folder, finished or not. ``clips=False``: without contact sheets."""
    reader, config = Reader(run), run.config.partition
    quality = mapping(reader.json(run.partition / "quality.json"))
    missing = []
    if not quality:
        missing.append(
            "This folder has no clips and no partition: they stayed with whoever trained it."
            if run.done(run.expert("0"))
            else f"The clips are not divided yet: `{reader.command('partition')}`."
        )
    elif not clips:
        missing.append(_NO_CLIPS)
    sizes = mapping(quality.get("sizes"))
    counted = mapping(sizes.get("clips", sizes))
    counts = {split: floats(counted.get(split)) for split in _SPLITS}
    captions = reader.json(run.partition / "captions.json") if quality else None
    clusters = []
    for which, name in enumerate(run.expert_names):
        own = {split: int(row[which]) for split, row in counts.items() if which < len(row) and row[which] >= 0}
        sheet, size = _sheet(reader, which) if clips else ("", (0, 0))
        clusters.append(
            Cluster(
                name,
                tone(which),
                _expert(reader, name),
                own,
                _share(counts["train"], which),
                _captions(captions, which),
                sheet,
                size,
            )
        )
    if quality and clips and not any(one.sheet for one in clusters):
        missing.append("There are no contact sheets in this folder.")
    return Partition(
        tuple(clusters),
        str(quality.get("method", config.method))[:40],
        str(quality.get("features", config.features))[:40],
        tuple(quality_facts(quality)),
        _expert(reader, MONOLITH),
        (*missing, *reader.problems),
    )


def of_bucket(bucket: Bucket) -> Partition:
    """From a bucket: sizes from the shards' cards, numbers from the cards of what its owner admitted. Raises StoreError."""
    from archipel.islands import keys
    from archipel.islands.objects import decode
    from archipel.islands.remote import read_admitted, read_card

    counts: list[dict[str, int]] = []
    experts: dict[str, Expert] = {}
    for name in [*map(str, range(bucket.config.partition.k)), MONOLITH]:
        if name != MONOLITH:
            card: Mapping[str, Any] = {}
            with contextlib.suppress(ArchipelError):
                key = f"{keys.shard(name)}/{keys.CARD}"
                card = decode(bucket.objects.get(key, _CARD)) if key in bucket.files else {}
            held = mapping(card.get("counts"))
            counts.append({split: n for split in _SPLITS if (n := _whole(held.get(split))) is not None})
        found = read_admitted(bucket.objects, name)
        if found is None:
            experts[name] = Expert("not admitted yet")
        else:
            experts[name] = Expert.of(decode(read_card(bucket.objects, found, bucket.id)), "admitted")
    return _elsewhere(
        bucket.config.partition,
        counts,
        experts,
        "A bucket holds no clips: contact sheets and captions are with the run's owner, and what an island trains on "
        "are latents.",
    )


def of_export(folder: Path, config: Any) -> Partition:
    """From what ``archipel export`` or ``archipel pack`` wrote: the cards that it carries."""
    from archipel import box, store
    from archipel.exchange.folder import FACTS

    cards: Mapping[str, Any] = {}
    with contextlib.suppress(ArchipelError, OSError):
        if box.is_box(folder):
            cards = {
                path.parent.name: mapping(store.read_card(path.parent)) for path in folder.glob("experts/*/card.json")
            }
        else:
            cards = mapping(mapping(store.read_json(folder / FACTS)).get("cards"))
    experts = {
        name: Expert.of(mapping(cards[name])) if name in cards else Expert("not in this export")
        for name in [*map(str, range(config.partition.k)), MONOLITH]
    }
    counts = []
    for name in map(str, range(config.partition.k)):
        card = mapping(cards.get(name))
        told = {"train": _whole(card.get("train_clips")), "validation": _whole(card.get("validation_clips"))}
        counts.append({split: n for split, n in told.items() if n is not None})
    words = "An export holds no clips: contact sheets and captions stayed with whoever trained it."
    return _elsewhere(config.partition, counts, experts, words)


def _elsewhere(config: Any, counts: list[dict[str, int]], experts: Mapping[str, Expert], words: str) -> Partition:
    train = [float(own.get("train", 0)) for own in counts]
    known = all("train" in own for own in counts)
    clusters = tuple(
        Cluster(str(which), tone(which), experts[str(which)], own, _share(train, which) if known else None)
        for which, own in enumerate(counts)
    )
    return Partition(clusters, str(config.method), str(config.features), (), experts.get(MONOLITH), (words,))


def _expert(reader: Reader, name: str) -> Expert:
    folder = reader.run.expert(name)
    card = reader.card(folder)
    if card is not None:
        return Expert.of(card)
    told = mapping(reader.json(folder / "progress.json"))
    step, steps = _whole(told.get("step")), _whole(told.get("steps"))
    if step is None or steps is None:
        return Expert("not trained yet")
    return Expert(f"at step {step:,} of {steps:,}")


def _sheet(reader: Reader, which: int) -> tuple[str, tuple[int, int]]:
    path, k = reader.run.partition / f"sheet-{which}.png", reader.run.config.partition.k
    try:
        if not path.is_file() or path.is_symlink():
            return "", (0, 0)
        longest = 640 if k <= 6 else 400 if k <= 16 else 256
        uri, width, height = _drawn(path, path.stat().st_mtime_ns, longest)
    except (OSError, ValueError) as error:
        reader.note(path, error)
        return "", (0, 0)
    return uri, (width, height)


@functools.lru_cache(maxsize=128)
def _drawn(path: Path, written: int, longest: int) -> tuple[str, int, int]:
    """``report.media.sheet_uri``, once for all who look at one writing of a file."""
    from archipel.report.media import sheet_uri

    return sheet_uri(path, longest=longest)


def _captions(value: Any, which: int) -> tuple[str, ...]:
    entries = mapping(value).get(str(which))
    if not isinstance(entries, list):
        return ()
    texts = (entry if isinstance(entry, str) else mapping(entry).get("caption") for entry in entries[:CAPTIONS])
    return tuple(text[:300] for text in texts if isinstance(text, str) and text.strip())


def _share(row: list[float], which: int) -> float | None:
    total = sum(value for value in row if value == value)  # NaN: not told
    return row[which] / total if which < len(row) and total > 0 and row[which] == row[which] else None


def _whole(value: Any) -> int | None:
    number = finite(value)
    return int(number) if number is not None and 0 <= number < 1e15 else None
